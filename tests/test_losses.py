"""The DPO loss: values, gradients, identities (facts as in Rafailov et al. 2023) and the traps it
must not fall into.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from dpo_mini.losses import PairLogps, cdpo_loss, dpo_loss, implicit_rewards, preference_metrics


def random_logps(n=64, scale=20.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [-scale * torch.rand(n, generator=generator, dtype=torch.float64) - 5 for _ in range(4)]
    return PairLogps(draw[0].requires_grad_(), draw[1].requires_grad_(), draw[2], draw[3])


def at_start(n=4):
    logps = random_logps(n)
    return logps._replace(
        reference_chosen=logps.chosen.detach(), reference_rejected=logps.rejected.detach()
    )


def test_loss_at_the_start_is_log_2_with_gradient_half_beta():
    for beta in (0.05, 0.1, 1.0):
        logps = at_start()
        loss = dpo_loss(logps, beta)
        assert torch.allclose(loss, torch.full_like(loss, math.log(2)), atol=1e-15, rtol=0)
        chosen, rejected = torch.autograd.grad(loss.sum(), (logps.chosen, logps.rejected))
        assert torch.allclose(chosen, torch.full_like(chosen, -beta / 2), atol=1e-15, rtol=0)
        assert torch.allclose(rejected, torch.full_like(rejected, beta / 2), atol=1e-15, rtol=0)


def test_gradient_is_weighted_by_how_wrongly_the_pair_is_ranked():
    beta, logps = 0.3, random_logps()
    chosen, rejected = implicit_rewards(logps, beta)
    weight = beta * torch.sigmoid(rejected - chosen)
    gradient = torch.autograd.grad(dpo_loss(logps, beta).sum(), (logps.chosen, logps.rejected))
    assert torch.allclose(gradient[0], -weight, atol=1e-12)
    assert torch.allclose(gradient[1], weight, atol=1e-12)


def check_swap(loss):
    """L(w, l) - L(l, w) = -beta * Delta, with Delta the difference of log-ratios."""
    beta, logps = 0.1, random_logps()
    swapped = PairLogps(
        logps.rejected, logps.chosen, logps.reference_rejected, logps.reference_chosen
    )
    delta = (logps.chosen - logps.reference_chosen) - (logps.rejected - logps.reference_rejected)
    assert torch.allclose(loss(logps, beta) - loss(swapped, beta), -beta * delta, atol=1e-12)


def check_extremes(loss):
    for dtype in (torch.float32, torch.float64):
        for margin in (-1e5, -2000.0, 0.0, 2000.0, 1e5):
            chosen = torch.tensor([margin], dtype=dtype, requires_grad=True)
            zero = torch.zeros(1, dtype=dtype)
            value = loss(PairLogps(chosen, zero, zero, zero), 0.1)
            value.backward()
            assert torch.isfinite(value).all() and torch.isfinite(chosen.grad).all()
            assert value.item() == pytest.approx(max(0.0, -0.1 * margin), abs=0.7)


def check_shift(loss):
    """Adding c(x) to both log-ratios changes nothing: only their difference enters."""
    logps = random_logps()
    shifted = logps._replace(chosen=logps.chosen + 3.7, rejected=logps.rejected + 3.7)
    assert torch.allclose(loss(logps, 0.1), loss(shifted, 0.1), atol=1e-12)


def check_start(loss):
    assert torch.allclose(
        loss(at_start(), 0.1), torch.tensor(math.log(2), dtype=torch.float64), atol=1e-12
    )


def check_against_the_formula(loss):
    beta, logps = 0.7, random_logps(scale=3.0)
    odds = (
        (logps.chosen / 1).exp() / logps.reference_chosen.exp(),
        logps.rejected.exp() / logps.reference_rejected.exp(),
    )
    probability = odds[0] ** beta / (
        odds[0] ** beta + odds[1] ** beta
    )  # Bradley-Terry in odds, no sigmoid
    assert torch.allclose(loss(logps, beta), -probability.log(), atol=1e-10)


CHECKS = [check_swap, check_extremes, check_shift, check_start, check_against_the_formula]


@pytest.mark.parametrize("check", CHECKS)
def test_dpo_loss(check):
    check(dpo_loss)


def margin(logps):
    return (logps.chosen - logps.reference_chosen) - (logps.rejected - logps.reference_rejected)


TRAPS = {
    "sign swapped": lambda l, b: -F.logsigmoid(-b * margin(l)),
    "log(sigmoid)": lambda l, b: -torch.log(torch.sigmoid(b * margin(l))),
    "no reference": lambda l, b: -F.logsigmoid(b * (l.chosen - l.rejected)),
    "reference added": lambda l, b: (
        -F.logsigmoid(b * (l.chosen + l.reference_chosen - l.rejected - l.reference_rejected))
    ),
    "no beta": lambda l, b: -F.logsigmoid(margin(l)),
    "beta outside": lambda l, b: -b * F.logsigmoid(margin(l)),
    "beta squared": lambda l, b: -F.logsigmoid(b * b * margin(l)),
    "chosen only": lambda l, b: -F.logsigmoid(b * (l.chosen - l.reference_chosen)),
    "policy detached": lambda l, b: -F.logsigmoid(b * margin(l).detach()),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_caught(trap):
    caught = []
    for check in CHECKS:
        try:
            check(TRAPS[trap])
        except (AssertionError, RuntimeError):
            caught.append(check.__name__)
    assert caught, f"no check notices {trap!r}"


def test_cdpo_mixes_both_labels_and_has_a_finite_optimum():
    eps, beta = 0.2, 0.5
    logps = random_logps()
    assert torch.allclose(cdpo_loss(logps, beta, 0.0), dpo_loss(logps, beta), atol=1e-15)
    optimum = math.log((1 - eps) / eps) / beta
    delta = torch.tensor([optimum], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    (slope,) = torch.autograd.grad(
        cdpo_loss(PairLogps(delta, zero, zero, zero), beta, eps).sum(), delta
    )
    assert abs(slope.item()) < 1e-12


def test_metrics_carry_beta_and_count_ties_half():
    logps = at_start()
    metrics = preference_metrics(logps, 0.1)
    assert (metrics["rewards/accuracies"] == 0.5).all()
    moved = logps._replace(chosen=logps.chosen + 2.0)
    metrics = preference_metrics(moved, 0.1)
    assert torch.allclose(metrics["rewards/chosen"], torch.full((4,), 0.2, dtype=torch.float64))
    assert (metrics["rewards/accuracies"] == 1).all()
    assert not metrics["rewards/margins"].requires_grad
