"""Numbers out of range are refused where they become settings, in a sentence."""

import dataclasses
import math
import subprocess
import sys

import pytest

from dpo_mini.demo import demo
from dpo_mini.evaluation import evaluate
from dpo_mini.grpo import GRPOConfig
from dpo_mini.online import online_dpo
from dpo_mini.rlhf import PolicyGradientConfig
from dpo_mini.settings import SettingsError, TrainingConfig

NO_COUNT = (0, -1, 2**60, 1.5, math.nan, True, "3", None)  # of what there is one or more
NO_RATE = (-1e-3, math.nan, math.inf, True, "1e-3", None)

BAD_TRAINING = {
    "steps": NO_COUNT, "batch_size": NO_COUNT, "block_size": NO_COUNT,
    "micro_batch_size": (0, -1, 2**60, 1.5, "4"), "learning_rate": (*NO_RATE, 0.0),
    "warmup_steps": (-5, 2**60, 0.5), "schedule": ("step", None), "weight_decay": NO_RATE,
    "max_grad_norm": (*NO_RATE, 0), "bf16": (1, "yes"), "seed": (-1, 2**60, 0.0),
    "checkpoint_every": NO_COUNT, "monitor_every": NO_COUNT,
}  # fmt: skip
BAD_POLICY_GRADIENT = {
    "steps": NO_COUNT, "batch_size": NO_COUNT, "learning_rate": (*NO_RATE, 0), "beta": NO_RATE,
    "target_kl": (0, -1, math.nan), "kl_gain": NO_RATE, "max_new_tokens": NO_COUNT,
    "max_grad_norm": (*NO_RATE, 0), "warmup_steps": (-1,), "seed": (-1, 2**60),
    "monitor_every": NO_COUNT, "samples": NO_COUNT, "epochs": NO_COUNT,
    "minibatch_size": NO_COUNT, "clip": (*NO_RATE, 0), "gamma": (*NO_RATE, 1.5),
    "gae_lambda": (*NO_RATE, 1.5),
}  # fmt: skip
BAD_GRPO = {
    "steps": NO_COUNT, "batch_size": NO_COUNT, "num_generations": (*NO_COUNT, 1),
    "num_iterations": NO_COUNT, "learning_rate": (*NO_RATE, 0), "loss_type": ("ppo", None),
    "scale_rewards": ("std", None), "epsilon": (*NO_RATE, 0), "epsilon_high": (0, -1, math.nan),
    "beta": NO_RATE, "max_completion_length": NO_COUNT, "max_grad_norm": (*NO_RATE, 0),
    "warmup_steps": (-1,), "seed": (-1, 2**60), "monitor_every": NO_COUNT,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, bad",
    [
        (TrainingConfig, BAD_TRAINING),
        (PolicyGradientConfig, BAD_POLICY_GRADIENT),
        (GRPOConfig, BAD_GRPO),
    ],
)
def test_every_setting_is_checked_where_it_is_made(config, bad):
    assert bad.keys() == {field.name for field in dataclasses.fields(config)}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(SettingsError, match=f"^{name} must be .*got .*Try ") as error:
                config(**{name: value})
            assert str(value) in str(error.value)
    with pytest.raises(SettingsError):  # a changed copy is checked too
        dataclasses.replace(config(), steps=0)


def test_the_ends_of_each_range_are_allowed():
    TrainingConfig(
        steps=1, batch_size=1, micro_batch_size=1, block_size=1, learning_rate=1e30,
        warmup_steps=0, weight_decay=0, max_grad_norm=1, seed=2**32 - 1, checkpoint_every=1,
        monitor_every=1,
    )  # fmt: skip
    PolicyGradientConfig(beta=0, kl_gain=0, gamma=0.0, gae_lambda=1, target_kl=6)


@pytest.mark.parametrize(
    "name, value",
    [("prompts", 0), ("held_out", -1), ("samples", 1), ("max_new_tokens", 0), ("beta", math.nan)],
)
def test_the_demo_checks_its_numbers_before_any_work(name, value, tmp_path):
    with pytest.raises(SettingsError, match=f"^{name} must be"):
        demo(tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value",
    [("rounds", 0), ("rounds", 10), ("samples", 1), ("max_new_tokens", 0), ("beta", 0.0)],
)
def test_online_dpo_checks_its_numbers_before_any_work(name, value):
    config = TrainingConfig(steps=5)
    with pytest.raises(SettingsError, match=f"^{name} must be"):
        online_dpo(None, None, None, ["a"] * 9, None, config, **{name: value})
    with pytest.raises(ValueError, match="from 1 to 3, got 4. Each needs a new prompt"):
        online_dpo(None, None, None, ["a"] * 3, None, config, rounds=4)


@pytest.mark.parametrize("name", ["n", "max_new_tokens"])
def test_evaluate_checks_its_numbers(name):
    with pytest.raises(SettingsError, match=f"^{name} must be"):
        evaluate(None, None, None, ["a"], None, **{name: 0})


def test_settings_load_nothing_heavy():
    code = "import dpo_mini.settings, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
