"""The kill matrix: which check rejects which wrong answer, and whether it names it.

python -m dpo_mini.course.checks.matrix
"""

from pathlib import Path

from dpo_mini.course import checks
from dpo_mini.course.checks.engine import Exercise, examine, refuse_arguments


def row(exercise: Exercise, seed: int) -> dict:
    """What the check says of every answer known: wrong ones, right ones, and ones that cheat."""
    verdicts = [(w.name, examine(exercise, w.answer, seed)) for w in exercise.wrong]
    return {
        "rejected": [name for name, verdict in verdicts if not verdict.solved],
        "accepted": [name for name, verdict in verdicts if verdict.solved],
        "named": [name for name, verdict in verdicts if verdict.mistake == name],
        "right": [examine(exercise, f, seed).solved for f in (exercise.truth, *exercise.others)],
        "cheats accepted": [
            name
            for name, cheat in refuse_arguments(exercise, seed)
            if examine(exercise, cheat, seed).solved
        ],
    }


def page(seed: int = 0) -> str:
    """The matrix as Markdown."""
    lines = [
        "# The kill matrix",
        "",
        "Every exercise's check is tried with wrong answers (rejected? recognised by name?), with",
        "right answers written differently (passed?) and with functions that ignore an argument or",
        "return a constant. `tests/test_exercises.py` does the same on every change.",
        "",
        "| exercise | kind | wrong answers rejected | named | right answers passed |",
        "|---|---|---|---|---|",
    ]
    details = []
    for chapter in checks.CHAPTERS:
        for exercise in checks.exercises(chapter):
            result = row(exercise, seed)
            sets = exercise.wrong, result["rejected"], result["named"]
            n, rejected, named = map(len, sets)
            right = f"{sum(result['right'])} of {len(result['right'])}"
            lines.append(
                f"| {exercise.id} {exercise.title} | {exercise.kind} | {rejected} of {n} "
                f"| {named} of {n} | {right} |"
            )
            names = "; ".join(
                wrong.name + ("" if wrong.name in result["named"] else " (not named)")
                for wrong in exercise.wrong
            )
            details.append(f"- **{exercise.id}** {names}")
    return "\n".join([*lines, "", "The wrong answers:", "", *details]) + "\n"


if __name__ == "__main__":
    Path("solutions/KILL_MATRIX.md").write_text(page(), encoding="utf-8")
