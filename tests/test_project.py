"""The house itself: imports stay light, what ships is small and documented."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.rewards import load_prompts

ROOT = Path(__file__).resolve().parents[1]


def test_importing_dpo_mini_and_asking_for_help_load_nothing_heavy():
    for code in ("import dpo_mini", "import dpo_mini.cli; dpo_mini.cli.parser()"):
        heavy = ("torch", "transformers", "datasets", "matplotlib")
        probe = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
        assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "[]"


def test_what_ships_is_small_and_safe():
    sizes = {
        p.name: p.stat().st_size
        for p in EMBEDDED_FOLDER.rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    }
    assert sizes["model.safetensors"] <= 16 * 2**20
    assert sizes["reward.safetensors"] <= 2 * 2**20 and sizes["judge.json"] <= 2**20
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pkl", ".pickle"))]


def test_the_embedded_model_has_the_hubs_format_and_a_card():
    config = json.loads((EMBEDDED_FOLDER / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["n_positions"] >= 128
    card = (EMBEDDED_FOLDER / "model" / "README.md").read_text()
    for word in (
        "bits per byte",
        "dpo-mini pretrain",
        "tokens seen",
        "Maas",
        "license: apache-2.0",
        "longest run",
    ):
        assert word in card, f"the model card does not mention {word!r}"


def test_prompts_are_short_different_and_apart(tokenizer):
    train, held_out = load_prompts("train"), load_prompts("held_out")
    assert len(train) >= 1000 and len(held_out) >= 256
    assert len(set(train)) == len(train) and not set(train) & set(held_out)
    assert all(3 <= len(tokenizer(p)["input_ids"]) <= 9 for p in train + held_out)  # with BOS


def code_lines(path):
    """Lines of code, without docstrings, comments and blank lines: those are for the reader."""
    text = path.read_text(encoding="utf-8")
    said = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node):
            said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    rows = enumerate(text.splitlines(), start=1)
    return sum(bool(row.strip()) and row.strip()[0] != "#" and i not in said for i, row in rows)


def test_the_library_is_read_in_one_sitting():
    roof = ("cli", "verbs", "sources", "options", "outputs", "console", "export", "publish",
            "__main__")  # fmt: skip
    lines = {p.stem: code_lines(p) for p in (ROOT / "dpo_mini").glob("*.py")}
    assert lines["losses"] + lines["logprobs"] + lines["training"] < 300, lines
    assert sum(n for room, n in lines.items() if room not in roof) < 3900, lines
    assert sum(n for room, n in lines.items() if room in roof) < 1550, lines


@pytest.mark.parametrize(
    "command", ["make demo", "make lab", "make test", "python -m dpo_mini demo", "INSTALL.md"]
)
def test_the_readme_names_its_commands(command):
    assert command in (ROOT / "README.md").read_text()


def test_a_cell_has_only_tags_that_mean_something():
    known = {"nbval-check-output", "parameters", "answer", "hide-output", "navigation"}
    known |= {"workshop-1h", "workshop-3h", "workshop-run"}
    for path in sorted(ROOT.glob("*/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            assert set(cell["metadata"].get("tags", [])) <= known, (path.name, cell["source"])


def test_no_floor_imports_a_floor_above_it():
    floors = [
        ["hub", "settings", "losses", "family", "data", "processes", "checkpoints", "exact"],
        ["tokens", "models"],
        ["exactness", "logprobs", "fast_logprobs", "sampling", "rewards", "fetch",
         "served"],
        ["reference", "curation"],
        ["training", "evaluation"],
        ["rlhf", "online", "demo", "grpo"],
        ["cli", "verbs", "sources", "options", "outputs", "console", "export", "publish",
          "__main__"],
    ]
    height = {room: i for i, rooms in enumerate(floors) for room in rooms}
    files = {path.stem for path in (ROOT / "dpo_mini").glob("*.py")}
    assert files - {"__init__"} == set(height)
    house = (ROOT / "dpo_mini" / "README.md").read_text(encoding="utf-8")
    assert not [room for room in files if not room.startswith("_") and f"`{room}.py`" not in house]
    for room, floor in height.items():
        for other in imported(ROOT / "dpo_mini" / f"{room}.py"):
            above = floor < 5 if other in ("course", "embedded") else height[other] > floor
            assert not above, (room, other)


def imported(path) -> set[str]:
    """The rooms that a file imports, in any of the two ways."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "dpo_mini":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_mini."):
            rooms.add(node.module.split(".")[1])
    return rooms
