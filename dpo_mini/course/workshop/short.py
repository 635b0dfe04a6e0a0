"""The workshop's notebooks: the full chapters' cells on the way of a plan, nothing written twice.

Exercises come from solutions/, cut to those of the plan.
"""

import copy
import re
import shutil
import tempfile
from pathlib import Path

import nbformat

from dpo_mini.course.exercises import learner_copy
from dpo_mini.course.workshop import plan

SHORT = ("1h", "3h")  # the two-day plan takes whole chapters
SOLUTIONS = plan.ROOT / "solutions"


def short_notebook(chapter: str, form: str):
    """A chapter cut to a plan. Cells to be run and not read are folded, answers are empty."""
    path = plan.notebook_path(chapter)
    notebook = nbformat.read(path, as_version=4)
    kept = [copy.deepcopy(c) for c in notebook.cells if plan.on_the_way(c, form)]
    for cell in kept:
        if not plan.is_read(cell, form):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if "answer" in plan.tags(cell):
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("jupyter", None)
    left = plan.skipped(chapter, form)
    gone = f" Left out: {'; '.join(left)}." if left else ""
    ids = plan.exercises_of(form).get(chapter, [])
    practise = f"Exercises: {', '.join(ids)}, in `exercises/{path.name}`. " if ids else ""
    last = f"---\n{practise}The whole chapter is `notebooks/{path.name}` of the course.{gone}"
    cell = nbformat.v4.new_markdown_cell(last)
    cell.id = "workshop-end"
    notebook.cells = [*map(relinked, kept), cell]
    notebook.metadata.pop("executed", None)
    return notebook


def without_page_links(text: str) -> str:
    """Links to notebooks and to the contents as plain words: those pages do not travel along."""
    page = r"\[([^\]]+)\]\((?:\.\./)?(?:exercises/|notebooks/)?(?:\w+\.ipynb|README\.md)\)"
    return re.sub(page, r"\1", text)


def relinked(cell):
    if cell.cell_type == "markdown":
        cell.source = without_page_links(cell.source)
    return cell


def cut_exercises(chapter: str, ids: list[str], solved: bool):
    """The chapter's exercises of a plan: the learner's copy, or with the solutions."""
    notebook = nbformat.read(SOLUTIONS / plan.notebook_path(chapter).name, as_version=4)
    kept, keep = [], True
    for cell in notebook.cells:
        is_text = cell.cell_type == "markdown"
        heading = re.match(r"## (\d\d\.\d)\b", cell.source) if is_text else None
        if heading:
            keep = heading[1] in ids
        elif cell.cell_type == "code" and "progress(" in cell.source:
            keep = True
        if keep:
            kept.append(copy.deepcopy(cell))
    notebook.cells = [relinked(cell) for cell in kept]
    return notebook if solved else learner_copy(notebook)


def execute(chapter: str, form: str) -> None:
    """Run a short notebook from beginning to end; an error in a cell is an error."""
    from nbclient import NotebookClient

    notebook = short_notebook(chapter, form)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(plan.NOTEBOOKS / "results", Path(folder) / "results")
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=where).execute()
