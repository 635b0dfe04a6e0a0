"""The web edition: a static site of every notebook with its stored outputs.

python site/build.py [OUTPUT]      OUTPUT: site/_build/html unless given; nothing is executed

Lays out the pages as Sphinx wants them, stores the models of the live pages in eight bits and calls
Sphinx. Needs the `site` extra and no torch. No network: MathJax comes from an installed package.
"""

import json
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import nbformat
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
sys.path.insert(0, str(ROOT))

from dpo_mini.embedded.eight_bits import pack  # noqa: E402

EMBEDDED = ROOT / "dpo_mini" / "embedded"
# What a slider of a notebook is called on the live pages.
LIVE = {
    "widgets.bradley_terry": "bradley_terry",
    "widgets.tilting": "tilting",
    "weighting,": "gradient_weighting",
    "explore_strength": "every_beta",
}


def lay_out(source: Path) -> None:
    """All pages under `source`, in the folders that their links to each other expect."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "notebooks" / "images", source / "notebooks" / "images")
    for name in ("INSTALL.md", "TROUBLESHOOTING.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(SITE / "live", source / "live")
    shutil.copytree(SITE / "static", source / "static")
    shutil.copy(SITE / "conf.py", source)
    (source / "exercises").mkdir()
    for folder in ("notebooks", "exercises"):
        for path in sorted((ROOT / folder).glob("*.md")):
            shutil.copy(path, source / folder)
        for path in sorted((ROOT / folder).glob("[0-9][0-9]_*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            finished = for_reading(notebook, folder, path.name)
            nbformat.write(finished, source / folder / path.name)
    (source / "index.md").write_text(front_page(source), encoding="utf-8")
    for page in source.rglob("*.md"):
        text = kept_links(page.read_text(encoding="utf-8"), page, source)
        page.write_text(text, encoding="utf-8")
    for page in source.rglob("*.ipynb"):
        notebook = nbformat.read(page, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = kept_links(cell.source, page, source)
        nbformat.write(notebook, page)
    shutil.copytree(mathjax(), source / "static" / "mathjax")


def for_reading(notebook, folder: str, name: str):
    """A notebook for the web: the theme has its own links to the neighbours, a figure is named in
    words, and a slider, which needs a kernel, leads to its live page.
    """
    cells = [c for c in notebook.cells if "navigation" not in c.metadata.get("tags", [])]
    shown, said = [], ""
    for cell in cells:
        shown.append(cell)
        if cell.cell_type == "markdown":
            said = plain(cell.source) or said
            # An anchor in HTML, which JupyterLab and GitHub know, in MyST's own words.
            cell.source = re.sub(r'^<a id="([\w-]+)"></a>$', r"(\1)=", cell.source, flags=re.M)
            continue
        cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {said}"}}
        pages = [page for call, page in LIVE.items() if call in cell.source]
        if re.search(r"explore\w*\(", cell.source) and pages:
            link = f"**Live:** [move this slider in your browser](../live/{pages[0]}.md)."
            shown.append(nbformat.v4.new_markdown_cell(link))
    if folder == "notebooks" and (ROOT / "exercises" / name).exists():
        link = f"---\n[Exercises of this chapter](../exercises/{name})"
        shown.append(nbformat.v4.new_markdown_cell(link))
    notebook.cells = shown
    return notebook


def plain(markdown: str) -> str:
    """The last paragraph of a text, without marks: what a figure below it is called aloud."""
    paragraphs = [p for p in re.split(r"\n\s*\n", markdown) if re.match(r"[\w*$\[]", p)]
    words = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", paragraphs[-1] if paragraphs else "")
    return " ".join(re.sub(r"[*_`$\\{}#|<>\"]", "", words).split())[:240]


def kept_links(text: str, page: Path, source: Path) -> str:
    """Links to what is on the site stay; the top README is the front page; others become text."""

    def link(match):
        words, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        place = (page.parent / path).resolve()
        if place == (source / "README.md").resolve():
            return f"[{words}]({'../' * len(page.relative_to(source).parents[1:])}index.md)"
        if place.exists() and place.is_file():
            return match[0]
        return words

    return re.sub(r"(?<!!)\[([^][]*)]\(([^()\s]+)\)", link, text)


def front_page(source: Path) -> str:
    """index.md with the tree of all pages, which is what the sidebar shows."""

    def tree(caption: str, pages: list[str]) -> str:
        return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])

    def chapters(folder: str) -> list[str]:
        return [f"{folder}/{p.stem}" for p in sorted((source / folder).glob("*.ipynb"))]

    contents = [
        tree("The course", ["notebooks/README", *chapters("notebooks")]),
        tree("Look it up", [f"notebooks/{n}" for n in ("cheat_sheet", "glossary", "references")]),
        tree("Live pages", ["live/README"]),
        tree("Exercises", ["exercises/README", *chapters("exercises")]),
        tree("Your own computer", ["INSTALL", "TROUBLESHOOTING"]),
    ]
    text = (SITE / "index.md").read_text(encoding="utf-8")
    return text.replace("{contents}", "\n".join(contents))


def mathjax() -> Path:
    """The folder of MathJax in the package sphinx-mathjax-offline; only what a page loads."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise SystemExit("MathJax is not installed: pip install '.[site]' in the project's folder.")
    return Path(spec.origin).parent / "static" / "mathjax"


def store_models(folder: Path) -> None:
    """What the live pages load: both models in eight bits, tokenizer, reward and margins."""
    folder.mkdir(parents=True)
    model = (EMBEDDED / "model" / "model.safetensors").read_bytes()
    with safe_open(EMBEDDED / "policy" / "difference.safetensors", "np") as difference:
        if (difference.metadata() or {}).get("base_weights") != sha256(model).hexdigest()[:16]:
            raise SystemExit(
                "The policy that ships belongs to another embedded model. Make it again: "
                "python -m dpo_mini.embedded.policy."
            )
    weights = load_file(EMBEDDED / "model" / "model.safetensors")
    save_file(pack(weights), folder / "reference.safetensors")
    for path in (
        EMBEDDED / "policy" / "difference.safetensors", EMBEDDED / "reward.safetensors",
        EMBEDDED / "model" / "config.json",
    ):  # fmt: skip
        shutil.copy(path, folder)
        (folder / path.name).chmod(0o644)
    (folder / "reference.safetensors").chmod(0o644)
    tokenizer = json.loads((EMBEDDED / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    small = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(small, encoding="utf-8")
    margins = (EMBEDDED / "policy" / "margins.jsonl").read_text(encoding="utf-8")
    names = ("prompt", "chosen", "rejected", "margin")
    rows = [json.loads(line) for line in margins.split("\n") if line]
    rows = [{name: row[name] for name in names} for row in rows]
    (folder / "margins.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def fill_in(page: Path, models: Path) -> None:
    """The numbers of the page whose text two models write."""
    card = (EMBEDDED / "policy" / "README.md").read_text(encoding="utf-8")
    weights = load_file(EMBEDDED / "model" / "model.safetensors")
    values = {
        "{beta}": re.search(r"DPO, beta ([\d.]+),", card)[1],
        "{millions}": f"{sum(w.size for w in weights.values()) / 1e6:.1f}",
        "{megabytes}": f"{sum(f.stat().st_size for f in models.iterdir()) / 1e6:.0f}",
    }
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(name, value)
    page.write_text(text, encoding="utf-8")


def prune(output: Path) -> None:
    """MathJax's other output formats and its loaders: no page asks for them."""
    folder = output / "_static" / "mathjax"
    keep = ("tex-chtml.js", "woff-v2", "input", "a11y")
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not any(part in keep for part in path.relative_to(folder).parts):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def main(arguments: list[str]) -> int:
    output = Path(arguments[0]) if arguments else SITE / "_build" / "html"
    source = output.parent / "source"
    shutil.rmtree(output, ignore_errors=True)
    lay_out(source)
    store_models(source / "static" / "live" / "weights")
    fill_in(source / "live" / "every_beta.md", source / "static" / "live" / "weights")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    doctrees = output.parent / "doctrees"
    done = subprocess.run([*command, "-d", doctrees, source, output], check=False)
    if done.returncode:
        return done.returncode
    prune(output)
    print(f"The site is in {output}. Look at it: python -m http.server --directory {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
