"""The main job, whole: what the README promises, measured on a run with the defaults."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dpo_mini.checkpoints import saved_step
from dpo_mini.data import PreferencePair, write_jsonl
from dpo_mini.demo import demo, pairs_of_prompts
from dpo_mini.models import load_model
from dpo_mini.settings import TrainingError

pytestmark = pytest.mark.slow


one_worker = pytest.mark.xdist_group("the demo's run")  # which takes minutes, and is shared


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, demo(folder, progress=False)


@one_worker
def test_the_report_shows_a_model_that_changed_its_mind(run):
    _, report = run
    assert abs(report["loss_first"] - math.log(2)) < 1e-4
    assert report["reward_gain"]["mean"] >= 0.30
    assert report["judge_policy"]["mean"] - report["judge_reference"]["mean"] >= 0.20
    assert report["kl"]["mean"] < 10
    assert report["win_rate"]["mean"] >= 0.80
    for key, bar in (("preference_accuracy", 0.75), ("preference_accuracy_clear", 0.82)):
        estimate = report[key]
        standard_error = (estimate["high"] - estimate["low"]) / (2 * 1.96)
        # Another processor rounds, and so samples, differently: one standard error of slack.
        assert estimate["mean"] + standard_error >= bar, key
    assert report["distinct_2_policy"] >= 0.9 * report["distinct_2_reference"]
    for key in ("reward_policy", "kl", "win_rate", "preference_accuracy"):
        assert report[key]["low"] < report[key]["mean"] < report[key]["high"]


@one_worker
def test_the_folder_holds_what_the_readme_says(run):
    folder, report = run
    names = {p.name for p in folder.iterdir()}
    assert {"report.json", "samples.jsonl", "training.png", "model.safetensors"} <= names
    rows = [json.loads(x) for x in (folder / "samples.jsonl").read_text().split("\n") if x]
    assert len(rows) == 256 and set(rows[0]) >= {"prompt", "reference", "policy"}
    assert json.loads((folder / "report.json").read_text()) == report
    model, _ = load_model(folder)
    assert model.num_parameters() == load_model()[0].num_parameters()


def test_killed_and_resumed_the_demo_ends_with_the_same_weights(tmp_path):
    command = [sys.executable, "-m", "dpo_mini", "demo", "--json", "--n-prompts", "24"]
    command += ["--held-out", "8", "--steps", "8", "--checkpoint-every", "1", "--resume"]
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    subprocess.run([*command, "--output", plain], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, "--output", broken], stdout=subprocess.DEVNULL)
    while (saved_step(broken / "checkpoint.safetensors") or 0) < 2:
        assert process.poll() is None, "the demo ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--output", broken], check=True, stdout=subprocess.DEVNULL)
    other = subprocess.run(
        [*command, "--n-prompts", "12", "--output", broken], capture_output=True, text=True
    )
    assert other.returncode == 1 and "another run's prompts" in other.stderr
    a, b = (load_file(folder / "model.safetensors") for folder in (plain, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_prompt_whose_completions_all_tie_has_no_pair_but_a_strange_one_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [PreferencePair("A film", " I liked", " I hated")])
    assert len(pairs_of_prompts(path, ["A film", "All alike"])) == 1
    with pytest.raises(TrainingError, match="another run's prompts"):
        pairs_of_prompts(path, ["All alike"])
