"""What the notebooks stand on: pictures with the right numbers, outputs that fit the code."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini import exact
from dpo_mini.course import execute, plots, svg, widgets

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_executed_and_asserts_what_it_claims(path):
    notebook = nbformat.read(path, as_version=4)
    assert execute.is_current(notebook), "its code changed: run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    source = "\n".join(cell.source for cell in code)
    asserted = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert)]
    assert len(asserted) >= 3
    assert not [n for n in asserted if isinstance(n.test, (ast.Constant, ast.Tuple))]
    kinds = {"image/png", "image/svg+xml"}
    figures = [o for cell in code for o in cell.outputs if kinds & set(o.get("data", {}))]
    assert len(figures) >= 2
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(work|home|root|Users)/", text)
    assert len(text) < 1_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_what_it_gives_and_takes(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    for word in ("You will be able to", "Takes", "GB", "Needs"):
        assert word in opening


def test_every_page_leads_on_and_its_answers_are_folded():
    from dpo_mini.course import pages

    titles = {path: pages.title(path) for path in NOTEBOOKS}
    for i, path in enumerate(NOTEBOOKS):
        notebook = nbformat.read(path, as_version=4)
        links = pages.navigation(path, NOTEBOOKS, titles)
        assert pages.finished(notebook, links) == notebook, "run python -m dpo_mini.course.pages"
        assert notebook.cells[-1].source == links
        follows = NOTEBOOKS[i + 1].name if i + 1 < len(NOTEBOOKS) else "cheat_sheet.md"
        assert f"]({follows})" in links
        for cell in notebook.cells:
            if "answer" in cell.metadata.get("tags", []):
                assert cell.metadata["jupyter"]["outputs_hidden"] and cell.cell_type == "code"


def test_no_stored_output_needs_a_kernel():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                kinds = output.get("data", {})
                assert "application/vnd.jupyter.widget-view+json" not in kinds, path.name


def test_every_citation_leads_to_the_bibliography():
    listed = (NOTEBOOKS[0].parent / "references.md").read_text("utf-8")
    root = NOTEBOOKS[0].parents[1]
    places = [*NOTEBOOKS, *root.glob("*.md"), *root.glob("notebooks/*.md")]
    places += [*root.glob("dpo_mini/**/*.py"), *root.glob("solutions/*.ipynb")]
    for path in places:
        text = path.read_text("utf-8")
        for identifier in re.findall(r"arXiv[:\s]*(\d{4}\.\d{4,5})", text):
            assert f"arxiv.org/abs/{identifier}" in listed, (path.name, identifier)


def symbol_table(text: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| symbol |"))
    rows = lines[start:]
    return rows[: next((i for i, line in enumerate(rows) if not line.startswith("|")), len(rows))]


def test_symbols_mean_the_same_in_the_first_chapters_and_on_the_cheat_sheet():
    folder = NOTEBOOKS[0].parent
    pages = {path.name[:2]: nbformat.read(path, as_version=4) for path in NOTEBOOKS[:6]}
    words = {n: "\n".join(cell.source for cell in page.cells) for n, page in pages.items()}
    said = symbol_table(words["02"])
    whole = symbol_table((folder / "cheat_sheet.md").read_text("utf-8"))
    assert len(said) == 10 and said == whole[:10]
    words["02"] = words["02"].replace("\n".join(said), "").replace(r"the margin $\Delta$ in", "")
    for n, text in words.items():
        assert r"\Delta" not in text or n in ("04", "05"), n  # 04 defines the margin
        assert r"\lambda" not in text or n == "02", n  # the multiplier of its own page
        assert r"\gamma" not in text and not re.search(r"(?<!hat )r_[wl]\b", text), n


def test_a_package_that_is_missing_or_old_is_a_sentence():
    from dpo_mini.course import packages

    asked = ["torch>=99", 'no-such-package>=1; extra == "lab"', "sympy>=1"]
    old, missing = packages.package_problems([*asked, 'no-such-tool; extra == "test"'])
    assert old.startswith(f"torch {torch.__version__} is here, and >=99 is needed")
    assert missing.startswith("no-such-package is missing: ") and "make lab" in missing


def test_the_course_names_what_its_project_does_not_find(monkeypatch):
    from dpo_mini.course import packages

    packages.require_packages()
    monkeypatch.setattr(packages.metadata, "requires", lambda name: ["no-such-package"])
    with pytest.raises(ImportError, match="no-such-package is missing"):
        packages.require_packages()


def test_links_between_notebooks_lead_somewhere():
    for path in [*NOTEBOOKS, *NOTEBOOKS[0].parent.glob("*.md")]:
        for target in re.findall(r"\]\(([\w./-]+\.(?:ipynb|md))\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), (path.name, target)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 5.0])
def test_pictures_are_well_formed_and_say_the_right_numbers(beta):
    optimum = exact.optimal_policy(widgets.REFERENCE, widgets.REWARDS, beta)
    kl = exact.kl(optimum, widgets.REFERENCE).item()
    for draw in (widgets.tilting, widgets.frontier, widgets.bradley_terry):
        ElementTree.fromstring(draw(beta))
    assert f"KL = {kl:.3f}" in widgets.tilting(beta) and f"KL = {kl:.3f}" in widgets.frontier(beta)
    gain = exact.expectation(optimum, widgets.REWARDS).item()
    assert f"E[r] = {gain:.3f}" in widgets.tilting(beta)
    margins = [-12.0, 0.0, 20.0]
    drawn = widgets.gradient_weighting(beta, margins)
    ElementTree.fromstring(drawn)
    weight = torch.sigmoid(-beta * torch.tensor(margins)).mean().item()
    assert f"{weight:.3f} on average" in drawn


def linear(colour: str) -> torch.Tensor:
    """A colour's red, green and blue as light, each in [0, 1] (sRGB)."""
    values = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]).double()
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio: 1 for equal colours, 21 for black on white."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722]).double()
    darker, lighter = sorted((linear(c) @ weights).item() for c in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def test_letters_in_pictures_stand_out_from_the_paper():
    drawn = [widgets.tilting(1.0), widgets.frontier(1.0), widgets.bradley_terry(1.0)]
    drawn.append(widgets.gradient_weighting(0.1, [-3.0, 5.0]))
    colours = set(re.findall(r"<text [^>]*fill='(#\w+)'", "".join(drawn)))
    assert len(colours) >= 3
    for colour in colours:
        assert contrast(colour, svg.PAPER) >= 4.5, colour


LETTERS = ("text", "annotate", "set_title", "set_xlabel", "set_ylabel", "suptitle", "bar_label")


def letters(source: str) -> list[str]:
    """The colours in which code that draws with matplotlib writes."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    named = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in LETTERS]
    given = [k.value for call in named for k in call.keywords if k.arg in ("color", "c")]
    return [ast.unparse(colour) for colour in given]


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_letters_in_figures_stand_out_from_the_paper(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for colour in letters(cell.source) if cell.cell_type == "code" else ():
            code = colour.strip("'")
            code = getattr(plots, code.rpartition(".")[2], code)
            assert contrast(code, "#ffffff") >= 4.5, f"{colour} in {cell.source}"
    assert letters("axis.text(1, 2, 'x', color=plots.ORANGE)") == ["plots.ORANGE"]
    assert contrast(plots.ORANGE, "#ffffff") < 4.5


# Viénot, Brettel and Mollon 1999: what light becomes without the middle or the long cones.
BLIND = {
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_the_colours_of_figures_differ_for_colour_blind_readers(kind):
    seen = torch.tensor(BLIND[kind]).double()
    palette = [plots.BLUE, plots.ORANGE, plots.GREEN, plots.VERMILION]
    for i, one in enumerate(palette):
        for other in palette[:i]:
            apart = (seen @ (linear(one) - linear(other))).norm()
            assert apart > 0.15, (one, other)  # two common reds and greens: 0.01 to 0.07


def test_bradley_terry_says_the_probability():
    assert "= 0.731" in widgets.bradley_terry(1.0, 0.0) == widgets.bradley_terry(3.0, 2.0)


def test_the_most_and_least_weighted_pairs_are_shown_and_escaped():
    texts = [("easy <b>", "easy l"), ("hard w", "hard l"), ("neutral w", "neutral l")]
    drawn = widgets.gradient_weighting(0.1, [30.0, -30.0, 0.0], texts)
    most, least = drawn.index("hard w"), drawn.index("easy &lt;b&gt;")
    assert drawn.index("Weighs most") < most < drawn.index("Weighs least") < least
    assert "neutral" not in drawn


def test_a_slider_moves_the_picture():
    box = widgets.explore(widgets.tilting, beta=(0.05, 5, 0.05, 1.0))
    slider, view = box.children
    assert slider.tooltip
    before = view.value
    slider.value = 0.2
    assert view.value != before and view.value == widgets.tilting(0.2)


def test_without_a_kernel_the_page_shows_three_pictures(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda what, **_: shown.append(what))
    widgets.explore(widgets.tilting, still=(0.3, 1.0, 3.0), beta=(0.05, 5, 0.05, 1.0))
    still, box = shown
    ElementTree.fromstring(still["image/svg+xml"])
    for beta in (0.3, 1.0, 3.0):
        assert f"beta = {beta:.2f}" in still["image/svg+xml"]
    assert len(box.children) == 2


def test_labelling_by_hand_counts_agreement_wherever_the_text_stands():
    from dpo_mini.data import PreferencePair

    pairs = [PreferencePair("A film", f" good{i} <i>", f" bad{i}") for i in range(6)]
    box, choices = widgets.label_yourself(pairs, seed=1)
    text, buttons = box.children
    sides = set()
    for i in range(6):
        assert "&lt;i&gt;" in text.value and f"Pair {i + 1} of 6" in text.value
        chosen_is_left = text.value.index(f"good{i}") < text.value.index(f"bad{i}")
        sides.add(chosen_is_left)
        buttons.children[0 if chosen_is_left == (i < 4) else 1].click()  # right four times
    assert choices == [True] * 4 + [False] * 2 and sides == {True, False}
    assert "4 of 6" in text.value and buttons.children[0].disabled


def test_stored_pictures_are_made_smaller_and_stay_pictures():
    import base64
    import io

    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(picture, "PNG")
    output = nbformat.v4.new_output(
        "display_data", {"image/png": base64.b64encode(picture.getvalue()).decode()}
    )
    execute.shrink(output)
    small = base64.b64decode(output.data["image/png"])
    assert len(small) < len(picture.getvalue())
    assert Image.open(io.BytesIO(small)).size == (64, 48)
