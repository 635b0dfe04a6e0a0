"""What the myth lab computes: comparisons and their fits against closed forms, runs by hand."""

import math

import pytest
import torch

from dpo_mini import exact
from dpo_mini.course import myths

float64 = torch.float64
REWARDS = torch.tensor([0.0, 0.7, -0.4, 1.3], dtype=float64)
REFERENCE = torch.tensor([0.3, -0.5, 0.1, 0.0], dtype=float64).log_softmax(0)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("turned", [0.0, 0.2])
def test_comparisons_are_bradley_terrys_and_then_turned(turned):
    counts = myths.comparison_counts(REWARDS, 60_000, turned, generator())
    assert counts.sum() == 60_000 and not counts.diag().any()
    shown = counts + counts.T
    off = ~torch.eye(4, dtype=torch.bool)
    assert (shown[off] / 60_000 - 1 / 6).abs().max() < 0.01
    wins = exact.preferences(REWARDS)
    expected = (1 - turned) * wins + turned * wins.T
    assert ((counts / shown)[off] - expected[off]).abs().max() < 0.02


@pytest.mark.parametrize("turned", [0.0, 0.3])
def test_a_fit_to_expected_counts_finds_the_rewards(turned):
    wins = exact.preferences(REWARDS)
    counts = 1e7 * ((1 - turned) * wins + turned * wins.T).fill_diagonal_(0)
    fitted = myths.fitted_rewards(counts, turned)
    assert (fitted - (REWARDS - REWARDS.mean())).abs().max() < 1e-5
    if turned:  # who does not know of the noise thinks that people are less sure
        assert myths.fitted_rewards(counts).std() < 0.5 * fitted.std()


FEATURES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0], [2.0, 0.5]], dtype=float64)


@pytest.mark.parametrize("features", [None, FEATURES], ids=["free", "linear"])
def test_a_fit_is_where_the_likelihood_is_greatest(features):
    counts = myths.comparison_counts(REWARDS, 500, 0.1, generator())
    design = torch.eye(4, dtype=float64) if features is None else features
    free = torch.zeros(design.shape[1], dtype=float64, requires_grad=True)

    def loss():
        chances = exact.preferences(design @ free)
        noisy = 0.9 * chances + 0.1 * chances.T
        return -(counts * noisy.log()).sum() + 5e-4 * free.square().sum()

    exact.minimise(loss, [free])
    expected = (design @ free).detach()
    fitted = myths.fitted_rewards(counts, 0.1, features)
    assert (fitted - (expected - expected.mean())).abs().max() < 1e-5


def test_a_text_that_never_lost_has_a_finite_reward():
    fitted = myths.fitted_rewards(torch.tensor([[0.0, 30.0], [0.0, 0.0]], dtype=float64))
    assert fitted.isfinite().all() and 5 < fitted[0] - fitted[1] < 50


def test_a_policy_of_a_given_kl_and_what_lies_below_the_frontier():
    best = exact.optimal_policy(REFERENCE, REWARDS, 0.7)
    nats = exact.kl(best, REFERENCE).item()
    assert exact.total_variation(myths.policy_at(nats, REFERENCE, REWARDS), best) < 1e-6
    assert abs(myths.below_frontier(best, REFERENCE, REWARDS)) < 1e-6
    backwards = exact.optimal_policy(REFERENCE, -REWARDS, 0.7)
    above = myths.policy_at(exact.kl(backwards, REFERENCE).item(), REFERENCE, REWARDS)
    lost = exact.expectation(above, REWARDS) - exact.expectation(backwards, REWARDS)
    assert myths.below_frontier(backwards, REFERENCE, REWARDS) == pytest.approx(lost.item())
    assert lost > 0.3


def test_an_interval_is_a_normal_one_and_bars_are_its_halves():
    estimate = myths.interval([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * math.sqrt(5 / 3) / 2
    assert estimate == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    means, (down, up) = myths.with_bars([estimate])
    assert means == [2.5] and down == pytest.approx([half]) and up == pytest.approx([half])


def run(method, value, seed, kl, p):
    report = {"kl": {"mean": kl}, "reward_policy": {"mean": p}}
    return {"setting": {"method": method, "value": value, "seed": seed}, "report": report}


def test_runs_are_compared_seed_by_seed_and_only_where_they_are_near():
    runs = [run("dpo", 0.1, seed, 10.0, 0.8 + 0.05 * seed) for seed in range(3)]
    runs += [run("dpo", 1.0, seed, 2.0, 0.6) for seed in range(3)]
    runs += [run("ppo", 7, seed, 9.0, 0.83 + 0.05 * seed) for seed in (2, 0, 1)]
    runs += [run("ppo", 8, seed, 5.0, 0.99) for seed in range(3)]
    ((kl, its, gap),) = myths.near_differences(runs, "ppo")
    assert (kl, its) == pytest.approx((9.0, 10.0))
    assert gap == pytest.approx((0.03, 0.03, 0.03))  # the seeds' own spread drops out
    assert myths.decided(gap) == "above"
    assert myths.decided(gap._replace(low=-0.1)) == "not decided"
    assert myths.decided(gap._replace(low=-0.2, high=-0.1)) == "below"


def test_inner_products_of_gradients_say_which_log_probability_rises():
    logits = torch.tensor([0.2, -0.3, 0.5], dtype=float64)
    inner = myths.inner_products(lambda z: z.log_softmax(0), logits)
    p = logits.softmax(0)
    gradients = torch.eye(3, dtype=float64) - p  # of log softmax, a row each
    assert (inner - gradients @ gradients.T).abs().max() < 1e-12
