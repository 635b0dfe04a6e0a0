"""Numbers that carry intervals, checked where the truth is known."""

import itertools

import pytest
import torch
from conftest import make_gpt2

from dpo_mini.evaluation import (
    distinct_n,
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
