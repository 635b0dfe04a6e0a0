"""A learner's own tools: a notebook run by JupyterLab and by Voila, the beta slider moved."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_mini import exact
from dpo_mini.course import widgets

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one browser and one server at a time
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium"),
]

RUN_ALL = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  await app.commands.execute('notebook:run-all-cells');
}"""


@pytest.fixture
def serve(tmp_path):
    """Start a server of notebooks: `serve(module, *arguments)` returns its address."""
    servers = []

    def start(module, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", module, "--no-browser", *arguments]
        command = [str(part).format(port=port) for part in command]
        servers.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        )
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            assert servers[-1].poll() is None, f"{module} ended before it answered"
            time.sleep(0.5)
        raise TimeoutError(f"{module} did not answer")

    def kill():
        """End the last server and its kernels at once, as a power cut would."""
        import psutil

        server = servers.pop()
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()

    start.kill = kill
    yield start
    for server in servers:
        server.terminate()
        server.wait()


@pytest.fixture
def page():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def move_beta_and_compare(page, name):
    """Ten steps of the slider to the right; the KL in the picture must be the exact one."""
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.wait_for()
    picture = page.locator(".widget-html svg").first
    assert "beta = 1.00" in picture.text_content()
    handle.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.widget-html svg').textContent.includes('beta = 1.50')"
    )
    said = float(re.search(r"KL = ([\d.]+)", picture.text_content())[1])
    optimum = exact.optimal_policy(widgets.REFERENCE, widgets.REWARDS, 1.5)
    assert said == pytest.approx(exact.kl(optimum, widgets.REFERENCE).item(), abs=6e-4)
    artefacts = ROOT / "runs" / "browser"
    artefacts.mkdir(parents=True, exist_ok=True)
    picture.scroll_into_view_if_needed()
    page.screenshot(path=artefacts / f"{name}.png")


@pytest.fixture
def lab(serve, tmp_path):
    """The address of a JupyterLab that serves a copy of the notebooks."""
    notebooks = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    pages = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    pages.mkdir()
    whole = '{"windowingMode": "none"}'  # so that cells below the window are there, too
    (pages / "tracker.jupyterlab-settings").write_text(whole)
    return serve(
        "jupyterlab", "--expose-app-in-browser", "--allow-root", "--ServerApp.port={port}",
        "--ServerApp.token=", f"--ServerApp.root_dir={notebooks}",
        JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "settings"),
    )  # fmt: skip


def test_a_fresh_page_shows_its_pictures_and_opens_a_folded_answer(lab, page):
    page.goto(f"{lab}/lab/tree/05_exact_world.ipynb")
    page.wait_for_function(  # stored, since nothing has been run; no other figure is so wide
        "() => [...document.querySelectorAll('.jp-OutputArea-output img')]"
        ".some(picture => picture.naturalWidth > 1400)"
    )
    folded = page.locator(".jp-OutputPlaceholder")
    before = folded.count()
    assert before >= 1 and "Error displaying widget" not in page.locator("body").text_content()
    folded.first.evaluate("element => element.click()")
    page.wait_for_function(
        f"() => document.querySelectorAll('.jp-OutputPlaceholder').length === {before - 1}"
    )


def test_the_beta_slider_of_jupyterlab_moves_the_picture(lab, page):
    page.goto(f"{lab}/lab/tree/02_rlhf_objective.ipynb")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context")
    page.evaluate(RUN_ALL)
    move_beta_and_compare(page, "jupyterlab")


def test_the_beta_slider_of_voila_moves_the_picture(serve, page, tmp_path):
    pytest.importorskip("voila", reason="voila is not installed")
    notebook = shutil.copy(ROOT / "notebooks" / "02_rlhf_objective.ipynb", tmp_path)
    address = serve("voila", notebook, "--port={port}")
    page.goto(address)
    move_beta_and_compare(page, "voila")


LABELLING = """
from pathlib import Path
from dpo_mini.course.labelling import labelling_page
from dpo_mini.data import PreferencePair
bad = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"
pairs = [PreferencePair(f"Film {i} {bad}", f" good{i} {bad}", f" bad{i} {bad}") for i in range(20)]
page = labelling_page(pairs, Path(FOLDER) / "mine.jsonl", question="Which one? " + bad)
page.box
"""


def test_labelling_by_keyboard_alone_survives_a_kill(serve, page, tmp_path):
    import nbformat

    from dpo_mini.data import preference_pairs, read_rows

    pytest.importorskip("voila", reason="voila is not installed")
    code = LABELLING.replace("FOLDER", repr(str(tmp_path)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    path, labels = tmp_path / "label.ipynb", tmp_path / "mine.jsonl"
    nbformat.write(notebook, path)

    def label(keys, begin):
        """Open the page, reach the box by the tabulator, press the keys one by one."""
        page.goto(serve("voila", path, "--port={port}", PYTHONPATH=str(ROOT)))
        page.locator("text=Pair").first.wait_for()
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.tagName") == "INPUT":
                break
        for n, key in enumerate(keys, start=begin):
            wanted = f"Pair {n} of"
            page.wait_for_function(f"document.body.innerText.includes('{wanted}')")
            page.wait_for_timeout(400)  # as long as a very fast reader
            page.keyboard.press(key)
        after = f"Pair {begin + len(keys)} of"
        page.wait_for_function(f"document.body.innerText.includes('{after}')")
        assert page.evaluate("window.ran") is None, "a text ran as HTML"
        assert page.locator("td").count() == 2

    label("12312", 1)
    rows = read_rows(labels)
    assert [row["verdict"] for row in rows] == ["left", "right", "tie", "left", "right"]
    serve.kill()
    label("142", 6)
    after = read_rows(labels)
    assert after[:5] == rows and [r["verdict"] for r in after[5:]] == ["left", "skip", "right"]
    assert len(preference_pairs(read_rows(tmp_path / "mine.pairs.jsonl"))) >= 5
    artefacts = ROOT / "runs" / "browser"
    artefacts.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=artefacts / "labelling.png")
