"""The kill matrix: which check rejects which wrong answer, and whether it names it.

python -m dpo_mini.course.checks.matrix
"""

import warnings
from collections import Counter
from pathlib import Path

from dpo_mini.course import checks
from dpo_mini.course.checks import engine
from dpo_mini.course.checks.engine import Exercise, examine


def row(exercise: Exercise, seed: int) -> dict:
    """What the check says of every answer known: wrong ones, right ones, and ones that cheat."""
    verdicts = [(m.name, examine(exercise, m.answer, seed)) for m in exercise.listed]
    right = (exercise.truth, *exercise.right)
    return {
        "rejected": [name for name, verdict in verdicts if not verdict.solved],
        "accepted": [name for name, verdict in verdicts if verdict.solved],
        "named": [name for name, verdict in verdicts if verdict.mistake == name],
        "right": [examine(exercise, answer, seed).solved for answer in right],
        "cheats accepted": [
            name
            for name, cheat in engine.refuse_arguments(exercise, seed)
            if examine(exercise, cheat, seed).solved
        ],
    }


def derived(exercise: Exercise, seed: int) -> list[str]:
    """The names of the derived mistakes that are mistakes here: a value comes out for each case, it
    is not the right one, and no mistake before it gives the same.
    """
    trial = engine.tried(exercise, exercise.truth, seed)

    def outcomes(answer):
        """None where an error is raised."""
        found = []
        for case, truth in zip(trial.cases, trial.expected):
            found.append(engine.outcome(answer, case, seed, truth.value))
            if found[-1].error:
                return None
        return found

    def key(found):
        return repr([[engine.show(x, 9) for x in (o.value, *o.gradients)] for o in found])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a mistake does
        listed = [found for m in exercise.listed if (found := outcomes(m.answer))]
        seen = {key(found) for found in (trial.expected, *listed)}
        names = {}
        for mistake in engine.derived(exercise, trial.cases[0], trial.names):
            found = outcomes(mistake.answer)
            if found is None or key(found) in seen:
                continue
            wrong = (
                engine.complaint(e, o, exercise.tolerance, trial.names)
                for e, o in zip(trial.expected, found)
            )
            if any(wrong):
                seen.add(key(found))
                names[mistake.name] = None
    return list(names)


def page(seed: int = 0) -> str:
    """The matrix as Markdown."""
    lines = [
        "# The kill matrix",
        "",
        "Every exercise's check is tried with wrong answers (rejected? recognised by name?), with",
        "right answers written differently (passed?) and with functions that ignore an argument,",
        "change it in place or return a constant. `tests/test_exercises.py` does the same on every",
        "change. Listed mistakes stand in the exercise; derived ones are made from its right answers.",
        "",
        "| exercise | kind | listed: rejected | listed: named | derived | right answers passed |",
        "|---|---|---|---|---|---|",
    ]
    details = []
    for chapter in checks.CHAPTERS:
        for exercise in checks.exercises(chapter):
            result, made = row(exercise, seed), derived(exercise, seed)
            n, rejected, named = map(len, (exercise.wrong, result["rejected"], result["named"]))
            right = f"{sum(result['right'])} of {len(result['right'])}"
            lines.append(
                f"| {exercise.id} {exercise.title} | {exercise.kind} | {rejected} of {n} "
                f"| {named} of {n} | {len(made)} | {right} |"
            )
            names = "; ".join(
                wrong.name + ("" if wrong.name in result["named"] else " (not named)")
                for wrong in exercise.wrong
            )
            details.append(f"- **{exercise.id}** listed: {names}")
            if made:
                kinds = Counter(name.partition(" where ")[0] for name in made)
                said = [f"{name} ({n} places)" if n > 1 else name for name, n in kinds.items()]
                details.append(f"  - derived: {'; '.join(said)}")
    return "\n".join([*lines, "", "The wrong answers:", "", *details]) + "\n"


if __name__ == "__main__":
    Path("solutions/KILL_MATRIX.md").write_text(page(), encoding="utf-8")
