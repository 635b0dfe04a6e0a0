"""Every link of every page leads to something that is there. Links to the web are not followed."""

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
# What is not ours, and pages whose links hold where they are copied to (tests of their own).
ELSEWHERE = {".venv", "runs", "dist", "wheelhouse", "site", "PARTICIPANTS.md"}
PAGES = sorted(
    path
    for pattern in ("*.md", "*/*.md", "*/*/README.md", "*/*.ipynb")
    for path in ROOT.glob(pattern)
    if not ELSEWHERE & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)<>\s]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(r"```.*?```|`[^`\n]*`", flags=re.S)


def text_of(path: Path) -> str:
    """The prose of a page, code left out."""
    if path.suffix == ".md":
        return CODE.sub("", path.read_text(encoding="utf-8"))
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return CODE.sub("", prose)


def anchors(path: Path) -> set[str]:
    """The names under which GitHub and JupyterLab find a page's headings, and its own anchors."""
    if path.suffix == ".md":
        source = path.read_text(encoding="utf-8")
    else:
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", source))
    for heading in re.findall(r"^#+ +(.+?) *$", source, flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))  # GitHub
        found.add(words.replace(" ", "-"))  # JupyterLab
    return found


def broken(path: Path, text: str) -> list[str]:
    """The links in a page's text that lead nowhere."""
    lost = []
    for link in (a or b for a, b in LINK.findall(text)):
        if re.match(r"\w+:", link):  # the web, mail, a picture's own data
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (
            anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(target)
        ):
            lost.append(link)
    return lost


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_its_links_lead_somewhere(path):
    assert broken(path, text_of(path)) == []


def test_a_broken_link_is_found():
    page = ROOT / "notebooks" / "README.md"
    text = "[a](no_such_page.ipynb) [b](glossary.md#no-such-word) [c](glossary.md) ![d](images/no.png)"
    assert broken(page, text) == ["no_such_page.ipynb", "glossary.md#no-such-word", "images/no.png"]
