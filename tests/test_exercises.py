"""The exercises: every check rejects what is wrong and says why, and every solution passes."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from dpo_mini.course import checks
from dpo_mini.course.checks import engine, matrix
from dpo_mini.course.exercises import REGION, heading

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = [e for chapter in checks.CHAPTERS for e in checks.exercises(chapter)]
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
by_id = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
by_notebook = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)


@by_id
def test_a_check_rejects_every_wrong_answer_and_names_it(exercise):
    assert len(exercise.wrong) >= 4
    assert len({w.name for w in exercise.wrong}) == len(exercise.wrong)
    for seed in (1, 2):
        row = matrix.row(exercise, seed)
        assert row["accepted"] == [] and row["cheats accepted"] == []
        assert len(row["named"]) >= 0.9 * len(exercise.wrong), set(row["rejected"]) - set(
            row["named"]
        )
        assert all(row["right"])
    if exercise.kind in ("implement", "derive"):
        assert len(exercise.right) >= 2


@pytest.mark.slow
@by_id
def test_a_check_answers_nonsense_with_a_sentence(exercise):
    def recursive(*arguments):
        return recursive(*arguments)

    nonsense = [
        None, 3, lambda: None, lambda *a: None, lambda *a: "yes", lambda *a: torch.ones(7, 9),
        lambda *a: 1 / 0, lambda *a: [], lambda *a: {"a": 1}, lambda *a: float("nan"),
        lambda *a: a, lambda *a: sys.exit(), recursive, lambda *a: torch.ones(3).long(),
    ]  # fmt: skip
    for answer in nonsense:
        verdict = engine.examine(exercise, answer, seed=3)
        assert not verdict.solved and len(verdict.message) > 20, answer
        assert "Traceback" not in verdict.message

    def unwritten(*arguments):
        raise NotImplementedError()

    assert "nothing is written" in engine.examine(exercise, unwritten).message


@by_id
def test_a_hint_is_a_sentence_that_does_not_give_the_answer_away(exercise):
    assert exercise.kind in engine.KINDS
    for wrong in exercise.wrong:
        assert wrong.hint[-1] in ".?!" and 15 < len(wrong.hint) < 300, wrong.name


def cells(path, exercise):
    """Text, answer and check of an exercise in a notebook."""
    notebook = nbformat.read(path, as_version=4)
    at = next(
        i for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and cell.source.startswith(f"## {exercise.id} ")
    )  # fmt: skip
    return notebook.cells[at : at + 3]


@by_id
def test_an_exercise_says_what_it_wants(exercise):
    (path,) = [p for p in SOLUTIONS if p.stem.startswith(exercise.id[:2])]
    text, answer, check = (cell.source for cell in cells(path, exercise))
    assert text.startswith(heading(exercise))
    assert "float64" in text or exercise.tolerance >= engine.FLOAT32 or exercise.kind == "derive"
    for part in ("**Example**", "**Why it matters**"):
        assert part in text, part
    assert text.count("<details>") >= 2
    assert "### BEGIN SOLUTION" in answer and f'check("{exercise.id}", ' in check


def test_there_are_enough_of_them():
    chapters = {e.id[:2] for e in EXERCISES}
    assert chapters == {p.stem[:2] for p in SOLUTIONS}
    for chapter in chapters:
        assert 3 <= len([e for e in EXERCISES if e.id.startswith(chapter)]) <= 6


def test_exercises_are_what_the_solutions_give():
    command = [sys.executable, "-m", "dpo_mini.course.exercises", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_kill_matrix_is_current():
    assert (ROOT / "solutions" / "KILL_MATRIX.md").read_text(encoding="utf-8") == matrix.page()


def run_notebook(path, tmp_path, monkeypatch, capsys):
    """All code cells of a notebook in one namespace; returns what it printed and the progress."""
    monkeypatch.chdir(path.parent)
    progress = tmp_path / "progress.json"
    monkeypatch.setattr(checks, "PROGRESS", progress)
    namespace = {"__name__": "__main__"}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"<{path.stem}>", "exec"), namespace)
    return capsys.readouterr().out, checks.read_progress(progress)


@by_notebook
def test_the_learners_copy_is_unsolved_and_nothing_in_it_crashes(
    path, tmp_path, monkeypatch, capsys
):
    said, progress = run_notebook(ROOT / "exercises" / path.name, tmp_path, monkeypatch, capsys)
    mine = [e for e in EXERCISES if e.id.startswith(path.stem[:2])]
    assert said.count("not yet: nothing is written here so far") == len(mine)
    assert len(re.findall(r"^… \d\d\.\d ", said, flags=re.M)) == len(mine)
    assert progress == {}


@by_notebook
def test_the_solutions_solve_it(path, tmp_path, monkeypatch, capsys):
    said, progress = run_notebook(path, tmp_path, monkeypatch, capsys)
    mine = {e.id for e in EXERCISES if e.id.startswith(path.stem[:2])}
    assert {id for id, row in progress.items() if row["solved"]} == mine, said
    assert len(re.findall(r"^✓ \d\d\.\d ", said, flags=re.M)) == len(mine)


@by_notebook
def test_a_solution_has_no_import_that_the_learners_copy_lacks(path):
    """What a solution needs is imported outside its region, so that a learner has it too."""
    for cell in nbformat.read(path, as_version=4).cells:
        for region in re.finditer(REGION, cell.source):
            body = region.group(0)
            indented = "def f():\n" + body if body.startswith((" ", "\t")) else body
            tree = ast.walk(ast.parse(indented))
            assert not [n for n in tree if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_progress_survives_bad_files_and_counts_tries(tmp_path, capsys):
    path = tmp_path / "progress.json"
    path.write_text("{ not json")
    checks.record("03.3", engine.Verdict(False, "no reference", "not yet"), path)
    checks.record("03.3", engine.Verdict(True, None, "solved."), path)
    checks.record("03.3", engine.Verdict(False, None, "not yet"), path)
    row = {"solved": True, "tries": 3, "mistakes": ["no reference"]}
    assert checks.read_progress(path) == {"03.3": row}
    checks.progress("03", path)
    assert "1 of " in (said := capsys.readouterr().out) and "Next: 03.1" in said


def test_strict_checks_raise(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_MINI_CHECKS", "strict")
    monkeypatch.setattr(checks, "PROGRESS", tmp_path / "progress.json")
    with pytest.raises(AssertionError, match="03.3"):
        checks.check("03.3", lambda *a: a[0])


def test_an_unknown_exercise_is_named():
    with pytest.raises(KeyError, match="03.1"):
        checks.exercise("03.9")


def judged(id, answer):
    return engine.examine(checks.exercise(id), answer, seed=5)


def test_what_is_right_is_accepted_however_it_is_written():
    def gradient(w, l, rw, rl, b):
        size = b * torch.sigmoid(b * ((l - rl) - (w - rw))) / len(w)
        return torch.stack((-size, size))  # for a tuple

    solution = checks.exercise("04.2").right[0]
    assert judged("04.2", gradient).solved
    assert judged("04.2", lambda *a: tuple(t.float() for t in solution(*a))).solved
    assert judged("08.1", lambda *a: np.float64(checks.exercise("08.1").truth(*a))).solved
    assert judged("08.3", lambda *a: np.int64(checks.exercise("08.3").truth(*a))).solved
    words = checks.exercise("01.4").truth()
    assert judged("01.4", lambda: {key: f" {word.upper()} " for key, word in words.items()}).solved
    assert judged("01.4", lambda: {key: word == "yes" for key, word in words.items()}).solved
    numbers = checks.exercise("12.1").truth() | {"0.1 nat": 0.025}
    assert judged("12.1", lambda: numbers).solved


def test_a_verdict_speaks_of_the_learners_own_arguments():
    def changes(mine, theirs, kept):
        result = ((mine - theirs) * kept).sum(1).mean()
        kept.zero_()
        return result

    verdict = judged("05.2", changes)
    assert verdict.mistake == "kept is changed in place" and "args" not in verdict.message
    verdict = judged("05.2", lambda mine, theirs, kept: (mine - theirs).sum(1).mean())
    assert verdict.mistake == "kept is all ones"
    verdict = judged("05.2", lambda one: one)
    assert verdict.mistake == "the arguments" and "policy, reference, mask" in verdict.message
    five_one = checks.exercise("05.1").right[0]
    in_float32 = judged("05.1", lambda *a: five_one(*a).float().double())
    assert "compute in float64" in in_float32.message


def test_a_tie_is_exact_and_a_fit_may_be():
    def tolerant(w, l, rw, rl, b):
        chosen, rejected = b * (w - rw), b * (l - rl)
        close = torch.isclose(chosen, rejected, atol=1e-6)
        points = torch.where(close, 0.5, (chosen > rejected).double())
        return tuple(x.mean() for x in (chosen, rejected, chosen - rejected, points))

    def never_full(memory, parameters, length, vocabulary, batch):
        room, pair = memory * 2**30 - 16 * parameters, 24 * length * vocabulary
        return max((n for n in range(1, batch + 1) if batch % n == 0 and n * pair < room), default=0)

    assert not judged("04.3", tolerant).solved
    assert judged("08.3", never_full).mistake == "wrong only where the memory is just full"


def named(id, answer):
    verdict = judged(id, answer)
    assert not verdict.solved
    return verdict.mistake


def test_two_listed_mistakes_at_once_are_both_named():
    def nothing_squared(p, w):
        once = 1.96 * p * (1 - p)
        return {"probability": math.ceil(once / w), "reward": math.ceil(1.96 / (p * (1 - p) * w))}

    assert named("01.5", nothing_squared) == "1.96 is not squared; and w is not squared"


def test_a_mistake_is_known_by_one_of_several_values():
    def only_a(kl_a, reward_a, kl_b, reward_b, at):
        kept = at[(at >= kl_a.min()) & (at <= kl_a.max())]
        return kept, 7.0 * kept  # whatever follows from it

    assert named("12.3", only_a) == "only A's range counts"


def test_a_derived_mistake_is_a_shift_an_approximation_or_a_maximum_of_parts():
    def shifted(policy, reference, mask):
        each = (policy.exp() * (policy - reference)).sum(-1)
        return (each[:, :-1] * mask[:, 1:]).sum(1).mean()

    def longest_parts(rows, pad):
        length = max(len(x) for x, _ in rows) + max(len(y) for _, y in rows)
        ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length).long()
        for i, (x, y) in enumerate(rows):
            ids[i, : len(x) + len(y)] = torch.tensor(x + y)
            mask[i, len(x) : len(x) + len(y)] = 1
        return ids, mask

    assert named("09.1", shifted) == "mask is one place early"
    assert named("04.1", lambda beta, D: beta**2 * D / 4 - beta / 2) == "an approximation at small D"
    assert named("06.1", longest_parts).startswith("the maximum of each part")


def test_writing_into_an_argument_is_named_where_torch_refuses_it():
    def in_place(margins, beta, eps):
        margins *= beta
        return margins

    assert named("05.4", in_place) == "an argument is changed in place"


def test_a_number_counts_with_and_without_quotes():
    numbers = checks.exercise("12.1").truth()
    for written in ("0.5", 0.5, "0.500", " 0.50 "):
        assert judged("12.1", lambda: numbers | {"doubled": written}).solved
    for wrong in ("0.25", 0.25, "0.250"):
        mistake = named("12.1", lambda: numbers | {"doubled": wrong})
        assert mistake == "the slope does not know the reward's scale"
    for wrong in ("0.5004", 0.5004, "half", float("nan"), None, True):
        assert named("12.1", lambda: numbers | {"doubled": wrong}) != "the arguments"
    pairs = checks.exercise("05.5").truth()
    assert judged("05.5", lambda: pairs | {"more pairs": 2}).solved
    assert named("05.5", lambda: pairs | {"more pairs": 1}) == "one more pair"
