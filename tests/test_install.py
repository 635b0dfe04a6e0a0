"""Installing: the lock resolves wherever it is promised, and the recipes say what is true."""

import importlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = ROOT / "requirements.lock"
PAGES = ("README.md", "INSTALL.md", "TROUBLESHOOTING.md")
PYTHONS = [
    python for text in PROJECT["classifiers"] for python in re.findall(r":: (3\.\d+)$", text)
]
SYSTEMS = {
    "Linux": "x86_64-unknown-linux-gnu",
    "Mac": "aarch64-apple-darwin",
    "Windows": "x86_64-pc-windows-msvc",
}
PLACES = [
    (python, system)
    for python in PYTHONS
    for system in (SYSTEMS if python in (PYTHONS[0], PYTHONS[-1]) else ["Linux"])
]
CUDA = re.compile(r"(cuda|nvidia)-|triton$")  # what torch brings on Linux is not locked


def pins(text: str, python: str = "") -> dict[str, set[str]]:
    """{name: versions} of the lines `name==version ; marker`; with `python`, of those for it."""
    versions: dict[str, set[str]] = {}
    for line in re.findall(r"^\s*(?:- )?([\w.-]+==.+)$", text, flags=re.M):
        pin = Requirement(line)
        if not python or not pin.marker or pin.marker.evaluate({"python_full_version": python}):
            (only,) = pin.specifier
            versions.setdefault(canonicalize_name(pin.name), set()).add(only.version)
    return versions


def direct() -> dict[str, Requirement]:
    """What pyproject.toml asks for by name, the extras' included."""
    extras = PROJECT["optional-dependencies"].values()
    asked = [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]
    return {canonicalize_name(r.name): r for r in asked if r.name != "dpo-mini"}


def resolve(python: str, system: str, lock: Path, **environment) -> subprocess.CompletedProcess:
    """What the tests' extra would install from wheels with the lock; nothing is installed."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--extra", "test"]
    command += ["--no-header", "--no-annotate", "--only-binary", ":all:", "--constraint", lock]
    command += ["--python-version", python, "--python-platform", system, "pyproject.toml"]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def skip_where_the_index_is_out_of_reach(done: subprocess.CompletedProcess) -> None:
    if done.returncode and "No solution found" not in done.stderr:
        if re.search("error sending request|[Ff]ailed to fetch|dns error", done.stderr):
            pytest.skip("the package index cannot be reached")


@pytest.fixture(scope="module")
def resolutions():
    """{(python, system): resolution}, all asked for at once: the time goes into waiting."""
    pytest.importorskip("uv", reason="needs the test extra: pip install '.[test]'")
    with ThreadPoolExecutor(8) as pool:
        jobs = {place: pool.submit(resolve, place[0], SYSTEMS[place[1]], LOCK) for place in PLACES}
    return {key: job.result() for key, job in jobs.items()}


@pytest.mark.slow
@pytest.mark.xdist_group("the package index")
@pytest.mark.parametrize("python, system", PLACES)
def test_the_lock_resolves_and_is_whole(python, system, resolutions):
    done = resolutions[python, system]
    skip_where_the_index_is_out_of_reach(done)
    assert done.returncode == 0, done.stderr
    chosen, locked = pins(done.stdout), pins(LOCK.read_text())
    ours = {name: versions for name, versions in chosen.items() if not CUDA.match(name)}
    assert set(direct()) - {"trl"} <= set(ours)
    assert not {name: v for name, v in ours.items() if not v <= locked.get(name, set())}


@pytest.mark.slow
@pytest.mark.xdist_group("the package index")
def test_a_lock_made_for_one_python_is_refused(tmp_path):
    """The check above can fail: with the newest version of each alone, 3.10 has no solution."""
    pytest.importorskip("uv")
    lock = tmp_path / "one.lock"
    newest = [line for line in LOCK.read_text().splitlines() if "< '3.11'" not in line]
    lock.write_text("\n".join(line.split(";")[0] for line in newest))
    done = resolve("3.10", SYSTEMS["Linux"], lock)
    skip_where_the_index_is_out_of_reach(done)
    assert done.returncode and "No solution found" in done.stderr


def test_an_index_out_of_reach_is_no_failure_of_the_lock():
    pytest.importorskip("uv")
    nowhere = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    done = resolve("3.12", SYSTEMS["Linux"], LOCK, UV_NO_CACHE="1", **nowhere)
    with pytest.raises(pytest.skip.Exception, match="cannot be reached"):
        skip_where_the_index_is_out_of_reach(done)


def test_the_promise_is_told_alike():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text()
    assert f"--python-version {PYTHONS[0]}" in (ROOT / "Makefile").read_text()


def test_nothing_newer_than_the_oldest_python_is_used():
    pytest.importorskip("vermin", reason="needs the test extra: pip install '.[test]'")
    vermin = [sys.executable, "-c", "from vermin import main; main()"]
    command = [*vermin, f"--target={PYTHONS[0]}-", "--no-tips", "--violations", "dpo_mini"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_environment_yml_has_the_versions_of_the_lock():
    conda = (ROOT / "environment.yml").read_text()
    (python,) = re.findall(r"- python=([\d.]+)$", conda, flags=re.M)
    locked, listed = pins(LOCK.read_text(), python + ".7"), pins(conda)
    assert set(listed) == set(direct()), "environment.yml must list every direct dependency"
    assert listed == {name: locked[name] for name in listed}


def test_the_lock_is_within_the_bounds_and_names_no_index():
    text = LOCK.read_text()
    assert pins(text)["torch"] == {"2.13.0"}
    for name, asked in direct().items():
        assert all(asked.specifier.contains(v) for v in pins(text)[name]), name
    for line in text.splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line), line


@pytest.mark.lock
def test_the_lock_is_what_is_installed_here():
    locked = pins(LOCK.read_text(), sys.version.split()[0])
    for name in ("torch", "transformers"):
        assert {version(name).split("+")[0]} == locked[name]


# What is written for people.


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)


def test_every_recipe_goes_from_the_clone_to_the_open_notebook():
    recipes = [text for _, text in blocks("INSTALL.md") if "git clone" in text]
    assert len(recipes) >= 6
    ends = r"jupyter lab notebooks/00_start_here\.ipynb$|^make lab$|^%cd notebooks$"
    for text in recipes:
        assert re.search(ends, text, flags=re.M), text


def test_commands_for_windows_hold_no_single_quotes():
    windows = [text for language, text in blocks("INSTALL.md") if language == "bat"]
    assert windows and not any("'" in text for text in windows)


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_there_is(page):
    """Targets of make, extras, and the lock's torch."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.M)) <= targets
    for extras in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"torch==([\d.]+\d)", text)) <= pins(LOCK.read_text())["torch"]


def test_nobody_is_sent_to_a_package_that_is_not_on_the_index():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*.ipynb")]:
        assert not re.search(r"install ['\"]?dpo.mini", path.read_text("utf-8")), path.name
    for path in (ROOT / "dpo_mini").rglob("*.py"):
        assert not re.search(r"install ['\"]?dpo.mini", path.read_text("utf-8")), path.name


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings no CUDA")


def make(*arguments) -> str:
    """What make prints, as if nobody had called it from another make."""
    ours = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "GPU", "WHEELHOUSE", "CPU_INDEX")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "--always-make", "PYTHON=python3", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@on_linux
@pytest.mark.parametrize("target", ["demo", "lab", "test", "wheelhouse", "test-lowest"])
def test_without_a_gpu_torch_comes_without_cuda(target):
    from_its_index = "--index-url https://download.pytorch.org/whl/cpu"
    before, found, after = make("--dry-run", target, "GPU=").partition(from_its_index)
    assert found and "--constraint requirements.lock" not in before
    assert "--constraint requirements.lock" in after
    assert from_its_index not in make("--dry-run", target, "GPU=GPU 0: a card")
    assert from_its_index not in make("--dry-run", target, "GPU=", "WHEELHOUSE=wheelhouse")


@on_linux
def test_where_torchs_index_is_out_of_reach_installing_goes_on_at_once(tmp_path):
    started = time.monotonic()
    download = f"{sys.executable} -m pip download -d {tmp_path}"
    attempt = f"--eval=attempt: ; @$(call cpu_torch,{download},torch==0)"
    said = make(attempt, "attempt", "GPU=", "CPU_INDEX=http://127.0.0.1:9/whl/cpu")
    assert "the package index has a larger one" in said and time.monotonic() - started < 60
