"""What DPO replaces: a reward model fitted to preferences, then policy gradients on its reward.

DPO keeps two models and reads a fixed data set. Here there are four (policy, reference, reward,
value), and the policy's own samples are the data. A reward is a function from completions to a
tensor [completions]: `learned_reward` makes one of a reward model, `text_reward` one of any judge
of texts.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mini.checkpoints import TrainingError
from dpo_mini.fast_logprobs import different_rows
from dpo_mini.logprobs import token_logps
from dpo_mini.sampling import Completion, sample_completions
from dpo_mini.settings import TrainingConfig
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

    Rafailov et al. 2023, equation 2: the likelihood of the labels under Bradley-Terry.
    """

    def losses(model, pairs: Sequence[TokenizedPair]):
        rows, index = different_rows([row for pair in pairs for row in pair.rows])
        scores = sequence_rewards(model, rows)[index.to(model.device)].view(-1, 2)
        margins = scores[:, 0] - scores[:, 1]
        accuracies = (1 + torch.sign(margins.detach())) / 2
        metrics = {"rewards/margins": margins.detach(), "rewards/accuracies": accuracies}
        return -F.logsigmoid(margins).sum(), metrics

    return Objective(terms=lambda pair: 1, losses=losses)


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
    scores = iter(reward([c for row in samples for c in row]).tolist())
    return [max(row, key=lambda _: next(scores)) for row in samples]


# --- policy gradients ---


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Of `reinforce` and `ppo`; what only PPO uses comes last."""

    steps: int = 35
    batch_size: int = 64  # completions per step
    learning_rate: float = 1e-4
    beta: float = 0.1  # weight of the KL penalty (at the start, where there is a target)
    target_kl: float | None = None  # nats a completion; None: beta stays
    kl_gain: float = 1.0  # how fast beta follows the KL
    max_new_tokens: int = 32
    max_grad_norm: float = 1.0
    warmup_steps: int = 3
    seed: int = 0
    monitor_every: int = 10
    samples: int = 4  # REINFORCE: completions of each prompt, each other's baseline
    epochs: int = 2  # PPO: passes over each step's completions
    minibatch_size: int = 32
    clip: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95


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
    optimizer = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0.0)
    n_prompts = config.batch_size // config.samples

    def step(numbered, beta):
        seen = rollout_of_step(
            numbered, policy, reference, tokenizer, prompts, reward, n_prompts, config.samples,
            config,
        )  # fmt: skip
        returns = seen.scores - beta * seen.kl
        advantages = leave_one_out(returns.view(n_prompts, config.samples)).flatten()
        logps = token_logps(policy, seen.batch.input_ids, seen.batch.attention_mask)
        loss = -(advantages * (logps * seen.mask).sum(1)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        update(optimizer, numbered, config)
        return seen, {"loss": loss.item(), "grad_norm": norm.item()}

    return ascend(policy, step, config, monitor)


def ppo(
    policy, reference, value: ScalarModel, tokenizer, prompts, reward: Reward, config, monitor=None
) -> list[dict]:
    """Proximal policy optimization of r - beta KL, changing policy and value in place.

    Returns the log. Every token is an action: its reward is the KL penalty of `token_rewards`, its
    advantage comes from `value` by `gae`. Schulman et al. 2017 (arXiv 1707.06347), as used for
    language models by Ziegler et al. 2019 and Ouyang et al. 2022 (arXiv 2203.02155).
    """
    models = (policy, value)
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)

    def step(numbered, beta):
        seen = rollout_of_step(
            numbered, policy, reference, tokenizer, prompts, reward, config.batch_size, 1, config
        )
        ids, attention = seen.batch.input_ids, seen.batch.attention_mask
        with torch.no_grad():
            values = value(ids, attention)[:, :-1] * seen.mask
        advantages = gae(
            token_rewards(seen, beta), values, seen.mask, config.gamma, config.gae_lambda
        )
        returns = advantages + values
        weights = whitened(advantages, seen.mask)
        sums = dict.fromkeys(("policy_loss", "value_loss", "clipped", "grad_norm"), 0.0)
        order = torch.Generator().manual_seed(config.seed * 100_003 + numbered)
        for _ in range(config.epochs):
            for part in torch.randperm(len(ids), generator=order).split(config.minibatch_size):
                mask, tokens = seen.mask[part], seen.mask[part].sum()
                logps = token_logps(policy, ids[part], attention[part])
                policy_terms = clipped_loss(logps, seen.logps[part], weights[part], config.clip)
                new_values = value(ids[part], attention[part])[:, :-1]
                value_terms = clipped_value_loss(
                    new_values, values[part], returns[part], config.clip
                )
                policy_loss = (policy_terms * mask).sum() / tokens
                value_loss = (value_terms * mask).sum() / tokens
                (policy_loss + value_loss).backward()
                norm, _ = (
                    torch.nn.utils.clip_grad_norm_(m.parameters(), config.max_grad_norm)
                    for m in models
                )
                update(optimizer, numbered, config)
                moved = (logps.detach() - seen.logps[part]).exp() - 1
                clipped = ((moved.abs() > config.clip) * mask).sum() / tokens
                found = (policy_loss.item(), value_loss.item(), clipped.item(), norm.item())
                sums = {k: sums[k] + v for k, v in zip(sums, found)}
        parts = config.epochs * math.ceil(len(ids) / config.minibatch_size)
        return seen, {k: v / parts for k, v in sums.items()}

    return ascend(policy, step, config, monitor)


def token_rewards(seen: Rollout, beta: float) -> Tensor:
    """The reward of each token, [batch, length - 1]: -beta (log pi - log pi_ref) everywhere, and
    r(x, y) at the last. Their sum is r(x, y) - beta log(pi(y | x) / pi_ref(y | x)).
    """
    rewards = -beta * (seen.logps - seen.reference_logps) * seen.mask
    last = seen.batch.attention_mask.sum(1, keepdim=True) - 2  # entry t - 1 is token t's
    return rewards.scatter_add(1, last, seen.scores[:, None])


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


def ascend(policy, step, config, monitor) -> list[dict]:
    """`config.steps` times `step(number, beta) -> (Rollout, metrics)`, beta following the KL."""
    log, beta = [{"step": 0}], config.beta
    log[0] |= monitor(policy, log) if monitor else {}
    for number in range(1, config.steps + 1):
        seen, metrics = step(number, beta)
        kl, score = seen.kl.mean().item(), seen.scores.mean().item()
        found = {"score": score, "sampled_kl": kl, "objective": score - beta * kl, "beta": beta}
        length = seen.mask.sum().item() / len(seen.mask)
        log.append({"step": number, **found, "length": length, **metrics})
        if config.target_kl:
            beta = adapted_beta(beta, kl, config.target_kl, config.kl_gain)
        if monitor and (number == config.steps or number % config.monitor_every == 0):
            log[-1] |= monitor(policy, log)
    return log


def rollout_of_step(
    number, policy, reference, tokenizer, prompts, reward, n_prompts, n, config
) -> Rollout:
    """The rollout of step 1, 2, ...: the next `n_prompts` prompts, in an order of `config.seed`."""
    order = TrainingConfig(batch_size=n_prompts, seed=config.seed)
    chosen = [prompts[i] for i in batch_indices(len(prompts), number - 1, order)]
    seed = config.seed * 100_003 + number
    length = config.max_new_tokens
    return rollout(policy, reference, tokenizer, chosen, reward, n, length, seed)


def update(optimizer, number: int, config) -> None:
    """One optimiser step at the rate of step 1, 2, ...: a linear warm-up, then constant."""
    rate = config.learning_rate * min(1, number / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
