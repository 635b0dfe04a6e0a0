"""A learner's own tools: JupyterLab in Chromium, a notebook run, the beta slider moved."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dpo_mini import exact
from dpo_mini.course import widgets

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
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
def lab(tmp_path):
    """JupyterLab on copies of the notebooks; yields its address."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", "--ServerApp.token=", "--ServerApp.allow_root=True"]
    command += [f"--ServerApp.root_dir={tmp_path / 'notebooks'}"]
    command += ["--LabApp.news_url=", "--ServerApp.disable_check_xsrf=True"]
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


def test_the_beta_slider_of_jupyterlab_moves_the_picture(lab):
    artefacts = ROOT / "runs" / "browser"
    artefacts.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(f"{lab}/lab/tree/02_rlhf_objective.ipynb")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context")
        page.evaluate(RUN_ALL)
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
        picture.scroll_into_view_if_needed()
        page.screenshot(path=artefacts / "beta_slider.png")
        browser.close()
    optimum = exact.optimal_policy(widgets.REFERENCE, widgets.REWARDS, 1.5)
    assert said == pytest.approx(exact.kl(optimum, widgets.REFERENCE).item(), abs=6e-4)
