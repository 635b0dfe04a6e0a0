"""How to run: typed settings, checked once, where they are made."""

from dataclasses import dataclass


class SettingsError(ValueError):
    """A setting is out of range; the message says which, what was expected and what came."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; what to minimise is the objective's business."""

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
