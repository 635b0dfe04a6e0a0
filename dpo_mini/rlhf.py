"""What DPO replaces: a reward model fitted to preferences, then policy gradients on its reward.

DPO keeps two models and reads a fixed data set. Here there are four (policy, reference, reward,
value), and the policy's own samples are the data. A reward is a function from completions to a
tensor [completions]: `learned_reward` makes one of a reward model, `text_reward` one of any judge
of texts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mini.checkpoints import stop_unless_finite
from dpo_mini.fast_logprobs import different_rows
from dpo_mini.logprobs import token_logps
from dpo_mini.models import without_dropout
from dpo_mini.sampling import Completion, sample_completions
from dpo_mini.settings import (
    LARGEST_SEED,
    MOST_ITEMS,
    MOST_TOKENS,
    TrainingError,
    check_settings,
    setting,
)
from dpo_mini.tokens import Batch, TokenizedPair, collate
from dpo_mini.training import Objective, batch_indices

Reward = Callable[[Sequence[Completion]], Tensor]


class ScalarModel(nn.Module):
    """A copy of a language model's body with one number at each position, 0 before training.

    A reward model reads the number at the last token; a value model the number at every token, the
    reward still to come. `forward` takes [batch, length] ids and mask, returns [batch, length].
    """

    def __init__(self, model):
        super().__init__()
        self.body = copy.deepcopy(model.base_model)
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(model.device, model.dtype)

    @property
    def device(self):
        return self.head.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.body(**inputs, position_ids=position_ids).last_hidden_state
        return self.head(hidden).squeeze(-1)


# --- the reward model ---


def sequence_rewards(model: ScalarModel, rows: Sequence[tuple]) -> Tensor:
    """r(x, y) [rows] of (prompt ids, completion ids): the number at the last token."""
    batch = collate(rows).to(model.device)
    last = batch.attention_mask.sum(1, keepdim=True) - 1
    return model(batch.input_ids, batch.attention_mask).gather(1, last).squeeze(1)


def reward_objective() -> Objective:
    """Items are `TokenizedPair`s; the loss is -log sigmoid(r(x, y_w) - r(x, y_l)).

    Rafailov et al. 2023, equation 2: the likelihood of the labels under Bradley-Terry. What stands
    in the place of `Objective.logps` is the margin r(x, y_w) - r(x, y_l), [pairs].
    """

    def margins(model, pairs: Sequence[TokenizedPair]) -> Tensor:
        rows, index = different_rows([row for pair in pairs for row in pair.rows])
        scores = sequence_rewards(model, rows)[index.to(model.device)].view(-1, 2)
        return scores[:, 0] - scores[:, 1]

    def metrics(margins: Tensor) -> dict[str, Tensor]:
        margins = margins.detach()
        return {"rewards/margins": margins, "rewards/accuracies": (1 + torch.sign(margins)) / 2}

    return Objective(margins, loss=lambda margins: -F.logsigmoid(margins), metrics=metrics)


def learned_reward(model: ScalarModel, batch_size: int = 128) -> Reward:
    @torch.no_grad()
    def reward(completions: Sequence[Completion]) -> Tensor:
        rows = [(c.prompt_ids, c.ids) for c in completions]
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return torch.cat([sequence_rewards(model, part).cpu() for part in parts])

    return reward


def text_reward(judge: Callable[[Sequence[str]], Tensor]) -> Reward:
    """The reward of a judge of texts, such as `load_reward()`: the true one, in this course."""
    return lambda completions: judge([c.full_text for c in completions])


def normalised(reward: Reward, completions: Sequence[Completion]) -> Reward:
    """`reward` with mean 0 and standard deviation 1 over `completions` of the reference.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2. It changes the unit that beta is in.
    """
    scores = reward(completions)
    mean, deviation = scores.mean(), scores.std()
    return lambda completions: (reward(completions) - mean) / deviation


def best_of(samples: Sequence[Sequence[Completion]], reward: Reward) -> list[Completion]:
    """Of each prompt's completions the one with the highest reward: best-of-n, without training."""
    scores = reward([completion for row in samples for completion in row])
    best, start = [], 0
    for row in samples:
        own = scores[start : start + len(row)]  # the rewards are flat, prompt after prompt
        best.append(row[int(own.argmax())])
        start += len(row)
    return best


# --- policy gradients ---


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Of `reinforce` and `ppo`; what only PPO uses comes last.

    Every number is checked here. Raises SettingsError for one out of range.
    """

    steps: int = setting(35, "optimiser steps")
    batch_size: int = setting(64, "completions per step", most=MOST_ITEMS)
    learning_rate: float = setting(1e-4, "peak learning rate", above=True)
    beta: float = setting(
        0.1, "weight of the KL penalty (at the start, where there is a target)",
        "Try 0.1, or 0 for no penalty.",
    )  # fmt: skip
    target_kl: float | None = setting(
        None, "nats a completion; None: beta stays", "Try 6, or None: then beta stays.", above=True
    )
    kl_gain: float = setting(1.0, "how fast beta follows the KL")
    max_new_tokens: int = setting(32, "longest completion", most=MOST_TOKENS)
    max_grad_norm: float = setting(
        1.0, "a longer gradient is scaled down to this length", above=True
    )
    warmup_steps: int = setting(3, "steps of linear warm-up", least=0)
    seed: int = setting(0, "of prompts and samples", least=0, most=LARGEST_SEED)
    monitor_every: int = setting(10, "steps between measurements")
    samples: int = setting(
        4, "REINFORCE: completions of each prompt, each other's baseline", most=MOST_ITEMS
    )
    epochs: int = setting(2, "PPO: passes over each step's completions")
    minibatch_size: int = setting(32, "PPO: completions per gradient", most=MOST_ITEMS)
    clip: float = setting(0.2, "PPO: how far the ratio may move", above=True)
    # Above 1, what is far ahead would count for more than what is near.
    gamma: float = setting(1.0, "PPO: discount of a later reward", most=1)
    gae_lambda: float = setting(0.95, "PPO: discount of a later surprise", most=1)

    def __post_init__(self):
        check_settings(self)


class Rollout(NamedTuple):
    """Completions of the policy and what was known of them when they were sampled.

    Tensors [batch, length - 1] have their entry t - 1 for token t, as `token_logps`.
    """

    batch: Batch
    mask: Tensor  # 1 on completion tokens
    scores: Tensor  # r(x, y), [batch]
    logps: Tensor  # log pi of each token
    reference_logps: Tensor

    @property
    def kl(self) -> Tensor:
        """log pi(y | x) - log pi_ref(y | x) [batch], whose mean estimates the sequence KL."""
        return ((self.logps - self.reference_logps) * self.mask).sum(1)


@torch.no_grad()
def rollout(policy, reference, tokenizer, prompts, reward: Reward, n, max_new_tokens, seed):
    """`n` completions of each prompt from the policy, scored: a `Rollout` of len(prompts) * n."""
    drawn = sample_completions(policy, tokenizer, prompts, n, max_new_tokens, seed=seed)
    completions = [c for row in drawn for c in row]
    batch = collate([(c.prompt_ids, c.ids) for c in completions]).to(policy.device)
    logps, reference_logps = (
        token_logps(model, batch.input_ids, batch.attention_mask) for model in (policy, reference)
    )
    scores = reward(completions).to(logps)
    return Rollout(batch, batch.completion_mask[:, 1:], scores, logps, reference_logps)


def leave_one_out(returns: Tensor) -> Tensor:
    """Each return minus the mean of the others of its prompt, [prompts, samples].

    A baseline that does not depend on the sample itself leaves the gradient's mean as it is (Kool
    et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    """
    n = returns.shape[1]
    return (returns - returns.mean(1, keepdim=True)) * n / (n - 1)


def reinforce(
    policy, reference, tokenizer, prompts, reward: Reward, config, monitor=None
) -> list[dict]:
    """REINFORCE with a leave-one-out baseline, changing the policy in place. Returns the log.

    The whole completion is one action with return r(x, y) - beta log(pi(y|x) / pi_ref(y|x)): one
    step along advantage * grad log pi(y|x) for each batch of fresh samples.
    """
    if config.samples < 2 or config.batch_size % config.samples:
        raise TrainingError(
            f"{config.batch_size} completions a step, {config.samples} samples of each prompt: "
            "expected two or more samples, and as many of every prompt."
        )
    for model in (policy, reference):
        without_dropout(model)
    optimizer = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0.0)
    n_prompts = config.batch_size // config.samples

    def update_policy(step: int, beta: float):
        sampled = rollout_of_step(
            step, policy, reference, tokenizer, prompts, reward, n_prompts, config.samples, config
        )
        returns = sampled.scores - beta * sampled.kl  # [batch]: of whole completions
        advantages = leave_one_out(returns.view(n_prompts, config.samples)).flatten()
        logps = token_logps(policy, sampled.batch.input_ids, sampled.batch.attention_mask)
        loss = -(advantages * (logps * sampled.mask).sum(1)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        stop_unless_finite(step, loss.item(), norm.item(), config.learning_rate)
        update(optimizer, step, config)
        return sampled, {"loss": loss.item(), "grad_norm": norm.item()}

    return sample_and_update(policy, update_policy, config, monitor)


def ppo(
    policy, reference, value: ScalarModel, tokenizer, prompts, reward: Reward, config, monitor=None
) -> list[dict]:
    """Proximal policy optimization of r - beta KL, changing policy and value in place.

    Returns the log. Every token is an action: its reward is the KL penalty of `token_rewards`, its
    advantage comes from `value` by `gae`. Schulman et al. 2017 (arXiv 1707.06347), as used for
    language models by Ziegler et al. 2019 and Ouyang et al. 2022 (arXiv 2203.02155).
    """
    for model in (policy, reference, value):
        without_dropout(model)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)

    def update_both(step: int, beta: float):
        sampled = rollout_of_step(
            step, policy, reference, tokenizer, prompts, reward, config.batch_size, 1, config
        )
        estimates = value_estimates(value, sampled, beta, config)
        order = torch.Generator().manual_seed(config.seed * 100_003 + step)
        metrics = []
        for _ in range(config.epochs):  # the same completions again, while the ratio stays near 1
            shuffled = torch.randperm(len(sampled.mask), generator=order)
            for part in shuffled.split(config.minibatch_size):
                losses = ppo_losses(policy, value, sampled, estimates, part, config.clip)
                (losses.policy + losses.value).backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                torch.nn.utils.clip_grad_norm_(value.parameters(), config.max_grad_norm)
                loss = losses.policy.item() + losses.value.item()
                stop_unless_finite(step, loss, norm.item(), config.learning_rate)
                update(optimizer, step, config)
                metrics.append([x.item() for x in (*losses, norm)])
        means = [sum(column) / len(metrics) for column in zip(*metrics)]
        return sampled, dict(zip(("policy_loss", "value_loss", "clipped", "grad_norm"), means))

    return sample_and_update(policy, update_both, config, monitor)


class ValueEstimates(NamedTuple):
    """What PPO's losses need of the value model as it was when the completions were sampled.

    All [batch, length - 1], their entry t - 1 for token t.
    """

    values: Tensor  # V(x, y_<t)
    returns: Tensor  # what the value should have been: advantage + value
    advantages: Tensor  # whitened over the batch's tokens


@torch.no_grad()
def value_estimates(value: ScalarModel, sampled: Rollout, beta: float, config) -> ValueEstimates:
    """Values, returns and whitened advantages of a rollout's tokens."""
    batch, mask = sampled.batch, sampled.mask
    values = value(batch.input_ids, batch.attention_mask)[:, :-1] * mask
    rewards = token_rewards(sampled, beta)
    advantages = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    return ValueEstimates(values, advantages + values, whitened(advantages, mask))


class PPOLosses(NamedTuple):
    """Three scalars; only the losses carry a gradient."""

    policy: Tensor
    value: Tensor
    clipped: Tensor  # the share of tokens whose ratio has moved by more than `clip`


def ppo_losses(
    policy, value: ScalarModel, sampled: Rollout, estimates: ValueEstimates, part: Tensor, clip
) -> PPOLosses:
    """PPO's losses on the completions `part` (int64 [minibatch]) of a rollout, means over tokens.

    Left out: an entropy bonus, which language models do without.
    """
    ids, attention = sampled.batch.input_ids[part], sampled.batch.attention_mask[part]
    mask, old_logps = sampled.mask[part], sampled.logps[part]
    values, returns, advantages = (tensor[part] for tensor in estimates)
    logps = token_logps(policy, ids, attention)
    policy_terms = clipped_loss(logps, old_logps, advantages, clip)
    value_terms = clipped_value_loss(value(ids, attention)[:, :-1], values, returns, clip)
    moved = (logps.detach() - old_logps).exp() - 1
    tokens = mask.sum()
    return PPOLosses(
        policy=(policy_terms * mask).sum() / tokens,
        value=(value_terms * mask).sum() / tokens,
        clipped=((moved.abs() > clip) * mask).sum() / tokens,
    )


def token_rewards(sampled: Rollout, beta: float) -> Tensor:
    """The reward of each token, [batch, length - 1]: -beta (log pi - log pi_ref) everywhere, and
    r(x, y) at the last. Their sum is r(x, y) - beta log(pi(y | x) / pi_ref(y | x)).
    """
    rewards = -beta * (sampled.logps - sampled.reference_logps) * sampled.mask
    last = sampled.batch.attention_mask.sum(1, keepdim=True) - 2  # entry t - 1 is token t's
    return rewards.scatter_add(1, last, sampled.scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma=1.0, lam=0.95) -> Tensor:
    """Generalised advantage estimates of each token, all tensors [batch, tokens].

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, with V = A = 0 after the
    last token (Schulman et al. 2015, arXiv 1506.02438, equation 16).
    """
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens that `mask` marks, 0 elsewhere."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean).square() * mask).sum() / mask.sum()
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def clipped_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token, ratio = pi / pi_old.

    Schulman et al. 2017, equation 7: once the ratio has moved by `clip` in the advantage's
    direction, there is nothing more to gain.
    """
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token, the worse of the value's and of the value's kept within
    `clip` of the old one.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def adapted_beta(beta: float, kl: float, target: float, gain: float) -> float:
    """A larger beta after a KL above the target, a smaller one after a KL below: the controller of
    Ziegler et al. 2019, section 2, its error kept within a fifth.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + gain * error)


# --- what both share ---


def sample_and_update(policy, update_models, config, monitor) -> list[dict]:
    """Both methods' loop: fresh completions, an update, beta following the KL. Returns the log.

    `update_models(step, beta) -> (Rollout, metrics)` samples from the policy, and changes it.
    """
    log, beta = [{"step": 0}], config.beta
    log[0] |= monitor(policy, log) if monitor else {}
    for step in range(1, config.steps + 1):
        sampled, metrics = update_models(step, beta)
        kl, score = sampled.kl.mean().item(), sampled.scores.mean().item()
        row = {"score": score, "sampled_kl": kl, "objective": score - beta * kl, "beta": beta}
        length = sampled.mask.sum().item() / len(sampled.mask)
        log.append({"step": step, **row, "length": length, **metrics})
        if config.target_kl:
            beta = adapted_beta(beta, kl, config.target_kl, config.kl_gain)
        if monitor and (step == config.steps or step % config.monitor_every == 0):
            log[-1] |= monitor(policy, log)
    return log


def rollout_of_step(
    step, policy, reference, tokenizer, prompts, reward, n_prompts, n, config
) -> Rollout:
    """The rollout of step 1, 2, ...: `n` completions of each of the next `n_prompts` prompts, in an
    order of `config.seed`.
    """
    order = batch_indices(len(prompts), step - 1, n_prompts, block_size=1, seed=config.seed)
    chosen = [prompts[i] for i in order]
    seed = config.seed * 100_003 + step
    length = config.max_new_tokens
    return rollout(policy, reference, tokenizer, chosen, reward, n, length, seed)


def update(optimizer, step: int, config) -> None:
    """The optimiser's step 1, 2, ..., at its rate: a linear warm-up, then constant."""
    rate = config.learning_rate * min(1, step / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
