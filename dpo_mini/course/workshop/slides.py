"""The workshop's slides: the notebooks' own figures, formulas and outputs, as stored.

    python -m dpo_mini.course.workshop.slides FOLDER    # slides.html, and PDF where Chromium is

workshop/slides.md has the text of each slide and what to say. A line "figure: 03-06" shows the
figure of the cell with that id, "figure: 02-11 2x2:4" the fourth panel of its two rows of two,
so that the last row can read it; "output:" its text, "formula:" the first displayed formula of a
text cell. The page is one file and needs no network. The key S opens the speaker's notes.
"""

import base64
import html
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat

from dpo_mini.course.workshop import plan

SOURCE, REVEAL = plan.ROOT / "workshop" / "slides.md", plan.ROOT / "workshop" / "reveal"
KINDS = ("figure", "output", "formula")
MOST_LINES, MOST_COLUMNS = 16, 92  # of an output that the last row can read


class Slide(NamedTuple):
    title: str
    shown: tuple[tuple[str, str], ...]  # (kind, cell id)
    lines: tuple[str, ...]
    notes: str


def slides(text: str) -> list[Slide]:
    """The slides that slides.md describes."""
    found = []
    for block in re.split(r"^#{1,2} ", text, flags=re.M)[1:]:
        title, _, rest = block.partition("\n")
        body, _, notes = rest.partition("\nNotes:")
        rows = [row.strip() for row in body.splitlines() if row.strip()]
        pairs = [tuple(row.split(": ", 1)) for row in rows if row.split(": ")[0] in KINDS]
        lines = [row for row in rows if row.split(": ")[0] not in KINDS]
        found.append(Slide(title.strip(), tuple(pairs), tuple(lines), notes.strip()))
    return found


def cell(id: str):
    """The stored cell of an id such as "03-06"."""
    notebook = nbformat.read(plan.notebook_path(id[:2]), as_version=4)
    for found in notebook.cells:
        if found.id == id:
            return found
    raise KeyError(f"slides.md asks for the cell {id}, which notebook {id[:2]} does not have")


def picture(id: str) -> str:
    """The PNG of a cell, in base64: its stored figure, or the panel of it that is asked for."""
    id, _, panel = id.partition(" ")
    for output in cell(id).get("outputs", []):
        if "image/png" in output.get("data", {}):
            stored = output["data"]["image/png"].replace("\n", "")
            return cropped(stored, panel) if panel else stored
    raise KeyError(f"slides.md asks for a figure of the cell {id}, which has none")


def cropped(stored: str, panel: str) -> str:
    """Panel k of rows x columns, "2x2:4", counted as one reads."""
    from PIL import Image

    rows, columns, k = (int(n) for n in re.fullmatch(r"(\d)x(\d):(\d)", panel).groups())
    whole = Image.open(io.BytesIO(base64.b64decode(stored))).convert("RGB")
    row, column = divmod(k - 1, columns)
    left, right = (blank(whole, (column + i) / columns, upright=True) for i in (0, 1))
    top, bottom = (blank(whole, (row + i) / rows, upright=False) for i in (0, 1))
    part = io.BytesIO()
    whole.crop((left, top, right, bottom)).save(part, "PNG")
    return base64.b64encode(part.getvalue()).decode()


def blank(whole, share: float, upright: bool) -> int:
    """The line without ink that is nearest to a share of the width or height: panels end there."""
    import numpy as np

    dark = (np.asarray(whole.convert("L")) < 200).any(axis=0 if upright else 1)
    nominal, length = round(share * len(dark)), len(dark)
    near = [i for i in range(length) if not dark[i] and abs(i - nominal) < 0.09 * length]
    return nominal if share in (0, 1) or not near else min(near, key=lambda i: abs(i - nominal))


def printed(id: str) -> str:
    """What a cell printed, cut to what fits on a slide."""
    text = "".join(o.text for o in cell(id).get("outputs", []) if o.get("name") == "stdout")
    if not text:
        raise KeyError(f"slides.md asks for the output of the cell {id}, which printed nothing")
    rows = [row[:MOST_COLUMNS] for row in text.rstrip().splitlines()]
    return "\n".join(rows[:MOST_LINES])


def formula(id: str) -> str:
    """The first displayed formula of a text cell, as TeX."""
    found = re.search(r"\$\$(.+?)\$\$", cell(id).source, flags=re.S)
    if not found:
        raise KeyError(f"slides.md asks for a formula of the cell {id}, which has none")
    return " ".join(found[1].split())


def argument(tex: str, start: int) -> tuple[str, int]:
    """The text within the braces that open at `start`, and the place behind them."""
    depth = 0
    for i in range(start, len(tex)):
        depth += (tex[i] == "{") - (tex[i] == "}")
        if depth == 0:
            return tex[start + 1 : i], i + 1
    raise ValueError(f"a brace is not closed in {tex!r}")


def plain_tex(tex: str) -> str:
    """The formula in the part of TeX that matplotlib draws: no box and no braces below."""
    for command, label in (("\\boxed", False), ("\\underbrace", True)):
        while command in tex:
            at = tex.index(command)
            inner, end = argument(tex, at + len(command))
            if label and tex[end : end + 1] == "_":
                _, end = argument(tex, end + 1)
            tex = tex[:at] + inner + tex[end:]
    tex = re.sub(r"\\text\b", r"\\mathrm", tex)
    return re.sub(r"\\(?:Big|big)(?![a-z])|\\[!;]", " ", tex)


def drawn(tex: str) -> str:
    """A formula as SVG, drawn without a network; long ones break at a \\qquad or \\quad."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = [p.strip(" ,") for p in re.split(r"\\qquad|\\\\", plain_tex(tex)) if p.strip(" ,")]
    with rc_context({"mathtext.fontset": "cm", "svg.fonttype": "path", "svg.hashsalt": "slides"}):
        figure = Figure(figsize=(12, 1.6 * len(parts)))
        for i, part in enumerate(parts):
            y = 1 - (i + 0.5) / len(parts)
            figure.text(0.5, y, f"${part}$", size=42, ha="center", va="center")
        whole = io.StringIO()
        figure.savefig(whole, format="svg", bbox_inches="tight", metadata={"Date": None})
    return whole.getvalue()[whole.getvalue().index("<svg") :]


def shown(kind: str, id: str) -> str:
    if kind == "figure":
        return f"<img alt='figure of {id}' src='data:image/png;base64,{picture(id)}'>"
    if kind == "output":
        rows = printed(id).splitlines()
        size = min(36, 1900 / max(map(len, rows)), 400 / len(rows))  # pixels, as large as fits
        text = html.escape("\n".join(rows))
        return f"<pre style='font-size:{size:.0f}px'>{text}</pre>"
    return f"<div class='formula'>{drawn(formula(id))}</div>"


def section(slide: Slide) -> str:
    items = [line[2:] for line in slide.lines if line.startswith("- ")]
    said = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    texts = [f"<p>{html.escape(x)}</p>" for x in slide.lines if not x.startswith("- ")]
    where = ", ".join(f"{kind} of cell {id}" for kind, id in slide.shown)
    notes = html.escape(slide.notes) + (f"<br><i>{where}</i>" if where else "")
    pictures = sum(kind == "figure" for kind, _ in slide.shown)
    side = " class='side'" if pictures > 1 else ""
    parts = [f"<h2>{html.escape(slide.title)}</h2>", *(shown(*pair) for pair in slide.shown)]
    parts += [*texts, f"<ul>{said}</ul>" if said else "", f"<aside class='notes'>{notes}</aside>"]
    return f"<section{side}>{''.join(parts)}</section>"


STYLE = """
.reveal { font-family: "DejaVu Sans", Verdana, Arial, sans-serif; font-size: 38px; color: #111; }
body { background: #fff; }
.reveal h2 { font-size: 52px; margin: 0 0 28px 0; color: #00427a; }
.reveal section { text-align: center; }
.reveal img { max-width: 1180px; width: auto; height: 560px; object-fit: contain; }
.reveal .side img { width: 600px; height: 520px; margin: 0 6px; }
.reveal .formula svg { max-width: 1200px; max-height: 400px; width: auto; height: auto; }
.reveal ul { display: inline-block; text-align: left; line-height: 1.6; margin-top: 20px; }
.reveal pre { font: 24px/1.4 "DejaVu Sans Mono", Consolas, monospace; text-align: left;
  display: inline-block; background: #f3f3f0; padding: 20px; margin: 0; }
.reveal .slide-number { font-size: 22px; }
"""


def page(text: str | None = None) -> str:
    """The whole deck: one HTML file with its figures, styles and scripts inside."""
    deck = slides(SOURCE.read_text(encoding="utf-8") if text is None else text)
    styles = "".join((REVEAL / name).read_text("utf-8") for name in ("reset.css", "reveal.css"))
    scripts = [(REVEAL / name).read_text("utf-8") for name in ("reveal.js", "notes.js")]
    scripts = [re.sub(r"//# sourceMappingURL=\S+", "", s).replace("</script", "<\\/script")
               for s in scripts]  # fmt: skip
    start = (
        "Reveal.initialize({width: 1280, height: 720, margin: 0.02, hash: true, slideNumber: 'c/t',"
        " controls: false, transition: 'none', center: true, plugins: [RevealNotes],"
        " pdfSeparateFragments: false});"
    )
    sections = "\n".join(map(section, deck))
    licence = (REVEAL / "LICENSE").read_text("utf-8")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{deck[0].title}</title>"
        f"<!-- reveal.js: {licence} --><style>{styles}{STYLE}</style></head><body>"
        f"<div class='reveal'><div class='slides'>\n{sections}\n</div></div>"
        + "".join(f"<script>{script}</script>" for script in (*scripts, start))
        + "</body></html>\n"
    )


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


PAPER = """
@page { size: 1280px 720px; margin: 0; }
body { margin: 0; }
section { width: 1280px; height: 719px; overflow: hidden; break-after: page;
  box-sizing: border-box; padding: 30px 40px; }
"""


def paper(notes: bool) -> str:
    """The deck for printing, without scripts: a page a slide, and its notes behind it if asked."""
    deck = slides(SOURCE.read_text(encoding="utf-8"))
    bodies = []
    for slide in deck:
        said = section(slide)
        front, _, behind = said.partition("<aside class='notes'>")
        bodies.append(front + "</section>")
        if notes:
            bodies.append("<section class='said'>" + behind.replace("</aside>", ""))
    style = STYLE + PAPER + ".said { font-size: 34px; padding: 60px 90px !important; }"
    style += ".reveal section.said { text-align: left; }"
    return (
        f"<!doctype html><meta charset='utf-8'><style>{style}</style><body class='reveal'>"
        + "\n".join(bodies)
    )


def pdf(target: Path, notes: bool = False) -> None:
    """Print the deck by Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "paper.html"
        source.write_text(paper(notes), encoding="utf-8")
        subprocess.run(
            [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
             f"--user-data-dir={folder}/profile", f"--print-to-pdf={target.resolve()}",
             source.as_uri()],
            check=True, capture_output=True, timeout=180,
        )  # fmt: skip
    data = re.sub(rb"\(D:\d{14}\+00'00'\)", b"(D:20000101000000+00'00')", target.read_bytes())
    target.write_bytes(data)  # so that the same slides are the same file


def figures_on_slides(text: str) -> set[str]:
    pairs = [pair for slide in slides(text) for pair in slide.shown]
    return {id.split()[0] for kind, id in pairs if kind == "figure"}


def build(folder: Path) -> list[Path]:
    """Write slides.html and, with Chromium, slides.pdf and notes.pdf; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    deck = folder / "slides.html"
    deck.write_text(page(), encoding="utf-8")
    written = [deck]
    if chromium():
        for name, notes in (("slides.pdf", False), ("notes.pdf", True)):
            pdf(folder / name, notes)
            written.append(folder / name)
    else:
        print("No Chromium here, so no PDF: print slides.html?print-pdf from a browser.")
    return written


if __name__ == "__main__":
    for file in build(Path(sys.argv[1] if len(sys.argv) > 1 else "dist/workshop")):
        print(file)
