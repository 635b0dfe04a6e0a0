"""Execute the notebooks whose code changed, and store their outputs:

python -m dpo_mini.course.execute notebooks [--all]
"""

import base64
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

TIMEOUT = 1500  # seconds a cell: a machine five times slower passes


def fingerprint(notebook) -> str:
    """A hash of the code cells; the stored outputs belong to the code that has it."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0".join(code).encode()).hexdigest()[:16]


def is_current(notebook) -> bool:
    return notebook.metadata.get("executed") == fingerprint(notebook)


def execute(path: Path) -> None:
    """Run a notebook in its folder and store the outputs; an error leaves the file as it was."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}}, store_widget_state=False,
    )  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: a new diff every time
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if not is_chatter(o)])
            for output in cell.outputs:
                add_png(output)
                shrink(output)
    notebook.metadata["executed"] = fingerprint(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def add_png(output) -> None:
    """Beside an SVG store the same picture as PNG: JupyterLab draws no SVG of a notebook that it
    does not trust yet, which is every notebook of a fresh clone. Needs Chromium; without it the SVG
    stands alone.
    """
    data = output.get("data", {})
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if "image/svg+xml" not in data or not chromium:
        return
    from PIL import Image

    box = re.search(r"viewBox='0 0 (\d+) (\d+)'", data["image/svg+xml"])
    size = [int(n) for n in box.groups()]
    style = f"<!doctype html><style>body{{margin:0}}body>svg{{display:block;height:{size[1]}px!important}}"
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder) / "page.html", Path(folder) / "picture.png"
        page.write_text(f"{style}</style>{data['image/svg+xml']}", encoding="utf-8")
        room = f"{size[0]},{size[1] + 300}"  # the window's own frame counts as height
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}",
             f"--user-data-dir={folder}/profile", f"--window-size={room}", page],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        Image.open(picture).crop((0, 0, *size)).save(picture)
        data["image/png"] = base64.b64encode(picture.read_bytes()).decode()


def shrink(output) -> None:
    """Store a PNG with a palette of 128 colours: plots look the same at a third of the size."""
    from PIL import Image

    data = output.get("data", {})
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        small = io.BytesIO()
        picture.quantize(128).save(small, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(small.getvalue()).decode()


def joined(outputs: list) -> list:
    """Neighbouring pieces of one stream as one: where a stream is cut differs from run to run."""
    whole = []
    for output in outputs:
        if whole and output.get("name") == "stdout" and whole[-1].get("name") == "stdout":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def is_chatter(output) -> bool:
    """What says nothing to a reader: libraries' messages, progress bars, and sliders, which without
    their kernel are no more than the words "Error displaying widget".
    """
    live = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return live or output.get("name") == "stderr"


def main(arguments: list[str]) -> None:
    folder = Path(next((a for a in arguments if not a.startswith("-")), "notebooks"))
    for path in sorted(folder.glob("*.ipynb")):
        if "--all" in arguments or not is_current(nbformat.read(path, as_version=4)):
            print(f"executing {path}", flush=True)
            execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
