"""Checks of the exercises: `check("03.2", your_function)`."""

import json
import os
from importlib import import_module
from pathlib import Path

from dpo_mini.course.checks.engine import Exercise, Verdict, examine

CHAPTERS = tuple(sorted(path.stem[2:] for path in Path(__file__).parent.glob("ch[0-9][0-9].py")))
PROGRESS = Path(os.environ.get("DPO_MINI_PROGRESS", "progress.json"))


def exercises(chapter: str) -> tuple[Exercise, ...]:
    """The exercises of a chapter, "01" to the last, in order."""
    return import_module(f"dpo_mini.course.checks.ch{chapter}").EXERCISES


def exercise(id: str) -> Exercise:
    """The exercise of that id; KeyError with those there are."""
    chapter = str(id).split(".")[0]
    known = {e.id: e for e in exercises(chapter)} if chapter in CHAPTERS else {}
    if id not in known:
        there = ", ".join(known) or "of the chapters " + ", ".join(CHAPTERS)
        raise KeyError(f"there is no exercise {id!r}; there are {there}")
    return known[id]


def check(id: str, answer) -> None:
    """Say whether `answer` solves the exercise, and if not, what to think about next.

    The result joins the file `progress.json` in this folder. With DPO_MINI_CHECKS=strict in the
    environment (a teacher's grader, the course's own tests) an unsolved exercise raises.
    """
    verdict = examine(exercise(id), answer)
    record(id, verdict)
    print(f"{mark(verdict)} {id} {exercise(id).title}: {verdict.message}")
    if os.environ.get("DPO_MINI_CHECKS") == "strict" and not verdict.solved:
        raise AssertionError(f"{id}: {verdict.message}")


def mark(verdict: Verdict) -> str:
    """What a glance at the line tells: solved, tried, or not begun."""
    if verdict.solved:
        return "✓"
    return "…" if verdict.unwritten else "✗"


def read_progress(path: Path | None = None) -> dict[str, dict]:
    """{id: {"solved", "tries", "mistakes"}}; empty for a file that is not there or not readable."""
    path = path or PROGRESS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def record(id: str, verdict: Verdict, path: Path | None = None) -> None:
    """Add a try to the progress file; what is solved stays solved. Nothing leaves the machine."""
    if verdict.unwritten:
        return
    path = path or PROGRESS
    progress = read_progress(path)
    row = progress.setdefault(id, {"solved": False, "tries": 0, "mistakes": []})
    row["solved"] = row["solved"] or verdict.solved
    row["tries"] += 1
    if verdict.mistake and verdict.mistake not in row["mistakes"]:
        row["mistakes"].append(verdict.mistake)
    try:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(progress, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:
        print(f"(The progress could not be written to {path}; the verdict holds all the same.)")


def progress(chapter: str | None = None, path: Path | None = None) -> None:
    """Print what is solved and what comes next, of a chapter or of the course."""
    rows = read_progress(path)
    solved = {id for id, row in rows.items() if row["solved"]}
    for one in [chapter] if chapter else CHAPTERS:
        tasks = exercises(one)
        marks = "".join("■" if e.id in solved else "□" for e in tasks)
        print(f"{one}  {marks}  {sum(e.id in solved for e in tasks)} of {len(tasks)}")
    left = [
        e for one in ([chapter] if chapter else CHAPTERS) for e in exercises(one)
        if e.id not in solved
    ]  # fmt: skip
    if left:
        print(f"Next: {left[0].id} {left[0].title}, about {left[0].minutes} minutes.")
    else:
        print("All solved.")
