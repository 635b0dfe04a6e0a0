"""How to run: typed settings, checked once, where they are made.

This room imports neither torch nor transformers, so that `--help` answers at once.
"""

import math
from dataclasses import dataclass

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


def check_real(name: str, value, least: float, advice: str, above=False) -> None:
    """Raise SettingsError unless `value` is a finite number, `least` or more (`above`: more)."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value < least or (above and value == least):
        bound = f"above {least:g}" if above else f"{least:g} or more"
        raise SettingsError(f"{name} must be a number, {bound}, got {value!r}. {advice}")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; what to minimise is the objective's business.

    Every number is checked here. Raises SettingsError for one out of range.
    """

    steps: int = 200
    batch_size: int = 32  # items (pairs or texts) per optimiser step, over all processes
    micro_batch_size: int | None = None  # items in memory at once; None: the whole batch
    block_size: int = 1  # neighbours shuffled as one: 6 keeps the pairs of 4 samples together
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    schedule: str = "linear"  # after the warm-up: "constant", "linear" or "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False  # autocast; log-probabilities stay in float32
    seed: int = 0
    checkpoint_every: int = 50
    monitor_every: int = 25

    def __post_init__(self):
        check_whole("steps", self.steps, 1, MOST_STEPS, "Try 200.")
        check_whole("batch_size", self.batch_size, 1, MOST_ITEMS, "Try 32.")
        if self.micro_batch_size is not None:
            advice = "Try 4, or leave it out: then the whole batch is in memory at once."
            check_whole("micro_batch_size", self.micro_batch_size, 1, MOST_ITEMS, advice)
        advice = "Try 1: every item is shuffled by itself."
        check_whole("block_size", self.block_size, 1, MOST_ITEMS, advice)
        advice = "Try 5e-5 for a large model, 2e-4 for the embedded one."
        check_real("learning_rate", self.learning_rate, 0, advice, above=True)
        advice = "Try 10, or 0 for no warm-up."
        check_whole("warmup_steps", self.warmup_steps, 0, MOST_STEPS, advice)
        if self.schedule not in SCHEDULES:
            raise SettingsError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}. "
                "Try linear."
            )
        check_real("weight_decay", self.weight_decay, 0, "Try 0.")
        check_real("max_grad_norm", self.max_grad_norm, 0, "Try 1.", above=True)
        if not isinstance(self.bf16, bool):
            raise SettingsError(f"bf16 must be true or false, got {self.bf16!r}. Try false.")
        check_whole("seed", self.seed, 0, LARGEST_SEED, "Try 0.")
        check_whole("checkpoint_every", self.checkpoint_every, 1, MOST_STEPS, "Try 50.")
        check_whole("monitor_every", self.monitor_every, 1, MOST_STEPS, "Try 25.")
