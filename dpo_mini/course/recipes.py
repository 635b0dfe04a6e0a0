"""What notebook 08 runs with: the embedded model on a CPU, or GPT-2 on whatever is there."""

from dataclasses import dataclass, replace

import torch

from dpo_mini.demo import DEMO_CONFIG
from dpo_mini.models import EMBEDDED
from dpo_mini.settings import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that a whole run, SFT to evaluation, needs to know."""

    model: str  # "embedded", a folder, or a name on the Hub
    dataset: str | None  # a folder or a name on the Hub; None: the embedded prompts, no SFT
    reward: str
    prompts: int
    held_out: int
    samples: int
    max_new_tokens: int
    beta: float
    sft: TrainingConfig | None
    dpo: TrainingConfig


def recipe(
    model: str = EMBEDDED, dataset: str = "stanfordnlp/imdb",
    reward: str = "siebert/sentiment-roberta-large-english", memory: float | None = None,
    bf16: bool | None = None,
) -> Recipe:  # fmt: skip
    """The settings for a model on this machine.

    For the embedded model, those of the stored beta sweep. For any other, GPT-2's (Rafailov et al.
    2023, appendix C.1, and its replications), with bfloat16 where the GPU computes in it, and as
    many pairs in memory at once as `memory` (GiB, free; asked of the GPU unless given) holds.
    """
    if model == EMBEDDED:
        dpo = replace(DEMO_CONFIG, monitor_every=55)
        return Recipe(model, None, EMBEDDED, 1100, 256, 4, 32, 0.5, None, dpo)
    cuda = torch.cuda.is_available()
    if memory is None:
        memory = torch.cuda.mem_get_info()[0] / 2**30 if cuda else 8.0
    if bf16 is None:
        bf16 = cuda and torch.cuda.is_bf16_supported()
    dpo = TrainingConfig(
        steps=1000, batch_size=60, block_size=6, micro_batch_size=micro_batch(memory, 60, 6),
        learning_rate=5e-6, warmup_steps=150, schedule="constant", bf16=bf16, monitor_every=100,
    )  # fmt: skip
    # A text of 256 tokens needs what two or three pairs do: an eighth of the memory is cautious.
    sft = TrainingConfig(
        steps=780, batch_size=32, micro_batch_size=micro_batch(memory / 8, 32, 1),
        learning_rate=5e-5, warmup_steps=50, schedule="cosine", bf16=bf16, checkpoint_every=390,
    )  # fmt: skip
    return Recipe(model, dataset, reward, 10_000, 512, 4, 48, 0.1, sft, dpo)


def micro_batch(memory: float, batch_size: int, block: int) -> int | None:
    """The largest number of pairs at once, a divisor of the batch in whole blocks, that fits.

    An estimate for GPT-2 (124M), not a measurement: 2.5 GiB for weights, gradients and Adam's
    averages, and for each pair, two sequences of 56 tokens, 0.15 GiB, most of it logits of 50,257
    tokens in float32.
    """
    room = max(1, int((0.8 * memory - 2.5) / 0.15))
    fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= room]
    whole = [n for n in fitting if n % block == 0] or fitting
    return None if whole[-1] == batch_size else whole[-1]
