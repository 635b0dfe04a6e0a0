"""How to run: typed settings, checked once, where they are made.

This room imports neither torch nor transformers, so that `--help` answers at once.
"""

import math
from dataclasses import dataclass, field, fields
from typing import get_args

MOST_STEPS = 10**9  # what is beyond these bounds is a slip of the keyboard, not a wish
MOST_ITEMS = 10**6
MOST_TOKENS = 10**6
LARGEST_SEED = 2**32 - 1
# The names in family.LOSSES, and KTO's: here too, since importing family.py would load torch.
LOSS_NAMES = (
    "dpo", "cdpo", "robust", "dpo-norm", "ipo", "ipo-token", "hinge", "apo-zero", "apo-down",
    "rpo", "dpo-positive", "r-dpo", "chi-po",
    "simpo", "cpo", "orpo", "preferred-ft", "unlikelihood", "kto",
)  # fmt: skip
SCHEDULES = ("constant", "linear", "cosine")


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, what is safe, and what to try."""


class SettingsError(ValueError):
    """A setting out of range; the message says what was expected, what came and what to try."""


def check_whole(name: str, value, least: int, most: int, advice: str) -> None:
    """Raise SettingsError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingsError(
            f"{name} must be a whole number from {least} to {most}, got {value!r}. {advice}"
        )


def check_real(name: str, value, least: float, advice: str, above=False, most=math.inf) -> None:
    """Raise SettingsError unless `value` is a finite number, `least` or more (`above`: more), and
    `most` or less.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and math.isfinite(value)
    if not finite or not least <= value <= most or (above and value == least):
        bound = f"above {least:g}" if above else f"{least:g} or more"
        if most < math.inf:
            bound = f"from {least:g} to {most:g}"
        raise SettingsError(f"{name} must be a number, {bound}, got {value!r}. {advice}")


def setting(default, help: str, advice: str | None = None, **bounds):
    """A dataclass field that is a setting: what it is, what to try instead of a wrong value, and
    its bounds, which `check_settings` holds.

    `least` (of a whole number 1, of a real one 0, unless said), `most`, `above=True` (more than 0);
    `choices` of a name.
    """
    words = {"help": help, "advice": advice or f"Try {default}."}
    return field(default=default, metadata=words | bounds)


def check_settings(settings) -> None:
    """Raise SettingsError for the first field of a dataclass of settings that is out of range."""
    for f in fields(settings):
        name, value, bounds = f.name, getattr(settings, f.name), f.metadata
        kinds, advice = get_args(f.type) or (f.type,), bounds["advice"]
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            check_whole(name, value, bounds.get("least", 1), bounds.get("most", MOST_STEPS), advice)
        elif float in kinds:
            above, most = bounds.get("above", False), bounds.get("most", math.inf)
            check_real(name, value, 0, advice, above, most)
        elif value not in bounds["choices"] or (bool in kinds and not isinstance(value, bool)):
            choices = ", ".join(str(choice) for choice in bounds["choices"])
            raise SettingsError(f"{name} must be one of {choices}, got {value!r}. {advice}")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; what to minimise is the objective's business.

    Every number is checked here. Raises SettingsError for one out of range.
    """

    steps: int = setting(200, "optimiser steps")
    batch_size: int = setting(
        32, "items (pairs or texts) per step, over all processes", most=MOST_ITEMS
    )
    micro_batch_size: int | None = setting(
        None, "items in memory at once (fewer: less memory, same result)",
        "Try 4, or leave it out: then the whole batch is in memory at once.", most=MOST_ITEMS,
    )  # fmt: skip
    block_size: int = setting(
        1, "neighbours in the data that stay together when it is shuffled: 6 keeps the pairs of 4 "
        "samples in one batch, where their prompt is read once",
        "Try 1: every item is shuffled by itself.", most=MOST_ITEMS,
    )  # fmt: skip
    learning_rate: float = setting(
        5e-5, "peak learning rate of AdamW",
        "Try 5e-5 for a large model, 2e-4 for the embedded one.", above=True,
    )  # fmt: skip
    warmup_steps: int = setting(
        10, "steps of linear warm-up, by default half of all steps at most",
        "Try 10, or 0 for no warm-up.", least=0,
    )  # fmt: skip
    schedule: str = setting(
        "linear", "learning rate after the warm-up: constant, linear or cosine", choices=SCHEDULES
    )
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(
        1.0, "a longer gradient is scaled down to this length", above=True
    )
    bf16: bool = setting(  # log-probabilities and the loss stay in float32
        False, "bfloat16 autocast (by default from 20 million parameters on, where it is faster)",
        choices=(True, False),
    )  # fmt: skip
    seed: int = setting(0, "of the order of the data", least=0, most=LARGEST_SEED)
    checkpoint_every: int = setting(50, "steps between checkpoints")
    monitor_every: int = setting(25, "steps between measurements on held-out prompts")

    def __post_init__(self):
        check_settings(self)
