"""exercises/ from solutions/, its one source:

    python -m dpo_mini.course.exercises [--check]

Solution regions are marked in nbgrader's syntax and cells carry nbgrader's metadata, so that a
teacher can release the same notebooks with it. --check writes nothing and fails where they differ.
"""

import argparse
import copy
import re
import sys
from pathlib import Path

import nbformat

from dpo_mini.course.checks import exercise
from dpo_mini.course.checks.engine import Exercise

REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", flags=re.S | re.M)
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"
CHECK = re.compile(r'^check\("(\d\d\.\d)"', flags=re.M)
HEADING = re.compile(r"## (\d\d\.\d)\b[^\n]*\n\n[^\n]*")


def learner_copy(notebook):
    """The notebook with every solution region emptied, without outputs."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        if cell.cell_type == "code":
            cell.source = REGION.sub(STUB, cell.source)
            cell.outputs, cell.execution_count = [], None
    return copied


def stamped(notebook):
    """The notebook with each exercise's title and facts from its check, and with nbgrader's
    metadata on its solution and check cells, without outputs.
    """
    copied, waiting = copy.deepcopy(notebook), None
    for cell in copied.cells:
        if cell.cell_type != "code":
            cell.source = HEADING.sub(lambda found: heading(exercise(found[1])), cell.source)
            continue
        cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("nbgrader", None)
        check = CHECK.search(cell.source)
        if "### BEGIN SOLUTION" in cell.source:
            waiting = cell
            cell.metadata["nbgrader"] = mark("", solution=True)
        elif check:
            name, points = check[1].replace(".", "-"), exercise(check[1]).difficulty
            cell.metadata["nbgrader"] = mark(f"check-{name}", grade=True, locked=True) | {
                "points": points
            }
            if waiting is not None:
                waiting.metadata["nbgrader"]["grade_id"] = f"answer-{name}"
    return copied


def heading(exercise: Exercise) -> str:
    """The first two lines of an exercise's text: its title, and what to know of it."""
    facts = [
        f"**{exercise.kind.capitalize()}**",
        f"difficulty {exercise.difficulty} of 5",
        f"importance {exercise.importance} of 5",
        f"{exercise.minutes} minutes",
        *(["workshop"] if exercise.workshop else []),
    ]
    return f"## {exercise.id} {exercise.title}\n\n{' · '.join(facts)}"


def mark(id: str, grade=False, locked=False, solution=False) -> dict:
    return {
        "grade": grade, "grade_id": id, "locked": locked, "schema_version": 3,
        "solution": solution, "task": False,
    }  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m dpo_mini.course.exercises", description=__doc__)
    parser.add_argument("--solutions", type=Path, default=Path("solutions"))
    parser.add_argument("--exercises", type=Path, default=Path("exercises"))
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    args = parser.parse_args(argv)
    sources = sorted(args.solutions.glob("*.ipynb"))
    stale = []
    for path in sources:
        stored = nbformat.read(path, as_version=4)
        solution = stamped(stored)
        target = args.exercises / path.name
        for file, wanted in ((path, solution), (target, learner_copy(solution))):
            text = nbformat.writes(wanted) + "\n"
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                stale.append(str(file))
                if not args.check:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text, encoding="utf-8")
    names = {path.name for path in sources}
    left = [str(p) for p in args.exercises.glob("*.ipynb") if p.name not in names]
    if args.check and stale + left:
        print(f"Not current: {', '.join(stale + left)}. Run python -m dpo_mini.course.exercises.")
        return 1
    print(f"{len(sources)} notebooks; {len(stale)} {'differ' if args.check else 'written'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
