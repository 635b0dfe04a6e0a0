"""What training did, each number with its interval: reward, sequence KL, preference accuracy, win
rate, diversity.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.data import as_text
from dpo_mini.sampling import Completion, sample_completions
from dpo_mini.tokens import collate


class Estimate(NamedTuple):
    """A mean and the ends of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Tensor, groups: Sequence | None = None) -> Estimate:
    """The mean of `values` [n] with its normal interval, mean ± 1.96 standard errors.

    `groups` [n]: values of one group (completions of one prompt, pairs of one prompt) are not
    independent, so that groups are what is counted: the standard error is that of a ratio of group
    sums.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean()
    _, index = torch.unique(
        torch.tensor(groups if groups is not None else range(len(values))), return_inverse=True
    )
    count = int(index.max()) + 1
    residuals = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values - mean)
    error = float(
        residuals.square().sum().sqrt() / len(values) * math.sqrt(count / max(1, count - 1))
    )
    return Estimate(float(mean), float(mean) - 1.96 * error, float(mean) + 1.96 * error)


def win_rate(policy_rewards: Tensor, reference_rewards: Tensor) -> Estimate:
    """How often the policy's completion beats the reference's, prompt by prompt; a tie counts half.

    Two tensors [n]; Wilson's interval, which stays inside [0, 1]. The null is 1/2: no better than
    the reference.
    """
    n = len(policy_rewards)
    share = float((1 + torch.sign(policy_rewards - reference_rewards)).mean() / 2)
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, centre - half, centre + half)


def sequence_kl(
    policy, reference, completions: Sequence[Completion], batch_size: int = 64
) -> Tensor:
    """KL(pi || pi_ref) of whole completions, one unbiased estimate per completion sampled from
    `policy`, [n], in nats.

    KL(pi || pi_ref) = E_pi[sum over t of KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))]: each token's
    KL is computed exactly over the vocabulary and only the prefix is sampled, which varies far less
    than log pi(y) - log pi_ref(y). A sum over tokens, not a mean.
    """
    estimates = []
    for i in range(0, len(completions), batch_size):
        chunk = [(c.prompt_ids, c.ids) for c in completions[i : i + batch_size]]
        batch = collate(chunk).to(policy.device)
        with torch.no_grad():
            p, q = (
                m(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                .logits[:, :-1]
                .float()
                .log_softmax(-1)
                for m in (policy, reference)
            )
        token_kl = (p.exp() * (p - q)).sum(-1)
        estimates.append((token_kl * batch.completion_mask[:, 1:]).sum(1).cpu())
    return torch.cat(estimates)


def preference_accuracy(margins: Tensor, groups: Sequence | None = None) -> Estimate:
    """How often the implicit reward of the chosen completion is the higher one; `margins` [n] of
    implicit rewards.
    """
    return mean_interval((1 + torch.sign(margins)) / 2, groups)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams: 1 where nothing repeats (Li et al. 2016, arXiv
    1510.03055).

    It falls with the amount of text, so compare equal numbers of texts of like length.
    """
    grams = [
        tuple(words[i : i + n])
        for words in map(str.split, texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def shifted_words(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, float]]:
    """How much more often each word occurs after than before: (word, z), the most gained first.

    z is the log-odds ratio over its standard error, with the words' overall frequencies as a prior
    of as many words as one text collection has on average (Monroe, Colaresi and Quinn 2008).
    """
    old, new = (Counter(re.findall(r"[a-z']+", " ".join(t).lower())) for t in (before, after))
    n_old, n_new = old.total(), new.total()
    prior_share = 0.5  # pooled counts, halved: as large as one collection
    scores = {}
    for word in old | new:
        prior = prior_share * (old[word] + new[word])
        n_prior = prior_share * (n_old + n_new)
        odds = [
            (count[word] + prior) / (n + n_prior - count[word] - prior)
            for count, n in ((old, n_old), (new, n_new))
        ]
        error = math.sqrt(1 / (old[word] + prior) + 1 / (new[word] + prior))
        scores[word] = math.log(odds[1] / odds[0]) / error
    return sorted(scores.items(), key=lambda item: -item[1])


def evaluate(
    policy,
    reference,
    tokenizer,
    prompts: Sequence[str],
    reward,
    judge=None,
    n: int = 1,
    max_new_tokens: int = 48,
    seed: int = 1,
    progress: bool = False,
) -> tuple[dict, list[dict]]:
    """Policy against reference on held-out prompts, `n` completions of each, at temperature 1.

    `reward` and `judge` map texts to the logit of P(positive), tensor [n]. Returns a report of
    `Estimate`s as dictionaries, and one row per prompt with a completion of each model and its
    P(positive).
    """
    samples, report, scores = {}, {}, {}
    for name, model, offset in (("reference", reference, 0), ("policy", policy, 1)):
        drawn = sample_completions(
            model, tokenizer, prompts, n, max_new_tokens, seed=seed + offset, progress=progress
        )
        samples[name] = [c for row in drawn for c in row]
        texts = [c.full_text for c in samples[name]]
        groups = [i for i, row in enumerate(drawn) for _ in row]
        scores[name] = reward(texts)
        report[f"reward_{name}"] = mean_interval(scores[name].sigmoid(), groups)
        if judge:
            report[f"judge_{name}"] = mean_interval(judge(texts).sigmoid(), groups)
        report[f"length_{name}"] = mean_interval(
            torch.tensor([float(len(c.ids)) for c in samples[name]]), groups
        )
        report[f"distinct_2_{name}"] = distinct_n([c.text for c in samples[name]])
    report["reward_gain"] = mean_interval(
        scores["policy"].sigmoid() - scores["reference"].sigmoid(), groups
    )
    report["win_rate"] = win_rate(scores["policy"], scores["reference"])
    report["kl"] = mean_interval(sequence_kl(policy, reference, samples["policy"]), groups)
    rows = [
        {
            "prompt": ours.prompt,
            "reference": theirs.text,
            "policy": ours.text,
            "reward_reference": round(scores["reference"][i].sigmoid().item(), 4),
            "reward_policy": round(scores["policy"][i].sigmoid().item(), 4),
        }
        for i, (ours, theirs) in enumerate(zip(samples["policy"], samples["reference"]))
    ]
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in report.items()}, rows[::n]


def held_out_accuracy(
    policy_logps: Tensor, reference_logps: Tensor, pairs, beta: float, gap: float = 0.5
) -> dict:
    """Preference accuracy on labelled pairs, all of them and those whose rewards differ by at least
    `gap` in logit.

    `policy_logps`, `reference_logps`: [pairs, 2], as from `dpo_mini.training.reference_logps`.
    """
    log_ratios = policy_logps - reference_logps
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    names: dict[str, int] = {}
    groups = [names.setdefault(as_text(p.prompt), len(names)) for p in pairs]
    report = {
        "preference_accuracy": preference_accuracy(margins, groups)._asdict(),
        "pairs": len(pairs),
    }
    clear = [
        i
        for i, p in enumerate(pairs)
        if p.chosen_reward is not None and p.chosen_reward - p.rejected_reward >= gap
    ]
    if clear:
        report["preference_accuracy_clear"] = preference_accuracy(
            margins[clear], [groups[i] for i in clear]
        )._asdict()
        report["pairs_clear"] = len(clear)
    return report
