"""What the course needs, and a sentence for each package that is missing or too old."""

from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement

REMEDY = 'run `make lab`, or `pip install ".[lab]"` in the project\'s folder'


def package_problems(requirements: Sequence[str], extra: str = "lab") -> list[str]:
    """A sentence for each of `requirements` that this Python does not meet.

    `requirements` as pyproject.toml writes them, 'sympy>=1.13; extra == "lab"'. Those of other
    extras than `extra` are passed over.
    """
    problems = []
    for needed in map(Requirement, requirements):
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{needed.name} is missing: {REMEDY}.")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            problems.append(
                f"{needed.name} {version} is here, and {needed.specifier} is needed: {REMEDY}."
            )
    return problems


def require_packages(extra: str = "lab") -> None:
    """Raise ImportError where a package is missing or too old: one sentence for each."""
    try:
        requirements = metadata.requires("dpo-mini") or []
    except metadata.PackageNotFoundError:
        raise ImportError(f"dpo-mini is not installed: {REMEDY}.") from None
    problems = package_problems(requirements, extra)
    if problems:
        raise ImportError("\n".join(problems))
