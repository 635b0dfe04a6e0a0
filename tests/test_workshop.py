"""The workshop's kit: plans that add up, short notebooks that run, and a class graded in safety."""

import ast
import builtins
import re
import time
from pathlib import Path

import nbformat
import pytest

from dpo_mini.course import checks
from dpo_mini.course.exercises import REGION, learner_copy
from dpo_mini.course.workshop import grading, plan, short

ROOT = Path(__file__).resolve().parents[1]
by_form = pytest.mark.parametrize("form", plan.PLANS)


@by_form
def test_a_plan_adds_up_and_leaves_slack(form):
    parts = plan.PLANS[form]
    assert sum(part.minutes for part in parts) == plan.MINUTES[form]
    for part in parts:
        assert plan.asked(part, form) <= 0.95 * part.minutes, (part, plan.asked(part, form))
    asked = sum(plan.asked(part, form) for part in parts)
    breaks = sum(p.minutes for p in parts if p.title.startswith(("Break", "Lunch")))
    assert asked <= 0.85 * (plan.MINUTES[form] - breaks)


def test_the_three_hours_exercises_are_those_that_say_workshop():
    chosen = {id for ids in plan.exercises_of("3h").values() for id in ids}
    exercises = [e for chapter in checks.CHAPTERS for e in checks.exercises(chapter)]
    assert chosen == {e.id for e in exercises if e.workshop}


def test_the_guides_tables_are_current():
    assert plan.page() == plan.GUIDE.read_text(encoding="utf-8"), (
        "run python -m dpo_mini.course.workshop.plan"
    )


def test_reading_is_counted_in_words_lines_guesses_and_figures():
    text = nbformat.v4.new_markdown_cell("word " * 300)
    code = nbformat.v4.new_code_cell("x = 1\n" * 40)
    assert plan.minutes_of(text, "3h") == 2 and plan.minutes_of(code, "3h") == 2
    code.metadata["tags"] = [plan.RUN, "answer"]
    assert plan.minutes_of(code, "3h") == plan.GUESS
    picture = nbformat.v4.new_output("display_data", {"image/png": ""})
    code.outputs = [picture]
    assert plan.minutes_of(code, "3h") == plan.GUESS + plan.FIGURE


SHORT = [(form, chapter) for form in short.SHORT for chapter in plan.chapters_of(form)]


@pytest.mark.parametrize("form, chapter", SHORT)
def test_a_short_notebook_defines_what_it_uses_and_gives_no_answer_away(form, chapter):
    notebook = short.short_notebook(chapter, form)
    full = nbformat.read(plan.notebook_path(chapter), as_version=4)
    sources = {cell.id: cell.source for cell in full.cells}
    known = set(dir(builtins)) | {"display"}
    for cell in notebook.cells[:-1]:
        if cell.cell_type == "code":
            assert cell.source == sources[cell.id]
            tree = ast.parse(cell.source)
            names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
            bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | bound_names(tree)
            missing = {n.id for n in names if isinstance(n.ctx, ast.Load)} - known - bound
            assert not missing, (cell.id, missing)
            known |= bound
            if "answer" in cell.metadata.get("tags", []):
                assert cell.outputs == []
    assert notebook.cells[0].source.startswith(f"# {chapter}")


def bound_names(tree) -> set[str]:
    """Names that imports, functions and arguments bind."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


# --- a class is graded ---

RIGHT, EMPTY = "right", "empty"
CHAPTER = "03"
IDS = [e.id for e in checks.exercises(CHAPTER)]


def handed_in(answers: dict[str, str]):
    """The chapter's exercises, each with the code given, or RIGHT or EMPTY."""
    (path,) = (ROOT / "solutions").glob(f"{CHAPTER}_*.ipynb")
    right = nbformat.read(path, as_version=4)
    empty = learner_copy(right)
    id = None
    for cell, stub in zip(right.cells, empty.cells):
        heading = grading.HEADING.search(cell.source)
        id = heading[1] if heading else id
        said = answers.get(id, RIGHT)
        if REGION.search(cell.source) and said != RIGHT:
            cell.source = stub.source if said == EMPTY else said
    return right


def hand_in(folder, name, answers):
    place = folder / name
    place.mkdir(parents=True)
    nbformat.write(handed_in(answers), place / "03_partition_function.ipynb")


NO_REFERENCE = """
def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))
"""
LOOP, SLEEP = "while True:\n    pass\n", "import time\ntime.sleep(10_000)\n"
TELLS = "print('x' * 10**9)\n"
TALKS = "while True:\n    print('a line of text, again and again, ' * 100)\n"
SWALLOWS = "while True:\n    try:\n        print('x' * 10**6)\n    except BaseException:\n        pass\n"
HOGS = "kept = []\nwhile True:\n    kept.append(bytearray(2**28))\n"
LEAVES, DIES, KILLS = "import sys\nsys.exit()\n", "import os\nos._exit(0)\n", (
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
)
BROKEN = "def dpo_loss(chosen:\n    return\n"
FILLS = "with open('big', 'wb') as f:\n    while True:\n        f.write(bytes(2**24))\n"
SPAWNS = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])\n"


def test_a_submission_is_read_with_our_checks_and_not_with_its_own():
    notebook = handed_in({"03.3": NO_REFERENCE})
    for cell in notebook.cells:
        if cell.source.startswith('check("03.3"'):
            cell.source = 'check("03.3", "edited")'
    notebook.cells.insert(1, nbformat.v4.new_code_cell("!rm -rf x\n%matplotlib inline\na = 1"))
    ours = grading.our_checks()
    found = grading.steps(notebook, ours)
    assert [step.label for step in found] == ["the first cells", *IDS]
    assert "!rm" not in "".join(found[0].code) and "a = 1" in "".join(found[0].code)
    assert found[3].check == ours["03.3"] and "edited" not in "".join(found[3].code)


def test_progress_files_make_a_table_too(tmp_path):
    from dpo_mini.course.checks.engine import Verdict

    ann = tmp_path / "ann" / "progress.json"
    ann.parent.mkdir()
    checks.record("03.3", Verdict(False, "no reference", "not yet"), ann)
    checks.record("03.3", Verdict(True, None, "solved."), ann)
    checks.record("03.1", Verdict(False, None, "not yet"), ann)
    (tmp_path / "bob.json").write_text("{ not json")
    said = grading.table(grading.class_results([tmp_path], grading.Limits()))
    assert re.search(r"^ann +x +■ +1 of 2$", said, flags=re.M)
    assert re.search(r"^bob +- +- +0 of 2$", said, flags=re.M)
    assert "   1  03.3 no reference" in said and "1 of 1  03.1" in said


def test_what_a_submission_says_cannot_run_anything_outside_of_it():
    class Pipe:
        def send_bytes(self, data):
            self.said = data

    pipe = Pipe()
    grading.send(pipe, "result", grading.Result("solved"))
    assert pipe.said == b'["result", {"state": "solved", "mistakes": [], "message": ""}]'


@pytest.mark.slow
def test_twenty_submissions_are_graded_whatever_they_do(tmp_path):
    """Right, wrong, empty, and such as hang, exit, print a gigabyte or fill the memory."""
    bad = {"loop": LOOP, "sleep": SLEEP, "tells": TELLS, "talks": TALKS, "swallows": SWALLOWS,
           "hogs": HOGS, "leaves": LEAVES, "dies": DIES, "kills": KILLS, "fills": FILLS,
           "spawns": SPAWNS}  # fmt: skip
    for name, code in bad.items():
        hand_in(tmp_path, name, {"03.2": code})
    for k in range(3):
        hand_in(tmp_path, f"right{k}", {})
        hand_in(tmp_path, f"wrong{k}", {"03.3": NO_REFERENCE, "03.4": EMPTY})
    hand_in(tmp_path, "empty0", dict.fromkeys(IDS, EMPTY))
    hand_in(tmp_path, "empty1", dict.fromkeys(IDS, EMPTY))
    hand_in(tmp_path, "broken", {"03.3": BROKEN})
    assert len(list(tmp_path.iterdir())) == 20

    started = time.monotonic()
    limits = grading.Limits(seconds=10)
    results = grading.class_results([tmp_path], limits)
    seconds = time.monotonic() - started
    states = {name: [rows[id].state for id in IDS] for name, rows in results.items()}
    for k in range(3):
        assert states[f"right{k}"] == ["solved"] * 4
        assert states[f"wrong{k}"] == ["solved", "solved", "not yet", "empty"]
        assert results[f"wrong{k}"]["03.3"].mistakes == ["no reference"]
    assert states["empty0"] == states["empty1"] == ["empty"] * 4
    assert states["broken"] == ["solved", "solved", "not yet", "solved"]
    for name in bad:
        wanted = "not yet" if name == "fills" else "stopped"  # an error of its own: file too large
        assert states[name] == ["solved", wanted, "solved", "solved"], (name, states[name])
    assert "printed too much" in results["tells"]["03.2"].message
    assert "memory" in results["hogs"]["03.2"].message
    assert "longer than 10" in results["loop"]["03.2"].message
    said = grading.table(results)
    assert re.search(r"^ +3  03\.3 no reference$", said, flags=re.M)
    assert "4 of 18  03.3" in said and "11 of 18  03.2" in said
    assert re.search(r"^right0 +■ +■ +■ +■ +4 of 4$", said, flags=re.M)
    assert seconds < 180, seconds
    print(said, f"\n{seconds:.0f} seconds")
