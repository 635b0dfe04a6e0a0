"""What every page of the course carries: links to its neighbours, and answers that wait.

python -m dpo_mini.course.pages [--check]

The last cell of a notebook leads on. The output of a cell with the tag "answer" is folded, so that
a reader can predict before looking. A click on it, or running the cell, shows it.
"""

import copy
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path("notebooks")
LAST = ("cheat_sheet.md", "Cheat sheet")


def title(path: Path) -> str:
    """The heading of a notebook, "05 An exact world"."""
    heading = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return heading.lstrip("# ").replace(" · ", " ")


def navigation(path: Path, pages: list[Path], titles: dict[Path, str]) -> str:
    """Links to the page before, the contents, the exercises and the page after."""
    i = pages.index(path)
    before = [f"[← {titles[pages[i - 1]]}]({pages[i - 1].name})"] if i else []
    exercises = path.parent.parent / "exercises" / path.name
    practise = [f"[Exercises of this chapter](../exercises/{path.name})"] * exercises.exists()
    name, said = (pages[i + 1].name, titles[pages[i + 1]]) if i + 1 < len(pages) else LAST
    places = ["[Contents](README.md)", *practise, "[Glossary](glossary.md)"]
    return "---\n" + " · ".join([*before, *places, f"[{said} →]({name})"])


def finished(notebook, links: str):
    """The notebook with its last cell leading on, and the outputs of its answers folded."""
    done = copy.deepcopy(notebook)
    done.cells = [c for c in done.cells if "navigation" not in c.metadata.get("tags", [])]
    last = nbformat.v4.new_markdown_cell(links, metadata={"tags": ["navigation"]})
    last.id = "navigation"
    done.cells.append(last)
    for cell in done.cells:
        if "answer" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"outputs_hidden": True}
            if "hide-output" not in cell.metadata["tags"]:
                cell.metadata["tags"].append("hide-output")  # the web edition's word for it
    return done


def main(arguments: list[str]) -> int:
    pages = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    titles = {path: title(path) for path in pages}
    stale = []
    for path in pages:
        stored = nbformat.read(path, as_version=4)
        wanted = finished(stored, navigation(path, pages, titles))
        if wanted != stored:
            stale.append(path.name)
            if "--check" not in arguments:
                nbformat.write(wanted, path)
    if "--check" in arguments and stale:
        print(f"Not current: {', '.join(stale)}. Run python -m dpo_mini.course.pages.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
