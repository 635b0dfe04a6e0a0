"""The web edition in a browser: every page whole, nothing from elsewhere, and live pages whose
numbers are Python's.
"""

import functools
import html.parser
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import numpy as np
import pytest
import torch
from conftest import make_gpt2

from dpo_mini.course import widgets
from dpo_mini.embedded.eight_bits import pack, unpack
from dpo_mini.models import EMBEDDED_FOLDER, cooled, load_model
from dpo_mini.rewards import SentimentReward, load_prompts, load_reward

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
for package in ("sphinx", "myst_nb", "furo"):
    pytest.importorskip(package, reason="the site extra is not installed: pip install '.[site]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]  # built once
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install chromium")

MOST_SECONDS = 180  # for a build
MOST_BYTES = 16_000_000  # that the heaviest page loads
LIVE = ("every_beta", "bradley_terry", "tilting", "gradient_weighting")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Without torch, so that nothing can be executed, and without a network."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bare").mkdir()
    (folder / "bare" / "torch.py").write_text("raise ImportError('the site needs no torch')")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "site" / "build.py", folder / "html"],
        env={**os.environ, **nowhere, "PYTHONPATH": str(folder / "bare")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - began < MOST_SECONDS
    return folder / "html"


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, address):
    """`open_page(path, **options)`: a page of the site. What it asked of others, what was not
    found and what its scripts raised stands in `page.faults`, which must be empty at the end.
    """
    pages = []

    def start(path, width=1200, colours="light"):
        page = chromium.new_page(viewport={"width": width, "height": 850}, color_scheme=colours)
        page.set_default_timeout(60_000)
        page.faults, page.bytes = [], {}
        page.on("request", lambda r: local(r.url) or page.faults.append(r.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("response", lambda answer: received(page, answer))
        page.goto(f"{address}/{path}")
        pages.append(page)
        return page

    def local(url):
        return url.startswith((address, "data:", "blob:"))

    def received(page, answer):
        if answer.status >= 400 and not answer.url.endswith("favicon.ico"):
            page.faults.append(f"{answer.status} {answer.url}")
        page.bytes[answer.url] = int(answer.headers.get("content-length", 0))

    yield start
    faults = [fault for page in pages for fault in page.faults]
    for page in pages:
        page.close()
    assert not faults


class Links(html.parser.HTMLParser):
    """The anchors that a page has, the links that it follows and the files that it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.followed, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.anchors |= {named[key] for key in ("id", "name") if named.get(key)}
        if tag == "a" and "href" in named:
            self.followed.append(named["href"])
        elif tag in ("img", "script", "source", "iframe") and named.get("src"):
            self.loaded.append(named["src"])
        elif tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload", "search"):
            self.loaded.append(named["href"])


def broken_links(site) -> list[str]:
    """Links into nothing, and files loaded from another server, of all pages."""
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    broken = []
    for path, links in pages.items():
        for link in links.followed + links.loaded:
            elsewhere = urlsplit(link).scheme or link.startswith("//")
            if elsewhere and (link in links.followed or link.startswith("data:")):
                continue
            file, anchor = urldefrag(link)
            target = (path.parent / unquote(file.split("?")[0])).resolve() if file else path
            found = not elsewhere and target.is_file()
            if found and anchor and target in pages:
                found = unquote(anchor) in pages[target].anchors
            if not found:
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


def test_every_page_is_on_the_site_and_no_solution(site):
    stems = {f"{p.parent.name}/{p.stem}" for p in ROOT.glob("notebooks/[0-9]*.ipynb")}
    stems |= {f"{p.parent.name}/{p.stem}" for p in ROOT.glob("exercises/[0-9]*.ipynb")}
    stems |= {f"notebooks/{name}" for name in ("cheat_sheet", "glossary", "references")}
    stems |= {f"live/{name}" for name in LIVE}
    missing = [stem for stem in stems if not (site / f"{stem}.html").is_file()]
    assert len(stems) > 30 and not missing
    contents = (site / "index.html").read_text(encoding="utf-8")
    assert not [stem for stem in stems if f'href="{stem}.html"' not in contents]
    text = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    assert "BEGIN SOLUTION" not in text and "YOUR CODE HERE" in text
    chapter = (site / "notebooks" / "02_rlhf_objective.html").read_text(encoding="utf-8")
    assert "the one max" in chapter  # a stored output
    assert "prev" in chapter and "next" in chapter and "theme-toggle" in chapter
    assert not re.search("href=[^ ]*solutions/", text)


def test_no_link_leads_into_nothing(site, tmp_path):
    assert not broken_links(site)
    (tmp_path / "a.html").write_text(
        '<a href="b.html">1</a><a href="#no">2</a><a id="yes" href="#yes">3</a>'
        '<script src="https://example.org/a.js"></script>'
    )
    assert len(broken_links(tmp_path)) == 3  # the checker sees what it is to see


@needs_chromium
def test_every_page_is_whole_on_a_phone_and_asks_no_other_server(site, address, open_page):
    page = open_page("index.html", width=390)
    for path in sorted(site.rglob("*.html")):
        page.goto(f"{address}/{path.relative_to(site)}")
        page.evaluate("() => window.MathJax?.startup?.promise")
        page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
        state = page.evaluate(
            """() => ({
              over: document.documentElement.scrollWidth - innerWidth,
              figures: [...document.querySelectorAll('article img, article svg')]
                .filter(f => !f.closest('.MathJax, mjx-container, .headerlink'))
                .filter(f => f.getBoundingClientRect().right > innerWidth + 1
                          || (f.tagName === 'IMG' && f.complete && !f.naturalWidth)).length,
              unread: document.querySelectorAll('mjx-merror, [data-mml-node=merror]').length,
              plain: [...document.querySelectorAll('.math')].filter(
                m => !m.querySelector('mjx-container')).length,
            })"""
        )
        assert state == {"over": 0, "figures": 0, "unread": 0, "plain": 0}, (path.name, state)


@needs_chromium
def test_the_search_finds_a_word(open_page):
    page = open_page("search.html?q=Plackett")
    page.wait_for_selector("ul.search li a")
    assert page.locator("ul.search li a").count() >= 1


@needs_chromium
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_no_serious_finding_of_an_accessibility_audit(open_page, colours):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    script = Path(axe.__file__).parent / "axe.min.js"
    pages = ["index", "notebooks/02_rlhf_objective", "notebooks/08_train_gpt2", "notebooks/README"]
    pages += ["exercises/01_preferences", *(f"live/{name}" for name in LIVE)]
    findings = []
    for path in pages:
        page = open_page(f"{path}.html", colours=colours)
        page.evaluate("() => window.MathJax?.startup?.promise")
        if path.endswith("every_beta"):
            written(page)
        page.add_script_tag(path=script)
        report = page.evaluate("() => axe.run()")
        findings += [
            (path, v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:300])
            for v in report["violations"]
            if v["impact"] in ("serious", "critical")
        ]
    assert not findings


# The pictures


def numbers_and_words(svg: str) -> tuple[list[float], list[str]]:
    """The coordinates of a picture, and what is written in it."""
    words = re.findall(r">([^<>]+)<", svg)
    bare = re.sub(r">[^<>]+<|#[0-9A-Fa-f]{6}", "><", svg)
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", bare)], words


@needs_chromium
@pytest.mark.parametrize(
    "name, values, drawn",
    [
        ("bradleyTerry", {"reward_a": a, "reward_b": b}, widgets.bradley_terry(a, b))
        for a, b in ((1.0, 0.0), (-2.9, 3.0), (0.4, 2.2))
    ]
    + [("tilting", {"beta": b}, widgets.tilting(b)) for b in (0.05, 0.7, 5.0)]
    + [("gradientWeighting", {"beta": b}, "") for b in (0.03, 0.1, 1.0)],
)
def test_a_picture_is_pythons(open_page, name, values, drawn):
    page = open_page("live/tilting.html")
    margins = [row["margin"] for row in shipped_margins()]
    drawn = drawn or widgets.gradient_weighting(values["beta"], margins)
    svg = page.evaluate(
        "async ([name, values, margins]) =>"
        " (await import('/_static/live/pictures.js'))[name](values, margins)",
        [name, values, margins],
    )
    ours, said = numbers_and_words(svg)
    theirs, wanted = numbers_and_words(drawn)
    assert said == wanted
    assert len(ours) == len(theirs) and np.allclose(ours, theirs, atol=0.11)


def shipped_margins() -> list[dict]:
    text = (EMBEDDED_FOLDER / "policy" / "margins.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@needs_chromium
@pytest.mark.parametrize("name", ["bradley_terry", "tilting", "gradient_weighting"])
def test_a_slider_moves_its_picture(open_page, name):
    page = open_page(f"live/{name}.html", width=390)
    page.wait_for_selector(".live .view svg")
    before = page.inner_html(".live .view")
    slider = page.locator(".live input[type=range]").first
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.inner_html(".live .view") != before
    shot(page, f"{name}-phone")


# The models


def shot(page, name: str) -> None:
    artefacts = ROOT / "runs" / "site"
    artefacts.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=artefacts / f"{name}.png", full_page=True)


def written(page) -> dict:
    """Wait until the text stands; what the worker said of it."""
    page.wait_for_function(
        "() => ['done', 'error'].includes(document.getElementById('every-beta').dataset.state)"
    )
    assert page.get_attribute("#every-beta", "data-state") == "done", page.inner_text(".status")
    return page.evaluate("() => document.getElementById('every-beta').result")


def ask(page, prompt=None, strength=None, seed=None) -> dict:
    for name, value in (("prompt", prompt), ("strength", strength), ("seed", seed)):
        if value is not None:
            page.evaluate(
                "([name, value]) => { const control = document.querySelector(`[name=${name}]`);"
                " control.value = value; control.dispatchEvent(new Event('input')); }",
                [name, str(value)],
            )
    return written(page)


@pytest.fixture(scope="module")
def models(site):
    """Reference and policy as the site stores them, restored by numpy and run by torch."""
    from safetensors.numpy import load_file

    folder = site / "_static" / "live" / "weights"
    weights = unpack(load_file(folder / "reference.safetensors"))
    difference = unpack(load_file(folder / "difference.safetensors"))
    (reference, tokenizer), (policy, _) = load_model(), load_model()
    with torch.no_grad():
        for model, more in ((reference, 0), (policy, 1)):
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name] + more * difference[name]))
    return reference, policy, tokenizer


@torch.no_grad()
def mixture(reference, policy, ids, strength, seed, tokens=32) -> tuple[list, list, float]:
    """Token ids, their log-probabilities and the KL of a text, by torch, without a cache."""
    u = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    drawn, logps, kl = [], [], 0.0
    for draw in u:
        ref, ours = (m(torch.tensor([ids + drawn])).logits[0, -1] for m in (reference, policy))
        mixed = (ref + strength * (ours - ref)).double().log_softmax(-1)
        kl += (mixed.exp() * (mixed - ref.double().log_softmax(-1))).sum().item()
        cumulative = mixed.exp().cumsum(-1)
        drawn.append(int((cumulative <= draw * cumulative[-1]).sum()))
        logps.append(mixed[drawn[-1]].item())
        if drawn[-1] == reference.config.eos_token_id:
            break
    return drawn, logps, kl


@needs_chromium
def test_a_text_of_every_beta_is_pythons(open_page, models):
    reference, policy, tokenizer = models
    reward = load_reward()
    reward = SentimentReward(reference.transformer, tokenizer, reward.head)
    page = open_page("live/every_beta.html")
    written(page)
    prompts = [*load_prompts("held_out")[:3], ""]
    for prompt, strength, seed in zip(prompts, (0.0, 0.5, 1.0, -0.5), (0, 7, 11, 4294967295)):
        result = ask(page, prompt, strength, seed)
        ids = tokenizer(prompt)["input_ids"]
        drawn, logps, kl = mixture(reference, policy, ids, strength, seed)
        assert [token["id"] for token in result["tokens"]] == drawn
        assert np.allclose([t["logp"] for t in result["tokens"]], logps, atol=1e-3)
        assert result["promptIds"] == ids and result["kl"] == pytest.approx(kl, abs=1e-3)
        text = tokenizer.decode(drawn, skip_special_tokens=True)
        assert result["text"] == text
        assert result["logit"] == pytest.approx(reward([prompt + text]).item(), abs=1e-3)
        shown = page.inner_text(".numbers")
        assert f"KL from the reference = {kl:.2f}" in shown


@needs_chromium
def test_strength_zero_and_one_are_the_librarys_own_samples(open_page, models):
    """Not another sampler beside ours: with one prompt and a seed, `sample_completions`."""
    from dpo_mini.sampling import sample_completions

    page = open_page("live/every_beta.html")
    written(page)
    for strength, model in ((0, models[0]), (1, models[1])):
        result = ask(page, "The plot", strength, 5)
        (completion,) = sample_completions(model, models[2], ["The plot"], 1, 32, seed=5)[0]
        assert [token["id"] for token in result["tokens"]] == completion.ids


@needs_chromium
def test_the_slider_moves_the_text_while_the_page_stays_awake(open_page):
    began = time.monotonic()
    page = open_page("live/every_beta.html")
    page.wait_for_selector(".text span")
    assert time.monotonic() - began < 5  # seconds to the first text
    first = written(page)
    assert sum(page.bytes.values()) < MOST_BYTES
    page.evaluate(
        """() => { window.longest = 0; let last = performance.now();
          const beat = () => { const now = performance.now();
            window.longest = Math.max(window.longest, now - last);
            last = now; setTimeout(beat, 5); };
          beat(); }"""
    )
    slider = page.locator("#strength")
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    moved = written(page)
    assert page.inner_text("output[for=strength]") == "0.60"
    assert "0.45 / 0.60 = 0.75" in page.inner_text(".meaning")
    assert moved["text"] != first["text"] and moved["kl"] < first["kl"]
    assert page.evaluate("() => window.longest") < 500  # milliseconds without an answer
    assert page.locator(".text .new").count() > 0
    shot(page, "every-beta")
    page.fill("[name=prompt]", "word " * 39)
    written(page)
    page.evaluate("() => document.querySelector('[name=prompt]').removeAttribute('maxlength')")
    page.fill("[name=prompt]", "word " * 200)
    page.wait_for_function("() => document.getElementById('every-beta').dataset.state === 'error'")
    assert "please shorten it" in page.inner_text(".status")


@needs_chromium
def test_the_tokenizer_is_pythons_on_any_text(open_page, tokenizer):
    generator = random.Random(0)
    ranges = [(32, 127), (32, 127), (0, 0x300), (0x300, 0xD800), (0xE000, 0x20000)]
    texts = [
        "It's 12,345.67 — naïve Café déjà vu!  Two  spaces,\na line\tand a tab; 日本語 🙂 <b>x</b>",
        "", " ", "a<|endoftext|>b<|endoftext|>", "they'll WE'LL 'tis", "\x85x\x85 \ufeff\u3000a",
    ]  # fmt: skip
    for _ in range(3000):
        length = generator.randrange(1, 40)
        codes = (generator.choice([*ranges, (32, 33), (39, 40)]) for _ in range(length))
        texts.append("".join(chr(generator.randrange(*code)) for code in codes))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    decoded = [tokenizer.decode(row[1:-1], skip_special_tokens=True) for row in ids]
    page = open_page("live/every_beta.html")
    ours = page.evaluate(
        """async ([texts, ids]) => {
          const { Tokenizer } = await import('/_static/live/tokenizer.js');
          const file = await (await fetch('/_static/live/weights/tokenizer.json')).json();
          const tokenizer = new Tokenizer(file);
          return [texts.map(t => tokenizer.encode(t)),
                  ids.map(row => tokenizer.decode(row.slice(1, -1)))]; }""",
        [texts, ids],
    )
    assert ours[0] == ids and ours[1] == decoded


@needs_chromium
def test_the_random_numbers_are_torchs(open_page):
    page = open_page("live/tilting.html")
    for seed in (0, 1, 12345, 2**32 - 1):
        ours = page.evaluate(
            "async (seed) => (await import('/_static/live/random.js')).uniforms(seed, 700)", seed
        )
        assert ours == torch.rand(700, generator=torch.Generator().manual_seed(seed)).tolist()


@needs_chromium
@pytest.mark.parametrize(
    "layers, width, activation, temperature",
    [(5, 32, "gelu_pytorch_tanh", 1.0), (3, 48, "gelu", 0.7), (1, 64, "gelu_new", 1.3)],
)
def test_another_shape_is_read_from_its_configuration(
    site, open_page, layers, width, activation, temperature
):
    from safetensors.numpy import save_file

    torch.manual_seed(layers)
    model = make_gpt2(vocabulary=101, width=width, layers=layers, context=40)
    model.config.activation_function = activation
    model = cooled(type(model)(model.config).eval(), temperature)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stored = pack({name: p.detach().numpy() for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(unpack(stored)[name]))
        ids = torch.randint(0, 101, (1, 40))
        logps = model(ids).logits[0].log_softmax(-1)
    folder = site / "trial"
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    ours = open_page("live/tilting.html").evaluate(
        """async (ids) => {
          const { GPT2, Reading } = await import('/_static/live/gpt2.js');
          const { readSafetensors } = await import('/_static/live/weights.js');
          const { logSoftmax } = await import('/_static/live/mixture.js');
          const config = await (await fetch('/trial/config.json')).json();
          const buffer = await (await fetch('/trial/model.safetensors')).arrayBuffer();
          const reading = new Reading(new GPT2(config, readSafetensors(buffer)));
          return ids.map((_, i) => [...logSoftmax(reading.logitsAfter(ids.slice(0, i + 1)))]); }""",
        ids[0].tolist(),
    )
    assert np.allclose(ours, logps.numpy(), atol=1e-3)
