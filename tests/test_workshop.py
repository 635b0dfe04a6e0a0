"""The workshop's kit: plans that add up, short notebooks that run, and a class graded in safety."""

import ast
import builtins
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest

from dpo_mini.course import checks
from dpo_mini.course.checks import engine, sealing
from dpo_mini.course.exercises import REGION, learner_copy
from dpo_mini.course.workshop import archives, grading, nbgrader_course, plan, short, slides

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


@pytest.mark.slow
@pytest.mark.parametrize("form, chapter", SHORT)
def test_a_short_notebook_runs(form, chapter):
    short.execute(chapter, form)


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
SWALLOWS = """
while True:
    try:
        print('x' * 10**6)
    except BaseException:
        pass
"""
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
        assert results[f"wrong{k}"]["03.3"].mistakes == ["the reference is left out"]
    assert states["empty0"] == states["empty1"] == ["empty"] * 4
    assert states["broken"] == ["solved", "solved", "not yet", "solved"]
    for name in bad:
        wanted = "not yet" if name == "fills" else "stopped"  # an error of its own: file too large
        assert states[name] == ["solved", wanted, "solved", "solved"], (name, states[name])
    assert "printed too much" in results["tells"]["03.2"].message
    assert "memory" in results["hogs"]["03.2"].message
    assert "longer than 10" in results["loop"]["03.2"].message
    said = grading.table(results)
    assert re.search(r"^ +3  03\.3 the reference is left out$", said, flags=re.M)
    assert "4 of 18  03.3" in said and "11 of 18  03.2" in said
    assert re.search(r"^right0 +■ +■ +■ +■ +4 of 4$", said, flags=re.M)
    assert seconds < 180, seconds
    print(said, f"\n{seconds:.0f} seconds")


# --- slides ---


def test_every_slide_shows_what_is_stored():
    text = slides.SOURCE.read_text(encoding="utf-8")
    deck = slides.slides(text)
    assert len(deck) >= 20 and all(slide.notes for slide in deck)
    for slide in deck:
        for kind, id in slide.shown:
            assert slides.shown(kind, id), id
    figures = [id for slide in deck for kind, id in slide.shown if kind == "figure"]
    page = slides.page()
    for id in figures:
        assert slides.picture(id) in page
    assert page == slides.page()


def test_every_figure_of_the_three_hours_is_on_a_slide():
    shown = slides.figures_on_slides(slides.SOURCE.read_text(encoding="utf-8"))
    for chapter in plan.chapters_of("3h"):
        for cell in nbformat.read(plan.notebook_path(chapter), as_version=4).cells:
            if plan.on_the_way(cell, "3h") and plan.has_figure(cell):
                assert cell.id in shown, f"say in workshop/slides.md what to say at {cell.id}"


def test_a_slide_of_a_cell_that_is_not_there_is_named():
    with pytest.raises(KeyError, match="99"):
        slides.page("# A\n\n## B\nfigure: 03-99\n\nNotes: x")
    with pytest.raises(KeyError, match="none"):
        slides.page("# A\n\n## B\nfigure: 03-02\n\nNotes: x")


def test_the_deck_asks_for_nothing_from_a_network():
    page = re.sub(r"data:image/png;base64,[^']+", "", slides.page())
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)
    assert "@import" not in page and "url(http" not in page


def test_a_formula_is_cut_to_what_can_be_drawn():
    tex = r"\boxed{\;a = \underbrace{\beta}_{\text{scale}} \Big( b \Big)\;}"
    assert slides.plain_tex(tex).split() == ["a", "=", r"\beta", "(", "b", ")"]
    with pytest.raises(ValueError, match="not closed"):
        slides.plain_tex(r"\boxed{a")


CHROMIUM = slides.chromium()


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_every_slide_fits_on_the_screen_and_on_paper(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    deck, *papers = slides.build(tmp_path)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(deck.as_uri())
        page.wait_for_function("() => window.Reveal?.isReady()")
        count = page.evaluate("Reveal.getTotalSlides()")
        for i in range(count):
            page.evaluate(f"Reveal.slide({i})")
            size = "(s => [s.scrollWidth, s.scrollHeight])(Reveal.getCurrentSlide())"
            width, height = page.evaluate(size)
            assert width <= 1280 and height <= 720, (i, width, height)
        browser.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    pages = [paper.read_bytes().count(b"/Type /Page\n") for paper in papers]
    assert pages == [count, 2 * count]


# --- archives ---


@pytest.fixture(scope="module")
def handed_out():
    return archives.participants("3h")


def test_the_participants_archive_holds_no_answer(handed_out):
    """By text: no solution's lines, in no file."""
    texts = {}
    for name, content in handed_out.items():
        if name.endswith((".ipynb", ".py", ".md", ".json")) and "embedded" not in name:
            text = content.decode()
            if name.endswith(".ipynb"):
                cells = nbformat.reads(text, as_version=4).cells
                text = "\n".join(cell.source for cell in cells)
            texts[name] = squeezed(text)
    assert not [n for n in texts if n.startswith(("solutions/", "tests/", "workshop/"))]
    for chapter, ids in plan.exercises_of("3h").items():
        notebook = short.cut_exercises(chapter, ids, solved=True)
        regions = [m for cell in notebook.cells for m in REGION.finditer(cell.source)]
        assert len(regions) >= len(ids)
        for region in regions:
            answer = squeezed("\n".join(region[0].splitlines()[1:-1]))
            assert not [name for name, text in texts.items() if answer in text], answer
    assert not [name for name, text in texts.items() if squeezed("### BEGIN SOLUTION\n") in text
                and name.startswith(("exercises", "notebooks"))]  # fmt: skip


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_packed_checks_judge_as_the_readable_ones_do(tmp_path):
    path = ROOT / "dpo_mini" / "course" / "checks" / "ch03.py"
    packed = tmp_path / "ch03.py"
    packed.write_text(sealing.sealed(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert "logsigmoid" in path.read_text("utf-8") and "logsigmoid" not in packed.read_text("utf-8")
    spec = importlib.util.spec_from_file_location("packed_ch03", packed)
    module = importlib.util.module_from_spec(spec)
    sys.modules["packed_ch03"] = module
    spec.loader.exec_module(module)
    for mine, other in zip(module.EXERCISES, checks.exercises("03")):
        assert [w.name for w in mine.listed] == [w.name for w in other.listed]
        for m, o in zip(mine.listed, other.listed):
            assert engine.examine(mine, m.answer, 3) == engine.examine(other, o.answer, 3), m.name
        assert engine.examine(mine, mine.truth, 3).solved


def test_the_same_sources_give_the_same_archive(handed_out, tmp_path):
    archives.write(handed_out, tmp_path / "one.zip")
    archives.write(dict(reversed(archives.participants("3h").items())), tmp_path / "other.zip")
    one, other = ((tmp_path / name).read_bytes() for name in ("one.zip", "other.zip"))
    assert one == other
    assert len(one) < 40e6


@pytest.mark.slow
def test_every_check_is_red_for_participants_and_green_for_the_teacher(handed_out, tmp_path):
    """Each archive is unpacked and judged by the checks that are in it."""
    wanted = {"participants": grading.EMPTY, "teacher": grading.SOLVED}
    files = {"participants": handed_out, "teacher": archives.teacher("3h", [])}
    ids = {id for ids in plan.exercises_of("3h").values() for id in ids}
    for name, state in wanted.items():
        archive, place = tmp_path / f"{name}.zip", tmp_path / name
        archives.write(files[name], archive)
        zipfile.ZipFile(archive).extractall(place)
        top = place / archives.TOP
        folder = "exercises" if name == "participants" else "solutions"
        command = [sys.executable, "-m", "dpo_mini.course.workshop.grading", folder]
        said = subprocess.run(
            command, cwd=top, env={**os.environ, "PYTHONPATH": str(top)},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        rows = [line for line in said.splitlines() if re.match(r"\d\d_", line)]
        marks = [mark for row in rows for mark in re.findall(r"  +([■x·!])", row)]
        assert marks == [grading.MARKS[state]] * len(ids), said


# --- where there is nothing installed ---


def test_the_container_and_binder_take_the_lock():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    (target,) = re.findall(r"^make (\S+)$", container["postCreateCommand"])
    makefile = (ROOT / "Makefile").read_text()
    assert f"$(VENV)/{target.removeprefix('.venv/')}:" in makefile
    assert "--constraint requirements.lock" in makefile
    script = (ROOT / "binder" / "postBuild").read_text()
    assert "--constraint requirements.lock --editable '.[lab]'" in script
    python = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    docker = (ROOT / ".devcontainer" / "Dockerfile").read_text()
    assert f"FROM python:{python}-slim" in docker
    subprocess.run(["bash", "-n", ROOT / "binder" / "postBuild"], check=True)


def test_the_guide_names_what_there_is():
    text = plan.GUIDE.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([\w./]+)\)", text):
        assert (plan.GUIDE.parent / path).exists(), path
    books = [nbformat.read(p, as_version=4) for p in plan.NOTEBOOKS.glob("*.ipynb")]
    ids = {cell.id for book in books for cell in book.cells}
    named = re.findall(r"`(\d\d-\w+)`", text)
    assert len(named) >= 8 and set(named) <= ids
    for module in re.findall(r"python -m (dpo_mini[\w.]+)", text):
        assert importlib.util.find_spec(module), module


# --- nbgrader ---


def python_with_nbgrader() -> str | None:
    """A Python that has nbgrader and the course: DPO_MINI_NBGRADER, or .venv-nbgrader."""
    own = ROOT / ".venv-nbgrader" / "bin" / "python"
    python = os.environ.get("DPO_MINI_NBGRADER") or (str(own) if own.exists() else None)
    if python:
        asked = [python, "-c", "import nbgrader, torch, dpo_mini"]
        python = python if subprocess.run(asked, capture_output=True).returncode == 0 else None
    return python


@pytest.mark.slow
@pytest.mark.skipif(
    not python_with_nbgrader(),
    reason="nbgrader has an environment of its own: set DPO_MINI_NBGRADER to its python",
)
def test_nbgrader_takes_every_chapter_from_release_to_grades(tmp_path):
    """Generated, released, fetched, handed in, collected, graded: all points, and none."""
    python, course, home = python_with_nbgrader(), tmp_path / "course", tmp_path / "home"
    exchange = tmp_path / "exchange"
    for folder in (course, home, exchange):
        folder.mkdir()
    exchange.chmod(0o777)
    wanted = os.environ.get("DPO_MINI_NBGRADER_CHAPTERS", "").split()
    names = nbgrader_course.prepare(course, wanted)
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "HOME": str(home)}

    def nbgrader(*arguments, folder=course):
        done = subprocess.run(
            [python, "-m", "nbgrader", *arguments, f"--Exchange.root={exchange}"],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr[-3000:])

    for name in names:
        nbgrader("generate_assignment", "--assignment", name, "--create")
        released = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
        ours = nbformat.read(ROOT / "exercises" / f"{name}.ipynb", as_version=4)
        assert [cell.source for cell in released.cells] == [cell.source for cell in ours.cells]
        nbgrader("release_assignment", name)
        nbgrader("fetch_assignment", name, "--course=dpo_mini", folder=home)
        shutil.copy(ROOT / "solutions" / f"{name}.ipynb", home / name)
        nbgrader("submit", name, "--course=dpo_mini", folder=home)
        nbgrader("collect", name)
        place = course / "submitted" / "empty" / name  # as a folder put there by hand
        place.mkdir(parents=True)
        shutil.copy(ROOT / "exercises" / f"{name}.ipynb", place)
        nbgrader("autograde", "--assignment", name, "--create")
    nbgrader("export")
    with (course / "grades.csv").open() as file:
        rows = {(r["assignment"], r["student_id"]): r for r in csv.DictReader(file)}
    (student,) = {name for _, name in rows} - {"empty"}  # the user who handed in
    for name in names:
        most = sum(e.difficulty for e in checks.exercises(name[:2]))
        right, empty = rows[name, student], rows[name, "empty"]
        assert float(right["score"]) == float(right["max_score"]) == most, right
        assert float(empty["score"]) == 0, empty
