"""GRPO: policy gradients without a value model, on rewards that a program can check.

Several completions of one prompt are a group, and each is judged beside its group. Shao et al. 2024
(arXiv 2402.03300) proposed it; Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) and DAPO (Yu et al.
2025, arXiv 2503.14476) change how it is averaged. Arguments have TRL's names, and the loss is TRL's
number.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_mini.checkpoints import stop_unless_finite
from dpo_mini.logprobs import token_logps
from dpo_mini.models import without_dropout
from dpo_mini.rlhf import Reward, Rollout, rollout, update
from dpo_mini.sampling import Completion
from dpo_mini.settings import (
    LARGEST_SEED,
    MOST_ITEMS,
    MOST_TOKENS,
    SettingsError,
    TrainingError,
    check_settings,
    setting,
)
from dpo_mini.training import batch_indices

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")

# --- rewards that a program can check: pure functions of a text ---

FIRST_SENTENCE = re.compile(r"(.*?)[.!?]+[\"'”’)]*(?=\s|$)", flags=re.DOTALL)
WORD = re.compile(r"[^\W_](?:[\w'’.-]*\w)?")


def first_sentence_words(text: str) -> int | None:
    """How many words the first sentence of `text` has; None where no sentence ends.

    first_sentence_words(" was a real joy! I") is 4. A dot inside a number ends nothing.
    """
    found = FIRST_SENTENCE.match(text)
    return None if found is None else len(WORD.findall(found[1]))


def lacks_letter(text: str, letter: str, words: int) -> bool:
    """Whether the first `words` words of `text`, and there are as many, do without `letter`."""
    found = WORD.findall(text)[:words]
    return len(found) == words and letter.lower() not in " ".join(found).lower()


def verified_reward(passes: Callable[[str], bool]) -> Reward:
    """1 for a completion whose own text passes, else 0. The prompt is not asked."""

    def reward(completions: Sequence[Completion]) -> Tensor:
        return torch.tensor([float(passes(c.text)) for c in completions])

    return reward


# --- the loss ---


def group_advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Each reward minus the mean of its prompt's, [prompts, generations] as `rewards`.

    `scale_rewards`: "group" divides by the standard deviation of the prompt's rewards (Shao et al.
    2024, section 4.1.2), "batch" by that of all, "none" by nothing (Liu et al. 2025). A group whose
    rewards are all alike has advantages of 0: it teaches nothing. Raises SettingsError for another
    word.
    """
    if scale_rewards not in SCALES:
        raise SettingsError(f"scale_rewards is one of {SCALES}, got {scale_rewards!r}.")
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred
    spread = rewards.std(1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centred / (spread + 1e-4)  # as much as TRL adds


def token_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """An estimate of KL(pi || pi_ref) from the token that was drawn, never negative; any shape.

    q - 1 - log q with q = pi_ref / pi (Shao et al. 2024, equation 4). Its mean over pi's own tokens
    is the KL: that of q - 1 is 0. As a loss it pulls otherwise: its gradient is an estimate of the
    gradient of KL(pi_ref || pi).
    """
    log_q = reference_logps - logps
    return log_q.exp() - 1 - log_q


def grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, *,
    loss_type: str = "grpo", epsilon: float = 0.2, epsilon_high: float | None = None,
    beta: float = 0.0, reference_logps: Tensor | None = None,
    max_completion_length: int | None = None,
) -> Tensor:  # fmt: skip
    """A scalar: -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta KL of each token
    of [batch, length], averaged as `loss_type` says. ratio = pi / pi_old.

    `advantages` [batch]: all tokens of a completion share one. "grpo": the mean over each
    completion's tokens, then over completions (Shao et al. 2024, equation 3). "dapo": the mean over
    all tokens of the batch (Yu et al. 2025, equation 8; TRL's "bnpo" and, for a whole batch, its
    "dapo"). "dr_grpo": the sum, divided by the number that the batch could have at most, batch
    times `max_completion_length` (Liu et al. 2025, section 3.2). `epsilon_high`: `epsilon` where it
    is left out. Raises SettingsError for another word, or for what a choice needs and lacks.
    """
    if loss_type not in LOSS_TYPES:
        raise SettingsError(f"loss_type is one of {LOSS_TYPES}, got {loss_type!r}.")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise SettingsError("dr_grpo divides by max_completion_length: give the limit of sampling.")
    if beta and reference_logps is None:
        raise SettingsError(f"with beta {beta:g} there is a KL penalty: give reference_logps.")
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (logps - old_logps).exp()
    each = advantages[:, None]
    losses = -torch.minimum(ratio * each, ratio.clamp(1 - epsilon, 1 + high) * each)
    if beta:
        losses = losses + beta * token_kl(logps, reference_logps)
    sums, lengths = (losses * completion_mask).sum(1), completion_mask.sum(1)
    if loss_type == "grpo":
        return (sums / lengths.clamp(min=1)).mean()
    if loss_type == "dapo":
        return sums.sum() / lengths.sum().clamp(min=1)
    return sums.sum() / (len(sums) * max_completion_length)


# --- the loop ---


@dataclass(frozen=True)
class GRPOConfig:
    """Of `grpo`. Every number is checked here; raises SettingsError for one out of range."""

    steps: int = setting(16, "optimiser steps")
    batch_size: int = setting(64, "completions a step", most=MOST_ITEMS)
    num_generations: int = setting(
        8, "completions of each prompt: a group", least=2, most=MOST_ITEMS
    )
    num_iterations: int = setting(1, "updates from a step's completions; with one, no clip acts")
    learning_rate: float = setting(3e-4, "peak learning rate", above=True)
    loss_type: str = setting("grpo", "how the tokens are averaged", choices=LOSS_TYPES)
    scale_rewards: str = setting("group", "what an advantage is divided by", choices=SCALES)
    epsilon: float = setting(0.2, "how far the ratio may move", above=True)
    epsilon_high: float | None = setting(
        None, "how far upwards; None: as epsilon", "Try 0.28, or None.", above=True
    )
    beta: float = setting(0.0, "of the KL penalty in the loss", "Try 0.04, or 0 for no penalty.")
    max_completion_length: int = setting(32, "tokens of the longest completion", most=MOST_TOKENS)
    max_grad_norm: float = setting(
        1.0, "a longer gradient is scaled down to this length", above=True
    )
    warmup_steps: int = setting(3, "steps of linear warm-up", least=0)
    seed: int = setting(0, "of prompts and samples", least=0, most=LARGEST_SEED)
    monitor_every: int = setting(10, "steps between measurements")

    def __post_init__(self):
        check_settings(self)


def grpo(
    policy, reference, tokenizer, prompts, reward: Reward, config: GRPOConfig, monitor=None
) -> list[dict]:
    """Group relative policy optimisation, changing the policy in place. Returns the log.

    Each step samples `num_generations` completions of new prompts and takes `num_iterations` steps
    of AdamW on `grpo_loss`. The reference enters the loss where `beta` is above 0; the log has the
    sampled KL from it always. Raises TrainingError where the batch is no whole number of groups.
    """
    n_prompts, left = divmod(config.batch_size, config.num_generations)
    if left:
        raise TrainingError(
            f"{config.batch_size} completions a step, {config.num_generations} generations of each "
            "prompt: expected as many of every prompt."
        )
    for model in (policy, reference):
        without_dropout(model)
    optimizer = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0.0)
    log: list[dict] = [{"step": 0}]
    log[0] |= monitor(policy, log) if monitor else {}
    for step in range(1, config.steps + 1):
        order = batch_indices(len(prompts), step - 1, n_prompts, block_size=1, seed=config.seed)
        sampled = rollout(
            policy, reference, tokenizer, [prompts[i] for i in order], reward,
            config.num_generations, config.max_completion_length, config.seed * 100_003 + step,
        )  # fmt: skip
        rewards = sampled.scores.view(n_prompts, config.num_generations)
        advantages = group_advantages(rewards, config.scale_rewards).flatten()
        for _ in range(config.num_iterations):  # the same completions, while the ratio is near 1
            loss, clipped = loss_of_rollout(policy, sampled, advantages, config)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            stop_unless_finite(step, loss.item(), norm.item(), config.learning_rate)
            update(optimizer, step, config)
        row = {"step": step, "score": rewards.mean().item(), "sampled_kl": sampled.kl.mean().item()}
        row["silent_groups"] = (rewards.std(1) == 0).double().mean().item()
        row["length"] = sampled.mask.sum().item() / len(sampled.mask)
        log.append(row | {"loss": loss.item(), "clipped": clipped, "grad_norm": norm.item()})
        if monitor and (step == config.steps or step % config.monitor_every == 0):
            log[-1] |= monitor(policy, log)
    return log


def loss_of_rollout(
    policy, sampled: Rollout, advantages: Tensor, config: GRPOConfig
) -> tuple[Tensor, float]:
    """`grpo_loss` of a rollout under the policy as it is now, and the share of its tokens whose
    ratio is outside the clip.
    """
    batch, mask = sampled.batch, sampled.mask
    logps = token_logps(policy, batch.input_ids, batch.attention_mask)
    loss = grpo_loss(
        logps, sampled.logps, advantages, mask, loss_type=config.loss_type, epsilon=config.epsilon,
        epsilon_high=config.epsilon_high, beta=config.beta,
        reference_logps=sampled.reference_logps,
        max_completion_length=config.max_completion_length,
    )  # fmt: skip
    ratio, high = (logps.detach() - sampled.logps).exp(), config.epsilon_high or config.epsilon
    outside = (ratio < 1 - config.epsilon) | (ratio > 1 + high)
    return loss, ((outside * mask).sum() / mask.sum()).item()
