"""What training did, each number with its interval: reward, sequence KL, preference accuracy, win
rate, diversity.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.data import DataError, as_text
from dpo_mini.models import in_bfloat16, without_dropout
from dpo_mini.rewards import shown_values
from dpo_mini.sampling import Completion, mixture_logps, sample_completions
from dpo_mini.settings import MOST_ITEMS, MOST_TOKENS, check_whole
from dpo_mini.tokens import Batch, collate


class Estimate(NamedTuple):
    """A mean and the ends of its 95% confidence interval.

    The ends are None where a mean has no interval: from one prompt nothing is known of how much
    prompts differ.
    """

    mean: float
    low: float | None
    high: float | None


Z = 1.96  # standard errors on either side of a mean that hold 95% of a normal distribution


def mean_interval(values: Tensor, groups: Sequence | None = None) -> Estimate:
    """The mean of `values` [n] with its normal interval, mean ± 1.96 standard errors.

    `groups` [n]: values of one group (completions of one prompt, pairs of one prompt) are not
    independent, so that groups are what is counted: the standard error is that of a ratio of group
    sums. With one group there is no interval; with fewer than some twenty it is too narrow.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    count, error = groups_and_error(values, groups)
    mean = float(values.mean())
    if count < 2:
        return Estimate(mean, None, None)
    return Estimate(mean, mean - Z * error, mean + Z * error)


def groups_and_error(values: Tensor, groups: Sequence | None = None) -> tuple[int, float]:
    """How many groups there are, and the standard error of the mean of `values` [n], float64."""
    if groups is None:
        groups = range(len(values))
    _, index = torch.unique(torch.tensor(groups), return_inverse=True)
    count = int(index.max()) + 1
    residuals = torch.zeros(count, dtype=torch.float64)
    residuals.index_add_(0, index, values - values.mean())  # of one group they add up
    correction = math.sqrt(count / max(1, count - 1))
    return count, float(residuals.square().sum().sqrt() / len(values) * correction)


def win_rate(
    policy_rewards: Tensor, reference_rewards: Tensor, groups: Sequence | None = None
) -> Estimate:
    """How often the policy's completion beats the reference's, one by one; a tie counts half.

    Two tensors [n]; Wilson's interval, which stays inside [0, 1]. The null is 1/2: no better than
    the reference. `groups` [n]: comparisons of one prompt are not independent. Then Wilson's n is
    the number of independent comparisons that would give the same standard error, at least the
    number of groups (n over the design effect of Kish 1965).
    """
    wins = (1 + torch.sign(policy_rewards - reference_rewards)) / 2
    share = float(wins.mean())
    effective = independent_comparisons(wins.double(), groups)
    centre = (share + Z * Z / (2 * effective)) / (1 + Z * Z / effective)
    variance = share * (1 - share) / effective + Z * Z / (4 * effective * effective)
    half = Z / (1 + Z * Z / effective) * math.sqrt(variance)
    # Where all were won or lost an end is the share itself, but for rounding.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def independent_comparisons(wins: Tensor, groups: Sequence | None) -> float:
    """How many independent comparisons are worth `wins` [n]: from the number of groups to n."""
    n = len(wins)
    if groups is None:
        return n
    count, error = groups_and_error(wins, groups)
    _, alone = groups_and_error(wins)  # as if all were independent
    if count == n or count == 1 or alone == 0:  # all won or all lost: do not count on more
        return count
    return min(n, max(count, n * (alone / error) ** 2)) if error else n


LOGITS_AT_ONCE = 2**25  # numbers of one model: 128 MiB in float32


@torch.no_grad()
def sequence_kl(
    policy, reference, completions: Sequence[Completion], batch_size: int = 64, bf16: bool = False,
    strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """KL(pi || pi_ref) of whole completions, one unbiased estimate per completion sampled from
    `policy`, [n], in nats. With a `strength`, pi is the mixture of the two of that strength, from
    which the completions must come (`sample_mixture`).

    KL(pi || pi_ref) = E_pi[sum over t of KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))]: each token's
    KL is computed exactly over the vocabulary and only the prefix is sampled, which varies far less
    than log pi(y) - log pi_ref(y). A sum over tokens, not a mean. As many completions are read at
    once as LOGITS_AT_ONCE permits, `batch_size` at most. `bf16`: products in bfloat16, softmax and
    sums in float32.
    """
    rows = [(c.prompt_ids, c.ids) for c in completions]
    longest = max((len(prompt) + len(ids) for prompt, ids in rows), default=1)
    at_once = LOGITS_AT_ONCE // (longest * policy.config.get_text_config().vocab_size)
    size = min(batch_size, max(1, at_once))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    with in_bfloat16(policy, bf16):
        return torch.cat([kl_of_rows(policy, reference, part, strength) for part in parts])


def kl_of_rows(
    policy, reference, rows: list[tuple[list[int], list[int]]], strength: float = 1.0
) -> Tensor:
    """The sum over a completion's tokens of KL(pi || pi_ref) after its prefix, [rows]."""
    batch = collate(rows).to(policy.device)
    predicts = batch.completion_mask[:, 1:].bool()  # [rows, length - 1]: where a token of y follows
    p, q = (completion_logits(model, batch, predicts) for model in (policy, reference))
    # In pieces of tokens [piece, vocabulary], since log softmax holds several copies of its input.
    size = max(1, LOGITS_AT_ONCE // 8 // p.shape[1])
    token_kl = torch.cat([
        kl_of_tokens(a if strength == 1 else mixture_logps(a, b, strength), b)
        for a, b in zip(p.split(size), q.split(size))
    ])  # fmt: skip
    owners = predicts.nonzero()[:, 0]
    return token_kl.new_zeros(len(rows)).index_add(0, owners, token_kl).cpu()


def completion_logits(model, batch: Batch, predicts: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] where a token of a completion is predicted, row after row."""
    first = int(predicts.any(0).nonzero()[0])  # no row's completion begins before
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = {
        "position_ids": (batch.attention_mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": batch.input_ids.shape[1] - first,  # the head reads nothing before
    }
    takes = signature(causal.forward).parameters
    wanted = {name: value for name, value in wanted.items() if name in takes}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = model(**inputs, **wanted).logits
    logits = logits if "logits_to_keep" in takes else logits[:, first:]
    return logits[:, :-1][predicts[:, first:]]


class TokenShifts(NamedTuple):
    """Of each token of a completion, [tokens] in nats: its log-probability under the mixture and
    under the reference, and the KL of the two distributions that it was drawn from.
    """

    logps: Tensor
    reference_logps: Tensor
    kl: Tensor


@torch.no_grad()
def token_shifts(policy, reference, completion: Completion, strength: float = 1.0) -> TokenShifts:
    """How the mixture of this strength (`mixture_logps`; 1 is the policy) moves each token.

    The sums of `logps` and `reference_logps` are log pi(y | x) of the whole completion; the sum of
    `kl` is its `sequence_kl`.
    """
    batch = collate([(completion.prompt_ids, completion.ids)]).to(policy.device)
    predicts = batch.completion_mask[:, 1:].bool()
    p, q = (completion_logits(model, batch, predicts) for model in (policy, reference))
    mixed, q = mixture_logps(p, q, strength), mixture_logps(q, q, 0)
    tokens = torch.tensor(completion.ids, device=mixed.device)[:, None]
    logps, reference_logps = (x.gather(1, tokens)[:, 0].cpu() for x in (mixed, q))
    return TokenShifts(logps, reference_logps, kl_of_tokens(mixed, q).cpu())


def kl_of_tokens(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of the distributions [tokens, vocabulary] that two models' logits are, [tokens].

    In float32, or float64 where the logits are.
    """
    dtype = torch.promote_types(p_logits.dtype, torch.float32)
    log_p, log_q = p_logits.to(dtype).log_softmax(-1), q_logits.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def preference_accuracy(margins: Tensor, groups: Sequence | None = None) -> Estimate:
    """How often the implicit reward of the chosen completion is the higher one; `margins` [n] of
    implicit rewards.
    """
    return mean_interval((1 + torch.sign(margins)) / 2, groups)


def pass_at_k(passed: Tensor, k: int) -> Tensor:
    """P(at least one of `k` samples passes) of each prompt, [prompts], from the n >= k samples of
    `passed` [prompts, n] (1 or True: it passed). The mean over prompts is pass@k.

    1 - C(n - c, k) / C(n, k) with c passes: the share of all choices of k among the n that hold a
    pass, so that it is unbiased, as 1 - (1 - c / n)^k is not (Chen et al. 2021, arXiv 2107.03374).
    Raises SettingsError for a k that is not from 1 to n.
    """
    n = passed.shape[1]
    check_whole("k", k, 1, n, f"There are {n} samples of each prompt.")
    counts = passed.long().sum(1).tolist()
    chosen = [1 - math.comb(n - c, k) / math.comb(n, k) for c in counts]
    return torch.tensor(chosen, dtype=torch.float64)


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
    bf16: bool = False,
) -> tuple[dict, list[dict]]:
    """Policy against reference on held-out prompts, `n` completions of each, at temperature 1.

    `reward` and `judge` map texts to the logit of P(positive), tensor [n]; a reward model's one
    output is reported as it is (`rewards.shown_as`). Returns a report of `Estimate`s as
    dictionaries, and one row per prompt with a completion of each model and its P(positive). All
    intervals count prompts, not completions; with one prompt their ends are None, but for the win
    rate's. Raises DataError without prompts, SettingsError for a number out of range.
    """
    check_whole("n", n, 1, MOST_ITEMS, "Try 1 completion of each prompt.")
    check_whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS, "Try 48.")
    if not prompts:
        raise DataError("there are no prompts to evaluate on.")
    for model in (policy, reference):
        without_dropout(model)
    samples = {
        name: sample_completions(
            model, tokenizer, prompts, n, max_new_tokens, seed=its_seed, progress=progress,
            bf16=bf16,
        )  # fmt: skip
        for name, model, its_seed in (("reference", reference, seed), ("policy", policy, seed + 1))
    }
    groups = [i for i in range(len(prompts)) for _ in range(n)]  # whose completion each is
    flat = {name: [c for row in drawn for c in row] for name, drawn in samples.items()}
    scores = {name: reward([c.full_text for c in drawn]) for name, drawn in flat.items()}
    report = {}
    shown = {name: shown_values(reward, numbers) for name, numbers in scores.items()}
    for name, drawn in flat.items():
        report |= quality(name, drawn, shown[name], judge, groups)
    report["reward_gain"] = mean_interval(shown["policy"] - shown["reference"], groups)
    report["win_rate"] = win_rate(scores["policy"], scores["reference"], groups)
    kl = sequence_kl(policy, reference, flat["policy"], bf16=bf16)
    report["kl"] = mean_interval(kl, groups)
    rows = side_by_side(flat, shown)[::n]
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in report.items()}, rows


def quality(name: str, completions: Sequence[Completion], rewards: Tensor, judge, groups) -> dict:
    """What one model's completions are like; the keys end in its name. `rewards` as shown."""
    report = {f"reward_{name}": mean_interval(rewards, groups)}
    if judge:
        second = judge([c.full_text for c in completions])
        report[f"judge_{name}"] = mean_interval(second.sigmoid(), groups)
    lengths = torch.tensor([float(len(c.ids)) for c in completions])
    report[f"length_{name}"] = mean_interval(lengths, groups)
    report[f"distinct_2_{name}"] = distinct_n([c.text for c in completions])
    return report


def side_by_side(completions: dict[str, list], rewards: dict[str, Tensor]) -> list[dict]:
    """A row for each pair of completions, the reference's beside the policy's."""
    return [
        {
            "prompt": ours.prompt,
            "reference": theirs.text,
            "policy": ours.text,
            "reward_reference": round(rewards["reference"][i].item(), 4),
            "reward_policy": round(rewards["policy"][i].item(), 4),
        }
        for i, (ours, theirs) in enumerate(zip(completions["policy"], completions["reference"]))
    ]


def held_out_accuracy(
    policy_logps: Tensor, reference_logps: Tensor, pairs, beta: float, gap: float = 0.5
) -> dict:
    """Preference accuracy on labelled pairs, all of them and those whose rewards differ by at least
    `gap` in logit.

    `policy_logps`, `reference_logps`: [pairs, 2], as from `reference_logps`.
    """
    log_ratios = policy_logps - reference_logps
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    numbers: dict[str, int] = {}  # of prompts, which may be lists of messages
    groups = [numbers.setdefault(as_text(p.prompt), len(numbers)) for p in pairs]
    report = {
        "preference_accuracy": preference_accuracy(margins, groups)._asdict(),
        "pairs": len(pairs),
    }
    clear = [
        i
        for i, p in enumerate(pairs)
        if None not in (p.chosen_reward, p.rejected_reward)
        and p.chosen_reward - p.rejected_reward >= gap
    ]
    if clear:
        report["preference_accuracy_clear"] = preference_accuracy(
            margins[clear], [groups[i] for i in clear]
        )._asdict()
        report["pairs_clear"] = len(clear)
    return report
