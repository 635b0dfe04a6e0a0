"""A run handed over: the exported TRL script trains the same, step by step; what the other tools
would do otherwise is counted or refused.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import make_gpt2
from test_trl import rows

from dpo_mini import export
from dpo_mini.cli import main
from dpo_mini.data import DataError, write_jsonl
from dpo_mini.losses import PairLogps, cdpo_loss, dpo_loss
from dpo_mini.family import robust_loss
from dpo_mini.settings import TrainingError

NAMES = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """A folder with pairs and three runs of `dpo-mini train`: dpo, cdpo in parts, with LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    sampled = [  # ids as they were sampled: one was cut, and has no EOS
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in rows()
    ]
    write_jsonl(folder / "pairs.jsonl", sampled)
    common = ["train", "--model", str(tiny_folder), "--pairs", str(folder / "pairs.jsonl"),
              "--steps", "20", "--batch-size", "4", "--json", "--learning-rate", "1e-3"]  # fmt: skip
    more = {
        "dpo": ["--beta", "0.3", "--warmup-steps", "5", "--schedule", "cosine",
                "--weight-decay", "0.1"],
        "cdpo": ["--loss", "cdpo", "--label-smoothing", "0.2", "--micro-batch-size", "2"],
        "lora": ["--lora", "2", "--beta", "0.5"],
    }  # fmt: skip
    for name, options in more.items():
        assert main([*common, *options, "--output", str(folder / name)]) == 0
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs the test extra: pip install '.[test]'")
@pytest.mark.parametrize("name", ["dpo", "cdpo", "lora"])
def test_the_exported_trl_script_takes_the_same_steps(runs, tiny_folder, name, tmp_path):
    command = ["export", "--of", str(runs / name), "--to", "trl", "--pairs", str(runs / "pairs.jsonl"),
               "--model", str(tiny_folder), "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    done = subprocess.run([sys.executable, tmp_path / "out" / "train.py"], capture_output=True,
                          text=True, timeout=300, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = read(tmp_path / "out", "log.jsonl"), read(runs / name, "log.jsonl")[1:]
    assert len(theirs) == len(ours) == 20
    for step, (a, b) in enumerate(zip(ours, theirs)):
        for key in NAMES:
            near = {"abs": 2e-4 if key == "loss" else 2e-3, "rel": 1e-4}
            assert a[key] == pytest.approx(b[key], **near), (step, key)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-6), step
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2), step
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.02  # it learnt, so that there was a way
    assert "loss: 20 steps, at most" in done.stdout
