"""The workshop as two archives, one for participants and one for the teacher:

    python -m dpo_mini.course.workshop.archives [1h | 3h | 2d] [--folder dist/workshop]

Participants get short notebooks, exercises and the library, with its checks packed. The teacher
gets the same, and the solutions, the guide and the slides. The same sources give the same bytes.
"""

import argparse
import re
import tempfile
import zipfile
from pathlib import Path

import nbformat

from dpo_mini.course.checks.sealing import sealed
from dpo_mini.course.workshop import plan, short, slides

TOP = "dpo_mini_workshop"
PLAIN = ("Makefile", "pyproject.toml", "requirements.lock", "environment.yml", "INSTALL.md",
         "TROUBLESHOOTING.md", "LICENSE")  # fmt: skip
PAGES = ("cheat_sheet.md", "glossary.md", "references.md")
LIBRARY = (".py", ".md", ".json", ".safetensors", ".txt", ".jinja")


def participants(form: str) -> dict[str, bytes]:
    """{path in the archive: content} of what participants get."""
    root = plan.ROOT
    files = {name: (root / name).read_bytes() for name in PLAIN}
    files["README.md"] = (root / "workshop" / "PARTICIPANTS.md").read_bytes()
    for name in PAGES:
        text = (root / "notebooks" / name).read_text(encoding="utf-8")
        files[f"notebooks/{name}"] = short.without_page_links(text).encode()
    for path in sorted((root / "dpo_mini").rglob("*")):
        if path.suffix in LIBRARY and "__pycache__" not in path.parts:
            content = path.read_bytes()
            if re.fullmatch(r"ch\d\d\.py", path.name):
                content = sealed(content.decode()).encode()
            files[path.relative_to(root).as_posix()] = content
    for chapter in plan.chapters_of(form):
        notebook, name = short.short_notebook(chapter, form), plan.notebook_path(chapter).name
        text = written(notebook)
        files[f"notebooks/{name}"] = text
        for stored in set(re.findall(rb"results/\w+\.json", text)):
            result = f"notebooks/{stored.decode()}"
            files[result] = (root / result).read_bytes()
    for chapter, ids in plan.exercises_of(form).items():
        name = plan.notebook_path(chapter).name
        files[f"exercises/{name}"] = written(short.cut_exercises(chapter, ids, solved=False))
    return files


def teacher(form: str, deck: list[Path]) -> dict[str, bytes]:
    """The participants' files with readable checks, and the solutions, the guide and the deck."""
    root, files = plan.ROOT, participants(form)
    for path in (root / "dpo_mini" / "course" / "checks").glob("ch*.py"):
        files[path.relative_to(root).as_posix()] = path.read_bytes()
    for chapter, ids in plan.exercises_of(form).items():
        name = plan.notebook_path(chapter).name
        files[f"solutions/{name}"] = written(short.cut_exercises(chapter, ids, solved=True))
    files["workshop/GUIDE.md"] = plan.GUIDE.read_bytes()
    files["workshop/slides.md"] = slides.SOURCE.read_bytes()
    return files | {f"workshop/{path.name}": path.read_bytes() for path in deck}


def written(notebook) -> bytes:
    return (nbformat.writes(notebook) + "\n").encode()


def write(files: dict[str, bytes], target: Path) -> None:
    """A zip whose bytes depend on the files alone: sorted, one date, one permission."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{TOP}/{name}", date_time=(2000, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dpo_mini.course.workshop.archives", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("form", nargs="?", default="3h", choices=plan.PLANS)
    parser.add_argument("--folder", type=Path, default=Path("dist/workshop"))
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        deck = slides.build(Path(folder))
        for name, files in (
            ("participants", participants(args.form)), ("teacher", teacher(args.form, deck))
        ):  # fmt: skip
            target = args.folder / f"{name}_{args.form}.zip"
            write(files, target)
            print(f"{target}: {len(files)} files, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
