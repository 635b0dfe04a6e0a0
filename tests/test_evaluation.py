"""Numbers that carry intervals, checked where the truth is known."""

import copy
import itertools
import json

import pytest
import torch
from conftest import make_gpt2, random_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_mini import evaluation
from dpo_mini.data import DataError, PreferencePair
from dpo_mini.evaluation import (
    distinct_n,
    evaluate,
    held_out_accuracy,
    mean_interval,
    preference_accuracy,
    sequence_kl,
    win_rate,
)
from dpo_mini.logprobs import sequence_logps
from dpo_mini.sampling import Completion
from dpo_mini.tokens import collate


def covered(draw, truth, trials=400):
    hits = sum(interval.low <= truth <= interval.high for interval in map(draw, range(trials)))
    return hits / trials


def test_mean_interval_covers_the_mean_95_percent_of_the_time():
    def draw(seed):
        return mean_interval(torch.randn(100, generator=torch.Generator().manual_seed(seed)) + 2)

    assert 0.92 <= covered(draw, 2.0) <= 0.98


def test_grouped_values_need_the_wider_interval():
    def values(seed):
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(60, 1, generator=generator) + 0.3 * torch.randn(60, 5, generator=generator)
        ).flatten()

    groups = [i // 5 for i in range(300)]
    assert 0.91 <= covered(lambda s: mean_interval(values(s), groups), 0.0) <= 0.98
    assert (
        covered(lambda s: mean_interval(values(s)), 0.0) < 0.75
    )  # what ignoring the groups would claim


def test_win_rate_counts_ties_half_and_half_is_the_null():
    rate = win_rate(torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert rate.mean == 0.5 and 0 < rate.low < 0.5 < rate.high < 1
    same = torch.randn(50)
    assert win_rate(same, same).mean == 0.5
    assert win_rate(same + 1, same).mean == 1.0 and win_rate(same + 1, same).high <= 1.0


def wins_of_prompts(seed, prompts, samples, share, correlation=0.6):
    """Wins 1 and 0 of `samples` comparisons a prompt, and whose each is.

    A prompt's chance of a win is drawn from Beta(a, b): two of its comparisons are correlated by
    1 / (a + b + 1).
    """
    torch.manual_seed(seed)
    total = 1 / correlation - 1
    chances = torch.distributions.Beta(share * total, (1 - share) * total).sample((prompts, 1))
    wins = (torch.rand(prompts, samples) < chances).double().flatten()
    return wins, [i for i in range(prompts) for _ in range(samples)]


@pytest.mark.parametrize("share", [0.5, 0.85])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_the_win_rates_interval_covers_it_however_many_samples_a_prompt_has(samples, share):
    def rate(seed, grouped=True):
        wins, groups = wins_of_prompts(seed, 64, samples, share)
        return win_rate(wins, torch.full_like(wins, 0.5), groups if grouped else None)

    assert 0.93 <= covered(rate, share, trials=800) <= 0.97
    alone = covered(lambda seed: rate(seed, grouped=False), share, trials=200)
    assert alone < {1: 0.98, 2: 0.92, 4: 0.83}[samples]  # what counting completions would claim
    if samples == 1:
        assert all(rate(seed) == rate(seed, grouped=False) for seed in range(20))


@pytest.mark.parametrize("prompts", [1, 2, 3, 20])
@pytest.mark.parametrize("samples", [1, 4])
def test_a_win_rate_at_its_ends_counts_prompts_alone(prompts, samples):
    n, groups = prompts * samples, [i for i in range(prompts) for _ in range(samples)]
    ones, zeros = torch.ones(n), torch.zeros(n)
    won, lost = win_rate(ones, zeros, groups), win_rate(zeros, ones, groups)
    assert won.mean == won.high == 1 and lost.mean == lost.low == 0
    assert won.low == pytest.approx(prompts / (prompts + 1.96**2)) and 0 < won.low < 1
    assert lost.high == pytest.approx(1 - won.low)
    assert win_rate(ones, ones, groups).mean == 0.5  # all ties
    for seed in range(50):
        wins, groups = wins_of_prompts(seed, prompts, samples, 0.9)
        rate = win_rate(wins, torch.full_like(wins, 0.5), groups)
        assert 0 <= rate.low <= rate.mean <= rate.high <= 1 and rate.high - rate.low > 0


def test_one_prompt_has_no_interval_and_says_so():
    one = mean_interval(torch.tensor([1.0, 2.0]), [7, 7])
    assert one == (1.5, None, None)
    assert mean_interval(torch.tensor([3.0])).low is None
    two = mean_interval(torch.tensor([1.0, 2.0]))
    assert two == pytest.approx((1.5, 0.52, 2.48))


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_few_prompts_are_evaluated_and_the_report_is_strict_json(prompts, n, tokenizer):
    torch.manual_seed(0)
    policy, reference = (make_gpt2(len(tokenizer), width=16, layers=1) for _ in range(2))

    def reward(texts):
        return torch.tensor([len(text) / 9 - 2 for text in texts])

    names = ["This movie", "The plot", "I"][:prompts]
    report, rows = evaluate(policy, reference, tokenizer, names, reward, reward, n, 5)
    json.dumps(report, allow_nan=False)
    assert len(rows) == prompts and [row["prompt"] for row in rows] == names
    for key in ("reward_policy", "judge_policy", "reward_gain", "kl", "length_policy"):
        assert (report[key]["low"] is None) == (prompts == 1)
    assert 0 <= report["win_rate"]["low"] < report["win_rate"]["high"] <= 1
    assert report["win_rate"]["high"] - report["win_rate"]["low"] > 0.5  # so few say little


def test_evaluate_counts_prompts_not_completions(tokenizer, monkeypatch):
    """Completions of a prompt that are all alike: four samples a prompt say no more than one."""

    def copies(model, tokenizer, prompts, n, max_new_tokens, seed, progress, bf16):
        return [[Completion(p, p * (seed + 1), [0], [5, 0])] * n for p in prompts]

    monkeypatch.setattr(evaluation, "sample_completions", copies)
    model, prompts = make_gpt2(), ["ab", "c", "dab", "cab", "d"]

    def reward(texts):
        return torch.tensor([float("ab" in t) * len(t) + len(t) % 2 for t in texts])

    one, four = (evaluate(model, model, None, prompts, reward, None, n)[0] for n in (1, 4))
    for key in ("win_rate", "reward_gain", "reward_policy", "length_policy"):
        assert one[key] == pytest.approx(four[key], abs=1e-6)
    with pytest.raises(DataError, match="no prompts"):
        evaluate(model, model, None, [], reward)


def test_accuracy_on_pairs_counts_prompts_of_any_kind():
    chat = [{"role": "user", "content": "Hello"}]
    pairs = [
        PreferencePair("a", "b", "c", chosen_reward=1.0, rejected_reward=0.0),
        PreferencePair("a", "b", "d", chosen_reward=1.0, rejected_reward=None),
        PreferencePair(chat, chat, chat),
    ]
    policy = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    report = held_out_accuracy(policy, torch.zeros(3, 2), pairs, 0.1)
    assert report["preference_accuracy"]["mean"] == pytest.approx(2 / 3)
    assert report["preference_accuracy"]["low"] < 2 / 3
    assert report["pairs"] == 3 and report["pairs_clear"] == 1
    assert report["preference_accuracy_clear"]["low"] is None  # of one prompt


def kl_of_all_positions(policy, reference, completions):
    """The same sum from every position's distribution, one completion at a time."""
    sums = []
    for c in completions:
        ids = torch.tensor([[*c.prompt_ids, *c.ids]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (policy, reference))
        sums.append((p.exp() * (p - q)).sum(-1)[len(c.prompt_ids) - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("budget", [2**25, 97 * 40, 1])
def test_sequence_kl_is_the_same_however_it_is_cut_and_padded(any_model, budget, monkeypatch):
    torch.manual_seed(7)
    policy = any_model.double()
    reference = type(policy)(policy.config).double().eval()
    rows = [row for pair in random_pairs(9) for row in pair.rows]
    completions = [Completion("", "", *row) for row in rows]
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", budget)
    expected = kl_of_all_positions(policy, reference, completions)
    assert torch.allclose(sequence_kl(policy, reference, completions, 5), expected, atol=1e-9)
    single = sequence_kl(
        copy.deepcopy(policy).float(), copy.deepcopy(reference).float(), completions
    )
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-4)


def test_sequence_kl_holds_few_logits_and_none_of_the_prompts(monkeypatch):
    """The head is given completion positions only, and no tensor is far above the budget."""
    vocabulary, budget = 5000, 2**17
    policy, reference = (make_gpt2(vocabulary, width=16, layers=1) for _ in range(2))
    completions = [Completion("", "", [0] * 40, [5, 6, 7, 0]) for _ in range(64)]
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", budget)
    positions = []
    for model in (policy, reference):
        model.lm_head.register_forward_hook(
            lambda _, inputs, logits: positions.append(logits.shape)
        )
    with Largest() as largest:
        sequence_kl(policy, reference, completions)
    assert sum(shape[0] * (shape[1] - 1) for shape in positions) == 2 * 64 * 4
    assert largest.numbers <= budget and 0 < largest.softmax <= budget // 8


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation made (weights aside), and the
    largest that a log softmax made, of which several copies are held at once.
    """

    numbers = softmax = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.dim() > 1
            and "t.default" not in str(function)
        ):
            self.numbers = max(self.numbers, result.numel())
        if "log_softmax" in str(function):
            self.softmax = max(self.softmax, result.numel())
        return result


def test_sequence_kl_is_exact_in_expectation():
    """Over every sequence of a small world, E_pi[estimate] = KL(pi || pi_ref) to float64's
    precision, and >= 0 each.
    """
    torch.manual_seed(1)
    policy, reference = make_gpt2(vocabulary=4).double(), make_gpt2(vocabulary=4).double()
    rows = []
    for length in (1, 2, 3):  # token 0 ends a sequence; three tokens at most
        for ids in itertools.product(range(4), repeat=length):
            if 0 not in ids[:-1] and (ids[-1] == 0 or length == 3):
                rows.append(list(ids))
    batch = collate([([0], ids) for ids in rows])
    with torch.no_grad():
        log_p, log_q = sequence_logps(policy, *batch), sequence_logps(reference, *batch)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    estimates = sequence_kl(policy, reference, [Completion("", "", [0], ids) for ids in rows])
    assert (log_p.exp() * estimates).sum().item() == pytest.approx(exact, rel=1e-5)
    assert (estimates >= 0).all() and exact > 0.1
    assert sequence_kl(policy, policy, [Completion("", "", [0], rows[0])]).item() == pytest.approx(
        0, abs=1e-9
    )


def test_accuracy_and_diversity():
    assert preference_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])).mean == 0.625
    assert distinct_n(["a b c", "a b d"]) == 0.75
    assert distinct_n(["a a a a"]) == pytest.approx(1 / 3)
    assert distinct_n([""]) == 0
