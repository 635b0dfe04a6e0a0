"""The frontier study: its runs, how they are read, and what is stored of it."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_mini.checkpoints import written_aside
from dpo_mini.course import frontier, studies

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"


@pytest.mark.parametrize("name", frontier.STUDIES)
def test_a_stored_study_is_that_of_the_code(name):
    stored = studies.stored(RESULTS / f"{name}.json")
    assert stored["command"].endswith(f"frontier {name}")
    assert [frontier.Run(**run["setting"]) for run in stored["runs"]] == frontier.STUDIES[name]
    for run in stored["runs"]:
        assert run["report"]["kl"]["low"] <= run["report"]["kl"]["high"]


def test_the_frontier_has_enough_methods_settings_and_seeds():
    runs = frontier.STUDIES["frontier"]
    swept = {run.method for run in runs} - {"reference"}
    assert len(swept) >= 6
    for method in swept:
        mine = [run for run in runs if run.method == method]
        assert len({run.value for run in mine}) >= 4 and len({run.seed for run in mine}) >= 3


def test_offline_runs_see_each_pair_once_and_ppo_as_many_completions():
    run = frontier.Run("dpo", "beta", 0.1)
    assert run.offline.steps * run.offline.batch_size == run.prompts * 6  # pairs of four samples
    passes = run.ppo.steps * run.ppo.batch_size * run.ppo.epochs
    assert abs(passes / (run.prompts * 4) - 1) < 0.05
    assert abs(run.reinforce.steps * run.reinforce.batch_size / (run.prompts * 4) - 1) < 0.05


SMALL = {"prompts": frontier.ROUNDS, "evaluated": 8}
METHODS = [
    ("reference", "beta", 0), ("orpo", "beta", 0.1), ("kto", "beta", 0.1),
    ("ppo, true reward", "beta", 0.2), ("best-of-n, learned reward", "n", 2),
    ("online dpo", "beta", 0.1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method, knob, value", METHODS)
def test_every_kind_of_run_repeats_itself(method, knob, value, tmp_path):
    setting = frontier.Run(method, knob, value, **SMALL)
    one, two = (frontier.run(setting, tmp_path) for _ in range(2))
    assert one == two
    assert (one["labels"] == 0) == (method == "reference")
    if method == "best-of-n, learned reward":
        assert one["report"]["kl"]["mean"] == pytest.approx(math.log(2) - 0.5, abs=1e-4)
    elif method == "reference":
        assert one["report"]["kl"]["mean"] == 0
    else:
        assert one["report"]["kl"]["mean"] > 0


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    settings = frontier.sweep("reference", "beta", 0, 1)
    done = {
        "setting": {},
        "report": {k: {"mean": 0.5} for k in ("reward_policy", "judge_policy", "kl")},
    }
    for setting in settings:
        (tmp_path / f"any-{studies.mark(setting)}.json").write_text(studies.json.dumps(done))

    def never(setting, folder):
        raise AssertionError("a finished run was run again")

    assert studies.study("any", settings, never, tmp_path) == [done, done]


@dataclasses.dataclass(frozen=True)
class Sleepy:
    """A run that takes a while, for studies of runs."""

    name: str
    seed: int = 0


def pid_of_run(setting, folder):
    (folder / f"{setting.name}.pid").write_text(str(os.getpid()))
    if setting.name == "slow":
        time.sleep(120)
    return {"error": f"{setting.name} {os.getpid()}"}


@pytest.mark.slow
def test_each_run_has_a_process_and_unreadable_results_are_made_anew(tmp_path):
    settings = [Sleepy("a"), Sleepy("b")]
    one, two = studies.study("any", settings, pid_of_run, tmp_path)
    pids = {result["error"].split()[1] for result in (one, two)}
    assert len(pids) == 2 and str(os.getpid()) not in pids
    path = tmp_path / f"any-{studies.mark(settings[1])}.json"
    path.write_text(path.read_text()[:-5])  # as a kill left it
    again = studies.study("any", settings, pid_of_run, tmp_path)
    assert again[0] == one and again[1]["error"].startswith("b ") and again[1] != two
    assert not list(tmp_path.glob("*.partial"))


def test_a_result_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("whole")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as partial:
        partial.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_frontier import Sleepy, pid_of_run
from dpo_mini.course import studies
if __name__ == "__main__":
    studies.study("any", [Sleepy("slow")], pid_of_run, Path(sys.argv[1]))
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_a_worker_ends_with_its_parent(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, script, tmp_path])
    written, deadline = tmp_path / "slow.pid", time.time() + 120
    while not (written.exists() and written.read_text()):
        assert parent.poll() is None and time.time() < deadline
        time.sleep(0.1)
    worker = int(written.read_text())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 10
    while alive(worker):
        assert time.time() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def test_seeds_have_students_interval():
    estimate = frontier.over_seeds([0.9, 0.92, 0.94])
    assert estimate.mean == pytest.approx(0.92)
    assert estimate.high - estimate.mean == pytest.approx(4.303 * 0.02 / math.sqrt(3))


def test_reward_is_read_between_points_and_never_beyond_them():
    places = [(4.0, 0.8), (0.0, 0.5), (8.0, 0.9)]
    assert frontier.reward_at(2.0, places) == pytest.approx(0.65)
    assert frontier.reward_at(8.0, places) == pytest.approx(0.9)
    assert frontier.reward_at(8.1, places) is None and frontier.reward_at(-1, places) is None


def test_points_are_those_of_one_method_by_seed():
    def run(method, seed, kl, reward):
        report = {"kl": {"mean": kl}, "reward_policy": {"mean": reward}}
        return {"setting": {"method": method, "seed": seed}, "report": report}

    runs = [run("a", 0, 5, 0.9), run("a", 0, 1, 0.6), run("a", 1, 2, 0.7), run("b", 0, 3, 0.1)]
    assert frontier.points(runs, "a") == {0: [(1, 0.6), (5, 0.9)], 1: [(2, 0.7)]}
