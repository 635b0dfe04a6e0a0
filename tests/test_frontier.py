"""The frontier study: its runs, how they are read, and what is stored of it."""

import math
from pathlib import Path

import pytest

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
