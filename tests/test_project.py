"""The house itself: versions agree, imports stay light, what ships is small and documented."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.rewards import load_prompts

ROOT = Path(__file__).resolve().parents[1]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    return {
        normal(n): v
        for n, v in re.findall(r"^\s*(?:- )?([A-Za-z0-9._-]+)==(\S+)$", text, flags=re.M)
    }


def test_environment_yml_has_the_versions_of_the_lock():
    lock, conda = (
        pins((ROOT / "requirements.lock").read_text()),
        pins((ROOT / "environment.yml").read_text()),
    )
    assert lock["torch"] == "2.13.0"
    assert conda and {name: lock.get(name) for name in conda} == conda
    project = (ROOT / "pyproject.toml").read_text()
    ranges = {normal(n): v for n, v in re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)"', project)} | {
        "trl": "0"
    }
    ranges.pop("setuptools")
    assert set(ranges) == set(conda), "environment.yml must list every direct dependency"
    for name, least in ranges.items():
        assert [int(x) for x in re.findall(r"\d+", lock[name])[:3]] >= [
            int(x) for x in least.split(".")
        ], name


def test_the_lock_is_what_is_installed_here():
    from importlib.metadata import version

    lock = pins((ROOT / "requirements.lock").read_text())
    assert version("torch").split("+")[0] == lock["torch"]
    assert version("transformers") == lock["transformers"]


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
    assert all(2 <= len(tokenizer(p)["input_ids"]) <= 8 for p in train + held_out)


def test_the_library_is_read_in_one_sitting():
    library = [
        p for p in (ROOT / "dpo_mini").glob("*.py") if p.name not in ("cli.py", "__main__.py")
    ]
    lines = {p.name: len([x for x in p.read_text().splitlines() if x.strip()]) for p in library}
    assert sum(lines[f"{room}.py"] for room in ("losses", "logprobs", "training")) < 400, lines
    assert sum(lines.values()) < 3000, lines


@pytest.mark.parametrize(
    "command", ["make demo", "make test", "python -m dpo_mini demo", "pip install .", "dpo-mini"]
)
def test_the_readme_names_its_commands(command):
    assert command in (ROOT / "README.md").read_text()


def test_a_cell_has_only_tags_that_mean_something():
    known = {"nbval-check-output", "parameters", "answer", "hide-output", "navigation"}
    for path in sorted(ROOT.glob("*/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            assert set(cell["metadata"].get("tags", [])) <= known, (path.name, cell["source"])


def test_no_floor_imports_a_floor_above_it():
    floors = [
        ["hub", "settings", "losses", "family", "data", "processes", "checkpoints", "exact"],
        ["tokens", "models"],
        ["logprobs", "fast_logprobs", "sampling", "rewards"],
        ["reference", "curation"],
        ["training", "evaluation"],
        ["rlhf", "online", "demo"],
        ["cli"],
    ]
    height = {room: i for i, rooms in enumerate(floors) for room in rooms}
    for room, floor in height.items():
        source = (ROOT / "dpo_mini" / f"{room}.py").read_text()
        for other in re.findall(r"from dpo_mini\.(\w+)", source):
            assert height.get(other, -1 if other != "course" else 99) <= floor or (
                other == "course" and floor >= 5
            ), (room, other)
