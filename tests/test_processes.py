"""Two real processes do what one does: the same weights and the same log, for every loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, random_pairs

from dpo_mini import processes, training
from dpo_mini.family import LOSSES
from dpo_mini.settings import TrainingConfig, TrainingError

TESTS = Path(__file__).parent

# Everything in float64 and in one launch, since starting two processes takes longer than training.
SCRIPT = """
import os, signal, sys
import peft, torch
sys.path.insert(0, {tests!r})
from conftest import make_gpt2, random_pairs
from dpo_mini import processes
from dpo_mini.family import LOSSES
from dpo_mini.settings import TrainingConfig
from dpo_mini import reference
from dpo_mini.checkpoints import TrainingInterrupted
from dpo_mini.training import sft_objective, train, train_preferences

config = TrainingConfig(steps=3, batch_size=8, micro_batch_size=2, learning_rate=1e-3,
                        warmup_steps=1)

def fresh():
    torch.manual_seed(0)
    return make_gpt2(width=16, layers=1).double()

def result(model, log):
    return [p.detach() for p in model.parameters()], [dict(row) for row in log[1:]]

results = {{"caches": 0}}
real = reference.keep_logps

def counted(*given):
    results["caches"] += 1
    real(*given)

reference.keep_logps = counted
once = TrainingConfig(steps=1, batch_size=8)  # the first run of all: here the processes join
train_preferences(fresh(), random_pairs(20), once, output=f"{{sys.argv[1]}}.run")
for loss in [*LOSSES, "kto"]:
    model = fresh()
    log = train_preferences(model, random_pairs(20), config, loss=loss)
    results[loss] = result(model, log)

model = fresh()
items = [(pair.prompt_ids, pair.chosen_ids) for pair in random_pairs(20)]
results["sft"] = result(model, train(model, items, sft_objective(), config))

rank = int(os.environ.get("RANK", 0))
adapters = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
base = fresh()
torch.manual_seed(100 + rank)  # every process draws other adapters: the main one's count
model = peft.get_peft_model(base, adapters).double()
results["lora"] = result(model, train_preferences(model, random_pairs(20), config))

def interrupt(model, log):
    if log[-1]["step"] == 1:
        os.kill(os.getpid(), signal.SIGINT)  # only in the main process
    return {{}}

try:
    slow = TrainingConfig(steps=9, batch_size=8, monitor_every=1)
    train_preferences(fresh(), random_pairs(20), slow, monitor=interrupt)
    results["stopped"] = "never"
except TrainingInterrupted as stop:
    results["stopped"] = str(stop)

results["processes"] = processes.count()
results["share"] = processes.share(list(range(8)))
torch.save(results, f"{{sys.argv[1]}}.{{rank}}")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and two processes came to: (one, main of two, other of two)."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(TESTS)), encoding="utf-8")
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    # torch's own launcher: accelerate's, with --cpu, starts one process whatever it is asked for.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([sys.executable, script, folder / "one"], [*launch, script, folder / "two"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return tuple(torch.load(folder / name) for name in ("one.0", "two.0", "two.1"))


@pytest.mark.slow
def test_there_are_two_processes(runs):
    assert [run["processes"] for run in runs] == [1, 2, 2]


@pytest.mark.slow
def test_only_the_main_process_writes_the_references_cache(runs):
    assert [run["caches"] for run in runs] == [1, 1, 0]


@pytest.mark.slow
def test_the_shares_of_a_batch_are_neighbours_so_that_a_prompts_pairs_stay_together(runs):
    assert [run["share"] for run in runs] == [[*range(8)], [0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOSSES, "kto", "sft", "lora"])
def test_two_processes_equal_one(runs, name):
    (one, one_log), (two, two_log), (other, other_log) = (run[name] for run in runs)
    assert two_log == other_log and all(torch.equal(a, b) for a, b in zip(two, other))
    for a, b in zip(one, two):
        assert a.dtype == torch.float64 and (a - b).abs().max() < 1e-9
    assert len(one_log) == 3
    for row, same in zip(one_log, two_log):
        assert row.keys() == same.keys()
        for key in row:
            assert row[key] == pytest.approx(same[key], abs=1e-9, rel=1e-9), key


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_after_the_same_step(runs):
    assert {run["stopped"] for run in runs} == {"Stopped after step 2 of 9."}


@pytest.mark.parametrize("variable", processes.SHARDED)
def test_sharded_parameters_are_refused_and_not_ignored(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(TrainingError, match="shards parameters.*Launch with"):
        processes.join_processes(torch.device("cpu"), 8)


def test_the_processes_join_before_the_reference_is_read(monkeypatch):
    order = []
    for module, name in ((processes, "join_processes"), (training, "reference_logps")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name, **k: order.append(name) or real(*a, **k)
        )
    config = TrainingConfig(steps=1, batch_size=4)
    training.train_preferences(make_gpt2(), random_pairs(4), config)
    assert order[:2] == ["join_processes", "reference_logps"]


@pytest.mark.parametrize("rank", range(3))
def test_a_share_is_a_slice(rank, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    assert processes.share(list("aabbcc")) == [list("aa"), list("bb"), list("cc")][rank]


def test_processes_that_cannot_share_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(TrainingError, match="3 processes cannot share 8 items.*that 3 divides"):
        processes.join_processes(torch.device("cpu"), 8)
