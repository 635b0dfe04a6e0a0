"""Every loss of the family against its paper's formula, written in probabilities and evaluated to
50 digits: values, gradients, extremes, facts, and the traps an implementation must not fall into.
"""

import functools
import inspect
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from dpo_mini import exact
from dpo_mini.family import (
    LOSSES,
    REFERENCE_FREE,
    UNPAIRED,
    LabelledLogps,
    RankingLogps,
    apo_down_loss,
    apo_zero_loss,
    chi_po_loss,
    cpo_loss,
    dpo_positive_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    per_token,
    plackett_luce_loss,
    r_dpo_loss,
    robust_loss,
    rpo_loss,
    simpo_loss,
    unlikelihood_loss,
)
from dpo_mini.losses import PairLogps, cdpo_loss, dpo_loss
from dpo_mini.settings import LOSS_NAMES, TrainingError
from dpo_mini.training import loss_arguments
from dpo_mini.verbs import LOG_2_AT_FIRST, LOSS_OPTIONS, Train

mpmath = pytest.importorskip("mpmath", reason="comes with sympy: pip install '.[lab]'")
mp = mpmath.mp.clone()
mp.dps = 50
exp, log = mp.exp, mp.log

GIVEN = {"beta": 0.37, "gamma": 0.8, "alpha": 0.6, "label_smoothing": 0.2}  # no loss's defaults


def arguments(name):
    return {k: v for k, v in GIVEN.items() if k in inspect.signature(LOSSES[name]).parameters}


# --- the formulas, as the papers have them: of probabilities W = pi(y_w|x), R_W of pi_ref, ... ---


def sigma(x):
    return 1 / (1 + exp(-x))


def bradley_terry(W, L, R_W, R_L, beta):
    """The probability of the label under the rewards beta log(pi / pi_ref)."""
    w, l = (W / R_W) ** beta, (L / R_L) ** beta
    return w / (w + l)


def odds(P):
    return P / (1 - P)


FORMULAS = {
    "dpo": lambda W, L, R_W, R_L, m, n, beta: -log(bradley_terry(W, L, R_W, R_L, beta)),
    "cdpo": lambda W, L, R_W, R_L, m, n, beta, label_smoothing: (
        -(1 - label_smoothing) * log(bradley_terry(W, L, R_W, R_L, beta))
        - label_smoothing * log(bradley_terry(L, W, R_L, R_W, beta))
    ),
    "robust": lambda W, L, R_W, R_L, m, n, beta, label_smoothing: (
        (
            (1 - label_smoothing) * -log(bradley_terry(W, L, R_W, R_L, beta))
            - label_smoothing * -log(bradley_terry(L, W, R_L, R_W, beta))
        )
        / (1 - 2 * label_smoothing)
    ),
    "dpo-norm": lambda W, L, R_W, R_L, m, n, beta: (
        -log(sigma(beta / m * log(W / R_W) - beta / n * log(L / R_L)))
    ),
    "ipo": lambda W, L, R_W, R_L, m, n, beta: (log(W * R_L / (L * R_W)) - 1 / (2 * beta)) ** 2,
    "ipo-token": lambda W, L, R_W, R_L, m, n, beta: (
        (log((W / R_W) ** (1 / m) / (L / R_L) ** (1 / n)) - 1 / (2 * beta)) ** 2
    ),
    "hinge": lambda W, L, R_W, R_L, m, n, beta: max(
        mp.zero, 1 - (beta * log(W / R_W) - beta * log(L / R_L))
    ),
    "apo-zero": lambda W, L, R_W, R_L, m, n, beta: (
        -sigma(beta * log(W / R_W)) + sigma(beta * log(L / R_L)) + 1
    ),
    "apo-down": lambda W, L, R_W, R_L, m, n, beta: (
        sigma(beta * log(W / R_W)) - sigma(beta * log(W / R_W) - beta * log(L / R_L)) + 1
    ),
    "rpo": lambda W, L, R_W, R_L, m, n, beta, alpha: (
        -log(bradley_terry(W, L, R_W, R_L, beta)) - alpha * log(W ** (1 / m))
    ),
    "dpo-positive": lambda W, L, R_W, R_L, m, n, beta, alpha: (
        -log(sigma(beta * (log(W / R_W) - log(L / R_L) - alpha * max(mp.zero, log(R_W / W)))))
    ),
    "r-dpo": lambda W, L, R_W, R_L, m, n, beta, alpha: (
        -log(bradley_terry(W * exp(alpha * m / beta), L * exp(alpha * n / beta), R_W, R_L, beta))
    ),
    "chi-po": lambda W, L, R_W, R_L, m, n, beta: (
        -log(
            sigma(beta * (min(W / R_W, exp(20)) - min(L / R_L, exp(20)) + log(W * R_L / (R_W * L))))
        )
    ),
    "simpo": lambda W, L, R_W, R_L, m, n, beta, gamma: (
        -log(sigma(beta / m * log(W) - beta / n * log(L) - gamma))
    ),
    "cpo": lambda W, L, R_W, R_L, m, n, beta, alpha: (
        -log(W**beta / (W**beta + L**beta)) - alpha * log(W) / m
    ),
    "orpo": lambda W, L, R_W, R_L, m, n, beta: (
        -log(W) / m - beta * log(sigma(log(odds(W ** (1 / m)) / odds(L ** (1 / n)))))
    ),
    "preferred-ft": lambda W, L, R_W, R_L, m, n: -log(W),
    "unlikelihood": lambda W, L, R_W, R_L, m, n, alpha: -(log(W) - alpha * log(L)),
}


def cases():
    """Rows (log pi of chosen, of rejected, log pi_ref of chosen, of rejected, |y_w|, |y_l|)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = (500 ** draw(24, 2)).ceil()  # 1 to 500
    reference = -lengths * (0.05 + 3 * draw(24, 2))
    moved = torch.where(draw(24, 2) < 0.5, reference * (0.7 + 0.6 * draw(24, 2)), reference - 1)
    usual = torch.cat([moved, reference, lengths], 1).tolist()
    far = [
        (-1e4, -3.0, -2.0, -4.0, 500, 1),  # r_w = -1e4
        (-2.0, -1e4, -3.0, -5.0, 1, 500),  # r_l = -1e4: a margin of 1e4
        (-20.0, -30.0, -1e4, -25.0, 400, 40),
        (-20.0, -30.0, -25.0, -1e4, 40, 400),
        (-1e4, -1e4, -9999.5, -9998.0, 7, 3),  # thousands of nats a token
        (-1e-9, -40.0, -2e-9, -50.0, 1, 500),  # means near 0: a token that is all but sure
        (-40.0, -1e-6, -50.0, -3e-6, 500, 500),
        (-1e-9, -2e-9, -3.0, -4.0, 1, 1),
    ]
    return [tuple(row) for row in usual + far]


CASES = cases()


def pair_logps(rows, dtype=torch.float64):
    columns = torch.tensor(rows, dtype=torch.float64).to(dtype).unbind(1)
    chosen, rejected, *reference = (c.clone() for c in columns[:4])
    tokens = (columns[4].long(), columns[5].long())
    return PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), *reference, *tokens)


@functools.cache
def expected(name):
    """Value and both slopes of each case, by the formula and mpmath's numerical derivative."""
    given = {k: mp.mpf(v) for k, v in arguments(name).items()}
    rows = []
    for case in CASES:
        *logps, m, n = map(mp.mpf, case)

        def value(w, l):
            reference, lengths = map(exp, logps[2:]), (m, n)  # noqa: B023
            return FORMULAS[name](exp(w), exp(l), *reference, *lengths, **given)

        slopes = [mp.diff(value, logps[:2], order) for order in ((1, 0), (0, 1))]
        rows.append([float(x) for x in (value(*logps[:2]), *slopes)])
    return torch.tensor(rows, dtype=torch.float64)


def slopes(values, logps):
    found = torch.autograd.grad(values.sum(), logps[:2], allow_unused=True)
    return [torch.zeros_like(values) if g is None else g for g in found]


def check_formula(name, loss):
    logps = pair_logps(CASES)
    values = loss(logps, **arguments(name))
    assert values.shape == (len(CASES),)
    for column, found in zip(expected(name).T, (values, *slopes(values, logps))):
        # two pulls on the chosen of apo-down may cancel: what is left is rounding
        least = 1e-15 if name == "apo-down" else 1e-30
        torch.testing.assert_close(found.detach(), column, rtol=1e-10, atol=least)


def check_extremes(name, loss):
    """Finite where the formula is, and where rounding makes a mean log-probability exactly 0."""
    sure = [
        (0.0, 0.0, 0.0, 0.0, 1, 1),
        (0.0, -5.0, -5.0, 0.0, 1, 500),
        (-1e4, 0.0, 0.0, -1e4, 1, 1),
    ]
    for dtype in (torch.float32, torch.float64):
        logps = pair_logps([*CASES, *sure], dtype)
        for given in ({}, arguments(name)):
            values = loss(logps, **given)
            assert values.dtype == dtype and values.isfinite().all()
            assert all(slope.isfinite().all() for slope in slopes(values, logps))
        near = expected(name)[:, 0].to(dtype)
        if name == "orpo":  # a mean above -eps has its odds cut at eps: see `log_odds`
            cut = torch.maximum(*means(logps))[: len(CASES)] > -2 * torch.finfo(dtype).eps
            near = torch.where(cut, values[: len(CASES)], near)
        assert torch.allclose(values[: len(CASES)], near, rtol=1e-3, atol=1e-3)


CHECKS = [check_formula, check_extremes]


def test_every_loss_has_a_formula_here_and_a_name_on_the_command_line():
    assert list(FORMULAS) == list(LOSSES)
    assert list(LOSS_NAMES) == [*LOSSES, *UNPAIRED]


def test_every_argument_of_a_loss_is_an_option_that_is_passed_on():
    for name, loss in {**LOSSES, **UNPAIRED}.items():
        arguments = list(inspect.signature(loss).parameters)[1:]
        assert set(arguments) <= set(LOSS_OPTIONS) & {f.name for f in fields(Train)}
        given = {argument: 0.375 for argument in arguments}
        verb = Train(pairs="pairs.jsonl", loss=name, **given)
        assert verb.loss_options() == given


def test_which_losses_begin_at_log_2():
    logps, tokens = torch.tensor([-30.0, -7.0]), torch.tensor([9.0, 4.0])
    still = PairLogps(logps, logps - 5, logps, logps - 5, tokens, tokens + 1)
    same = (name for name, f in LOSSES.items() if (f(still) - math.log(2)).abs().max() < 1e-5)
    assert tuple(same) == LOG_2_AT_FIRST


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("check", CHECKS)
def test_loss(name, check):
    check(name, LOSSES[name])


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_gets_no_gradient_and_is_not_read_where_there_is_none(name):
    logps = pair_logps(CASES[:4])
    before = LOSSES[name](logps, **arguments(name))
    before.sum().backward()
    assert logps.chosen.grad is not None
    assert logps.reference_chosen.grad is None and logps.reference_rejected.grad is None
    nothing = torch.full((4,), math.nan, dtype=torch.float64)
    after = LOSSES[name](logps._replace(reference_chosen=nothing, reference_rejected=nothing))
    assert after.isfinite().all() == (name in REFERENCE_FREE)


# --- traps ---


def ratios(l):
    return l.chosen - l.reference_chosen, l.rejected - l.reference_rejected


def margin(l):
    return ratios(l)[0] - ratios(l)[1]


def mean_margin(l):
    return margin(per_token(l))


def right_and_wrong(l, beta):
    return -F.logsigmoid(beta * margin(l)), -F.logsigmoid(-beta * margin(l))


def robust_with_plus(l, beta=0.1, label_smoothing=0.1):
    right, wrong = right_and_wrong(l, beta)
    return ((1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def robust_undivided(l, beta=0.1, label_smoothing=0.1):
    right, wrong = right_and_wrong(l, beta)
    return (1 - label_smoothing) * right - label_smoothing * wrong


def cdpo_swapped(l, beta=0.1, label_smoothing=0.1):
    return cdpo_loss(l, beta, 1 - label_smoothing)


def log_odds_as_written(logp):
    return torch.log(logp.exp() / (1 - logp.exp()))


def orpo(l, beta, w, r, odds=log_odds):
    return -w - beta * F.logsigmoid(odds(w) - odds(r))


def chi_like(l, beta, price):
    chosen, rejected = ratios(l)
    return -F.logsigmoid(beta * (price(chosen) - price(rejected)))


def means(l):
    return per_token(l).chosen, per_token(l).rejected


TRAPS = {
    "dpo": {
        "log(sigmoid)": lambda l, beta=0.1: -torch.log(torch.sigmoid(beta * margin(l))),
        "no reference": lambda l, beta=0.1: -F.logsigmoid(beta * (l.chosen - l.rejected)),
        "swapped": lambda l, beta=0.1: -F.logsigmoid(-beta * margin(l)),
    },
    "cdpo": {
        "labels swapped": cdpo_swapped,
        "margin scaled by 1 - 2 eps": lambda l, beta=0.1, label_smoothing=0.1: (
            -F.logsigmoid(beta * (1 - 2 * label_smoothing) * margin(l))
        ),
    },
    "robust": {
        "plus": robust_with_plus,
        "not divided by 1 - 2 eps": robust_undivided,
        "cdpo": cdpo_loss,
    },
    "dpo-norm": {
        "sums": lambda l, beta=2.0: dpo_loss(l, beta),
        "policy averaged, reference not": lambda l, beta=2.0: dpo_loss(
            per_token(l)._replace(
                reference_chosen=l.reference_chosen, reference_rejected=l.reference_rejected
            ),
            beta,
        ),
        "one length for both": lambda l, beta=2.0: dpo_loss(
            per_token(l._replace(rejected_tokens=l.chosen_tokens)), beta
        ),
        "margin over both lengths": lambda l, beta=2.0: (
            -F.logsigmoid(beta * margin(l) / (l.chosen_tokens + l.rejected_tokens))
        ),
    },
    "ipo": {
        "1 / beta": lambda l, beta=0.1: (margin(l) - 1 / beta).square(),
        "beta / 2": lambda l, beta=0.1: (margin(l) - beta / 2).square(),
        "means": lambda l, beta=0.1: (mean_margin(l) - 1 / (2 * beta)).square(),
        "margin times beta": lambda l, beta=0.1: (beta * margin(l) - 1 / (2 * beta)).square(),
        "target added": lambda l, beta=0.1: (margin(l) + 1 / (2 * beta)).square(),
        "not squared": lambda l, beta=0.1: (margin(l) - 1 / (2 * beta)).abs(),
        "no reference": lambda l, beta=0.1: (l.chosen - l.rejected - 1 / (2 * beta)).square(),
    },
    "ipo-token": {
        "sums": ipo_loss,
        "margin over both lengths": lambda l, beta=0.1: (
            margin(l) / (l.chosen_tokens + l.rejected_tokens) - 1 / (2 * beta)
        ).square(),
    },
    "hinge": {
        "no beta": lambda l, beta=0.1: F.relu(1 - margin(l)),
        "beta outside": lambda l, beta=0.1: F.relu(1 - margin(l)) * beta,
        "no reference (SLiC's own)": lambda l, beta=0.1: F.relu(1 - beta * (l.chosen - l.rejected)),
        "swapped": lambda l, beta=0.1: F.relu(1 + beta * margin(l)),
        "not clipped": lambda l, beta=0.1: 1 - beta * margin(l),
        "squared": lambda l, beta=0.1: F.relu(1 - beta * margin(l)).square(),
        "softplus": lambda l, beta=0.1: F.softplus(1 - beta * margin(l)),
    },
    "apo-zero": {
        "apo-down": apo_down_loss,
        "both up": lambda l, beta=0.1: (
            (-beta * ratios(l)[0]).sigmoid() + (-beta * ratios(l)[1]).sigmoid()
        ),
        "with logs": lambda l, beta=0.1: (
            -F.logsigmoid(beta * ratios(l)[0]) - F.logsigmoid(-beta * ratios(l)[1])
        ),
        "no reference": lambda l, beta=0.1: (
            (-beta * l.chosen).sigmoid() + (beta * l.rejected).sigmoid()
        ),
    },
    "apo-down": {
        "apo-zero": apo_zero_loss,
        "chosen up": lambda l, beta=0.1: (
            (-beta * ratios(l)[0]).sigmoid() + (-beta * margin(l)).sigmoid()
        ),
        "margin swapped": lambda l, beta=0.1: (
            (beta * ratios(l)[0]).sigmoid() + (beta * margin(l)).sigmoid()
        ),
        "rejected alone": lambda l, beta=0.1: (
            (beta * ratios(l)[0]).sigmoid() + (beta * ratios(l)[1]).sigmoid()
        ),
    },
    "rpo": {
        "likelihood of the sum": lambda l, beta=0.1, alpha=1.0: (
            dpo_loss(l, beta) - alpha * l.chosen
        ),
        "likelihood without a sign": lambda l, beta=0.1, alpha=1.0: rpo_loss(l, beta, -alpha),
        "likelihood of the rejected": lambda l, beta=0.1, alpha=1.0: (
            dpo_loss(l, beta) - alpha * means(l)[1]
        ),
        "log-ratio for likelihood": lambda l, beta=0.1, alpha=1.0: (
            dpo_loss(l, beta) - alpha * ratios(l)[0] / l.chosen_tokens
        ),
        "no reference (CPO)": cpo_loss,
        "alpha on DPO": lambda l, beta=0.1, alpha=1.0: alpha * dpo_loss(l, beta) - means(l)[0],
    },
    "dpo-positive": {
        "no penalty": lambda l, beta=0.1, alpha=5.0: dpo_loss(l, beta),
        "penalty above the reference": lambda l, beta=0.1, alpha=5.0: (
            -F.logsigmoid(beta * (margin(l) - alpha * F.relu(ratios(l)[0])))
        ),
        "penalty added": lambda l, beta=0.1, alpha=5.0: dpo_positive_loss(l, beta, -alpha),
        "penalty of the rejected": lambda l, beta=0.1, alpha=5.0: (
            -F.logsigmoid(beta * (margin(l) - alpha * F.relu(-ratios(l)[1])))
        ),
        "penalty outside beta": lambda l, beta=0.1, alpha=5.0: (
            -F.logsigmoid(beta * margin(l) - alpha * F.relu(-ratios(l)[0]))
        ),
        "penalty outside the sigmoid": lambda l, beta=0.1, alpha=5.0: (
            dpo_loss(l, beta) + alpha * F.relu(-ratios(l)[0])
        ),
        "penalty on both sides": lambda l, beta=0.1, alpha=5.0: (
            -F.logsigmoid(beta * (margin(l) + alpha * ratios(l)[0]))
        ),
    },
    "r-dpo": {
        "sign": lambda l, beta=0.1, alpha=0.02: r_dpo_loss(l, beta, -alpha),
        "alpha times beta": lambda l, beta=0.1, alpha=0.02: r_dpo_loss(l, beta, alpha * beta),
        "no lengths": lambda l, beta=0.1, alpha=0.02: dpo_loss(l, beta),
        "means": lambda l, beta=0.1, alpha=0.02: r_dpo_loss(per_token(l), beta, alpha),
        "the chosen's length alone": lambda l, beta=0.1, alpha=0.02: (
            -F.logsigmoid(beta * margin(l) + alpha * l.chosen_tokens)
        ),
        "float32 lengths": lambda l, beta=0.1, alpha=0.02: (
            -F.logsigmoid(beta * margin(l) + alpha * (l.chosen_tokens - l.rejected_tokens))
        ),
    },
    "chi-po": {
        "DPO": dpo_loss,
        "no logarithm": lambda l, beta=0.1: chi_like(l, beta, lambda u: u.clamp(max=20).exp()),
        "not cut": lambda l, beta=0.1: chi_like(l, beta, lambda u: u.exp() + u),
        "all of it cut": lambda l, beta=0.1: chi_like(
            l, beta, lambda u: u.clamp(max=20).exp() + u.clamp(max=20)
        ),
        "ratio squared": lambda l, beta=0.1: chi_like(
            l, beta, lambda u: u.clamp(max=20).exp().square() + u
        ),
        "ratio of the margin": lambda l, beta=0.1: (
            -F.logsigmoid(beta * (margin(l).clamp(max=20).exp() + margin(l)))
        ),
        "no reference": lambda l, beta=0.1: chi_po_loss(
            l._replace(reference_chosen=0 * l.chosen, reference_rejected=0 * l.rejected), beta
        ),
    },
    "simpo": {
        "gamma times beta": lambda l, beta=2.0, gamma=1.0: simpo_loss(l, beta, beta * gamma),
        "gamma over beta": lambda l, beta=2.0, gamma=1.0: simpo_loss(l, beta, gamma / beta),
        "gamma added": lambda l, beta=2.0, gamma=1.0: simpo_loss(l, beta, -gamma),
        "no gamma": lambda l, beta=2.0, gamma=1.0: simpo_loss(l, beta, 0.0),
        "sums": lambda l, beta=2.0, gamma=1.0: (
            -F.logsigmoid(beta * (l.chosen - l.rejected) - gamma)
        ),
        "with a reference": lambda l, beta=2.0, gamma=1.0: (
            -F.logsigmoid(beta * mean_margin(l) - gamma)
        ),
    },
    "cpo": {
        "no likelihood": lambda l, beta=0.1, alpha=1.0: cpo_loss(l, beta, 0.0),
        "likelihood of the sum": lambda l, beta=0.1, alpha=1.0: (
            cpo_loss(l, beta, 0.0) - alpha * l.chosen
        ),
        "likelihood without a sign": lambda l, beta=0.1, alpha=1.0: cpo_loss(l, beta, -alpha),
        "likelihood of the rejected": lambda l, beta=0.1, alpha=1.0: (
            cpo_loss(l, beta, 0.0) - alpha * means(l)[1]
        ),
        "with a reference": lambda l, beta=0.1, alpha=1.0: dpo_loss(l, beta) - alpha * means(l)[0],
        "means": lambda l, beta=0.1, alpha=1.0: cpo_loss(per_token(l), beta, alpha),
    },
    "orpo": {
        "odds of sums": lambda l, beta=0.1: (
            -means(l)[0] - beta * F.logsigmoid(log_odds(l.chosen) - log_odds(l.rejected))
        ),
        "all of it on sums": lambda l, beta=0.1: orpo(l, beta, l.chosen, l.rejected),
        "no odds": lambda l, beta=0.1: orpo(l, beta, *means(l), odds=lambda x: x),
        "odds unguarded": lambda l, beta=0.1: orpo(l, beta, *means(l), odds=log_odds_as_written),
        "1 + p": lambda l, beta=0.1: orpo(
            l, beta, *means(l), odds=lambda x: x - torch.log1p(x.exp())
        ),
        "plus": lambda l, beta=0.1: orpo(l, -beta, *means(l)),
        "beta inside": lambda l, beta=0.1: orpo(
            l, 1.0, *means(l), odds=lambda x: beta * log_odds(x)
        ),
        "no likelihood": lambda l, beta=0.1: orpo(l, beta, *means(l)) + means(l)[0],
    },
    "preferred-ft": {
        "mean": lambda l: -means(l)[0],
        "both": lambda l: -l.chosen - l.rejected,
        "log-ratio": lambda l: -ratios(l)[0],
        "sign": lambda l: l.chosen,
    },
    "unlikelihood": {
        "sign": lambda l, alpha=0.1: unlikelihood_loss(l, -alpha),
        "alpha on the chosen": lambda l, alpha=0.1: -alpha * l.chosen + l.rejected,
        "no alpha": lambda l, alpha=0.1: unlikelihood_loss(l, 1.0),
        "log(1 - p)": lambda l, alpha=0.1: (
            -l.chosen - alpha * torch.log(-torch.expm1(l.rejected.clamp(max=-1e-12)))
        ),
        "means": lambda l, alpha=0.1: unlikelihood_loss(per_token(l), alpha),
    },
}


def caught_by(checks, *arguments):
    caught = []
    for check in checks:
        try:
            check(*arguments)
        except AssertionError:
            caught.append(check.__name__)
    return caught


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_caught(name):
    assert TRAPS[name]
    for trap, loss in {**TRAPS[name], "detached": detached(LOSSES[name])}.items():
        assert caught_by(CHECKS, name, loss), f"no check notices {name} with {trap!r}"


def detached(loss):
    def without_gradient(logps, **given):
        return loss(logps, **given).detach() + 0 * logps.chosen

    return without_gradient


def test_every_loss_has_traps():
    assert list(TRAPS) == list(LOSSES)


# --- facts ---


def logps_of(chosen, rejected, reference_chosen=0.0, reference_rejected=0.0, m=1, n=1):
    row = (chosen, rejected, reference_chosen, reference_rejected, m, n)
    return pair_logps([row])


@pytest.mark.parametrize("tau", [0.05, 0.4, 2.0])
def test_ipo_draws_a_certain_pair_to_a_margin_of_1_over_2_tau(tau):
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    start = logps_of(-3.0, -7.0, -4.0, -5.0)
    exact.minimise(lambda: ipo_loss(start._replace(chosen=-3.0 + shift), tau).sum(), [shift])
    assert abs(margin(start._replace(chosen=-3.0 + shift)).item() - 1 / (2 * tau)) < 1e-9


def test_hinge_is_done_with_a_pair_at_a_margin_of_1_over_beta():
    beta = 0.25  # at a margin of 4
    for size, slope in ((3.99, -beta), (4.01, 0.0), (1e4, 0.0), (-1e4, -beta)):
        logps = logps_of(size, 0.0)
        values = hinge_loss(logps, beta)
        assert [g.item() for g in slopes(values, logps)] == [slope, -slope]
        assert values.item() == pytest.approx(max(0.0, 1 - beta * size), abs=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.49])
def test_flipped_labels_cost_the_robust_loss_nothing_on_average(eps):
    logps = pair_logps(CASES[:24])
    w, l, reference_w, reference_l, m, n = logps
    flipped = PairLogps(l, w, reference_l, reference_w, n, m)
    mean = (1 - eps) * robust_loss(logps, 0.1, eps) + eps * robust_loss(flipped, 0.1, eps)
    clean = dpo_loss(logps, 0.1)
    assert ((mean - clean).abs() < 1e-12 * (1 + clean.abs()) / (1 - 2 * eps)).all()
    smoothed = (1 - eps) * dpo_loss(logps, 0.1) + eps * dpo_loss(flipped, 0.1)
    assert (cdpo_loss(logps, 0.1, eps) - smoothed).abs().max() < 1e-12  # and cDPO learns the flips


@pytest.mark.parametrize("name", LOSSES)
def test_twice_the_tokens_at_the_same_mean_is_the_same_only_where_lengths_divide(name):
    logps = pair_logps(CASES[:24])
    doubled = PairLogps(*(2 * t for t in logps))
    difference = (LOSSES[name](doubled) - LOSSES[name](logps)).abs().max()
    if name in ("dpo-norm", "ipo-token", "simpo", "orpo"):
        assert difference < 1e-12
    else:
        assert difference > 1e-3


def test_the_odds_of_whole_sequences_are_no_odds_and_count_tokens():
    sums = torch.tensor([-50.0, -500.0], dtype=torch.float64)
    assert (log_odds(sums) - sums).abs().max() < 1e-15 * 500  # 1 - p is 1
    long = logps_of(-100.0, -10.0, m=100, n=10)  # a nat a token, both
    on_sums = F.logsigmoid(log_odds(long.chosen) - log_odds(long.rejected))
    assert on_sums.item() == pytest.approx(-90.0)  # length alone
    assert orpo_loss(long, 0.1).item() == pytest.approx(1 + 0.1 * math.log(2), abs=1e-12)
    likely = torch.tensor([-1e-3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(likely).sum(), likely)
    assert slope.item() == pytest.approx(1 / -math.expm1(-1e-3))  # 1 / (1 - p), here 1000


def test_where_the_losses_begin_when_the_policy_is_the_reference():
    logps = logps_of(-30.0, -20.0, -30.0, -20.0, 10, 10)
    begin = {
        "dpo": math.log(2), "cdpo": math.log(2), "robust": math.log(2), "dpo-norm": math.log(2),
        "ipo": 25.0, "ipo-token": 25.0, "hinge": 1.0, "apo-zero": 1.0, "apo-down": 1.0,
        "rpo": math.log(2) + 3.0, "dpo-positive": math.log(2), "r-dpo": math.log(2),
        "chi-po": math.log(2), "simpo": math.log1p(math.exp(3)),
        "cpo": math.log1p(math.exp(1)) + 3.0,
        "preferred-ft": 30.0, "unlikelihood": 28.0,
    }  # fmt: skip
    for name, value in begin.items():
        assert LOSSES[name](logps).item() == pytest.approx(value, rel=1e-12), name


def test_apo_zero_moves_both_and_apo_down_begins_with_the_rejected():
    logps = logps_of(-3.0, -2.0, -3.0, -2.0)
    for loss, chosen, rejected in ((apo_zero_loss, -0.1, 0.1), (apo_down_loss, 0.0, 0.1)):
        found = [g.item() for g in slopes(loss(logps, 0.4), logps)]
        assert found == pytest.approx([chosen, rejected], abs=1e-15)
    ahead = logps_of(5.0, 0.0)  # the margin is won: what is left is the pull down on both
    chosen, rejected = (g.item() for g in slopes(apo_down_loss(ahead, 0.4), ahead))
    assert chosen > 0 and rejected > 0


def test_losses_that_become_each_other():
    logps = pair_logps(CASES)
    none = torch.zeros_like(logps.chosen)
    free = logps._replace(reference_chosen=none, reference_rejected=none)
    pairs = [
        (cpo_loss(logps, 0.3, alpha=0.0), dpo_loss(free, 0.3)),  # a uniform reference
        (simpo_loss(logps, 0.3, gamma=0.0), LOSSES["dpo-norm"](free, 0.3)),
        (robust_loss(logps, 0.3, 0.0), dpo_loss(logps, 0.3)),
        (unlikelihood_loss(logps, 0.0), LOSSES["preferred-ft"](logps)),
        (orpo_loss(logps, 0.0), -per_token(logps).chosen),
        (rpo_loss(logps, 0.3, 0.0), dpo_loss(logps, 0.3)),
        (rpo_loss(free, 0.3, 0.7), cpo_loss(logps, 0.3, 0.7)),
        (dpo_positive_loss(logps, 0.3, 0.0), dpo_loss(logps, 0.3)),
        (r_dpo_loss(logps, 0.3, 0.0), dpo_loss(logps, 0.3)),
    ]
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_dpo_positive_pulls_1_plus_alpha_times_as_hard_below_the_reference_alone():
    at_log_2 = logps_of(-5.0, -9.0, -4.0, -8.0 + 5.0 - 6.0)  # r_w = -1, margin 1 * (1 - alpha)
    for r_w, factor in ((-1.0, 1 + 5.0), (1.0, 1.0)):
        logps = logps_of(-5.0, -9.0, -5.0 - r_w, -9.0)
        chosen, rejected = (g.item() for g in slopes(dpo_positive_loss(logps, 0.1), logps))
        assert chosen == pytest.approx(-factor * rejected, rel=1e-12)
    assert dpo_positive_loss(at_log_2, 0.1).item() > dpo_loss(at_log_2, 0.1).item()


# What each loss finds with endless Bradley-Terry labels in a world of eight completions.
WORLD = torch.tensor([1.5, -0.5, 0.3, -2.0, 0.9, 2.2, -1.1, 0.0], dtype=torch.float64)
LENGTHS = torch.tensor([1.0, 3, 2, 6, 4, 2, 5, 3], dtype=torch.float64)


def world_reference():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, generator=generator, dtype=torch.float64).mul(0.7).log_softmax(0)


def fitted(loss, rewards, reference):
    """The policy that minimises a loss of pairs over every pair and both of its answers."""
    logits = reference.clone().requires_grad_()
    i, j = (~torch.eye(8, dtype=torch.bool)).nonzero().unbind(1)
    chances = exact.preferences(rewards)[i, j]

    def mean_loss():
        p = logits.log_softmax(0)
        return (
            chances
            * loss(PairLogps(p[i], p[j], reference[i], reference[j], LENGTHS[i], LENGTHS[j]))
        ).mean()

    exact.minimise(mean_loss, [logits])
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_chi_po_finds_the_optimum_of_its_own_objective(beta):
    reference = world_reference()
    optimum = exact.optimal_chi_policy(reference, WORLD, beta)
    found = fitted(lambda logps: chi_po_loss(logps, beta), WORLD, reference)
    assert exact.total_variation(found, optimum) < 1e-6
    assert exact.total_variation(found, exact.optimal_policy(reference, WORLD, beta)) > 0.02


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_r_dpo_finds_the_optimum_without_what_labels_pay_for_length(alpha):
    reference, labels = world_reference(), WORLD + alpha * LENGTHS
    optimum = exact.optimal_policy(reference, WORLD, 0.7)
    found = fitted(lambda logps: r_dpo_loss(logps, 0.7, alpha), labels, reference)
    assert exact.total_variation(found, optimum) < 1e-6
    tempted = fitted(lambda logps: dpo_loss(logps, 0.7), labels, reference)
    assert exact.total_variation(tempted, optimum) > 0.01


def test_a_likelihood_term_costs_the_optimum():
    reference, optimum = world_reference(), exact.optimal_policy(world_reference(), WORLD, 0.7)
    for loss in (rpo_loss, dpo_positive_loss):
        found = fitted(lambda logps: loss(logps, 0.7), WORLD, reference)  # noqa: B023
        assert exact.total_variation(found, optimum) > 0.05


# --- rankings ---


def ranking_logps(k=5, n=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    policy, reference = (
        -40 * torch.rand(n, k, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    policy[0, 0], policy[1, 1] = -1e4, -1e4
    return RankingLogps(policy.to(dtype).requires_grad_(), reference.to(dtype))


def ranking_value(policy, reference, beta):
    """-log of the product over places of (the drawn one's odds over those of all that are left)."""
    odds = [exp(mp.mpf(beta) * (mp.mpf(p) - mp.mpf(q))) for p, q in zip(policy, reference)]
    return -log(mp.fprod(o / mp.fsum(odds[i:]) for i, o in enumerate(odds)))


def check_ranking_formula(loss):
    logps, beta = ranking_logps(), 0.37
    values = loss(logps, beta)
    (slopes,) = torch.autograd.grad(values.sum(), logps.policy)
    assert values.shape == (6,)
    for row, (policy, reference) in enumerate(zip(*(t.tolist() for t in logps))):
        assert values[row].item() == pytest.approx(float(ranking_value(policy, reference, beta)))
        for place in range(5):

            def value(x):
                moved = [*policy[:place], x, *policy[place + 1 :]]  # noqa: B023
                return ranking_value(moved, reference, beta)  # noqa: B023

            slope = float(mp.diff(value, mp.mpf(policy[place])))
            assert slopes[row, place].item() == pytest.approx(slope, rel=1e-8, abs=1e-12)


def check_ranking_extremes(loss):
    for dtype in (torch.float32, torch.float64):
        logps = ranking_logps(dtype=dtype)
        values = loss(logps)
        (slopes,) = torch.autograd.grad(values.sum(), logps.policy)
        assert values.dtype == dtype and values.isfinite().all() and slopes.isfinite().all()


def plackett_luce_as_written(logps, beta=0.1):
    odds = (beta * (logps.policy - logps.reference)).exp()
    left = odds.flip(1).cumsum(1).flip(1)
    return -(odds / left).log().sum(1)


RANKING_TRAPS = {
    "worst first": lambda l, beta=0.1: plackett_luce_loss(
        RankingLogps(l.policy.flip(1), l.reference.flip(1)), beta
    ),
    "best against the rest alone": lambda l, beta=0.1: (
        -(beta * (l.policy - l.reference)).log_softmax(1)[:, 0]
    ),
    "everyone against all": lambda l, beta=0.1: (
        -(beta * (l.policy - l.reference)).log_softmax(1).sum(1)
    ),
    "no reference": lambda l, beta=0.1: plackett_luce_loss(
        l._replace(reference=torch.zeros_like(l.reference)), beta
    ),
    "no beta": lambda l, beta=0.1: plackett_luce_loss(l, 1.0),
    "in probabilities": plackett_luce_as_written,
    "mean over places": lambda l, beta=0.1: plackett_luce_loss(l, beta) / 4,
    "detached": lambda l, beta=0.1: plackett_luce_loss(l, beta).detach() + 0 * l.policy.sum(),
}
RANKING_CHECKS = [check_ranking_formula, check_ranking_extremes]


@pytest.mark.parametrize("check", RANKING_CHECKS)
def test_plackett_luce(check):
    check(plackett_luce_loss)


@pytest.mark.parametrize("trap", RANKING_TRAPS)
def test_each_trap_of_plackett_luce_is_caught(trap):
    assert caught_by(RANKING_CHECKS, RANKING_TRAPS[trap])


def test_a_ranking_of_two_is_a_pair():
    logps = pair_logps(CASES)
    ranking = RankingLogps(
        torch.stack([logps.chosen, logps.rejected], 1),
        torch.stack([logps.reference_chosen, logps.reference_rejected], 1),
    )
    assert torch.allclose(plackett_luce_loss(ranking, 0.3), dpo_loss(logps, 0.3), rtol=1e-12)


@pytest.mark.parametrize("k", [3, 4])
def test_rankings_and_all_pairs_of_them_have_the_optimum_of_rlhf(k):
    reference, rewards = world_reference()[:6].log_softmax(0), WORLD[:6]
    orders, chances = exact.rankings(rewards, k)
    assert chances.sum().item() == pytest.approx(1) and len(orders) == math.perm(6, k)
    optimum = exact.optimal_policy(reference, rewards, 0.7)

    def ranked(p):
        return plackett_luce_loss(RankingLogps(p[orders], reference[orders]), 0.7)

    def paired(p):
        w, l = torch.triu_indices(k, k, offset=1)
        i, j = orders[:, w], orders[:, l]
        return dpo_loss(PairLogps(p[i], p[j], reference[i], reference[j]), 0.7).mean(1)

    for loss in (ranked, paired):
        logits = reference.clone().requires_grad_()
        exact.minimise(lambda: (chances * loss(logits.log_softmax(0))).sum(), [logits])  # noqa: B023
        assert exact.total_variation(logits.detach().log_softmax(0), optimum) < 1e-6


# --- KTO ---

KTO = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}


def labelled(policy, reference, desirable, elsewhere, dtype=torch.float64):
    policy, reference, elsewhere = (
        torch.tensor(t, dtype=dtype) for t in (policy, reference, elsewhere)
    )
    return LabelledLogps(policy.requires_grad_(), reference, torch.tensor(desirable), elsewhere)


def kto_batches(dtype=torch.float64):
    policy = [-30.0, -4.0, -60.5, -1e4, -2.0, -1e-9]
    reference = [-33.0, -2.0, -61.0, -5.0, -1e4, -2.0]
    desirable = [True, False, True, False, False, True]
    above, below = [3.0, -1.0, 2.0, 0.5, -0.25, 4.0], [3.0, -1.0, -2.0, 0.5, -9.0, -4.0]
    far = [[sign * 1e4] * 6 for sign in (1, -1)]
    batches = [labelled(policy, reference, desirable, z, dtype) for z in (above, below, *far)]
    turned = [not d for d in desirable]
    batches += [labelled(policy, reference, turned, above, dtype)]
    batches += [labelled([-3.0], [-5.0], [d], [z], dtype) for d in (True, False) for z in (1, -1)]
    return batches


def kto_value(policy, reference, desirable, z):
    """lambda_y - v(x, y), Ethayarajh et al. 2024, equation 8, of probabilities."""
    beta, good, bad = (mp.mpf(KTO[k]) for k in KTO)
    r = log(policy / reference)
    return good - good * sigma(beta * (r - z)) if desirable else bad - bad * sigma(beta * (z - r))


def check_kto_formula(loss):
    for batch in kto_batches():
        elsewhere = batch.log_ratios_elsewhere.requires_grad_()
        values = loss(batch, **KTO)
        found, through = torch.autograd.grad(
            values.sum(), (batch.policy, elsewhere), allow_unused=True
        )
        assert through is None or not through.any()  # z is where one stands, not what one moves
        numbers = [mp.mpf(x) for x in elsewhere.tolist()]
        z = max(mp.zero, sum(numbers) / len(numbers))
        for i, (p, q, d) in enumerate(zip(*(t.tolist() for t in batch[:3]))):

            def value(logp):
                return kto_value(exp(logp), exp(mp.mpf(q)), d, z)  # noqa: B023

            assert values[i].item() == pytest.approx(float(value(p)), rel=1e-10, abs=1e-30)
            slope = float(mp.diff(value, mp.mpf(p)))
            assert found[i].item() == pytest.approx(slope, rel=1e-10, abs=1e-30)


def check_kto_extremes(loss):
    for dtype in (torch.float32, torch.float64):
        for batch in kto_batches(dtype):
            values = loss(batch)
            (slope,) = torch.autograd.grad(values.sum(), batch.policy)
            assert values.dtype == dtype and values.isfinite().all() and slope.isfinite().all()


KTO_CHECKS = [check_kto_formula, check_kto_extremes]


@pytest.mark.parametrize("check", KTO_CHECKS)
def test_kto(check):
    check(kto_loss)


def kto_like(kl, swap=False, weights="own"):
    def loss(logps, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
        good, bad = {
            "own": (desirable_weight, undesirable_weight),
            "swapped": (undesirable_weight, desirable_weight),
            "none": (1.0, 1.0),
        }[weights]
        gain = beta * (logps.policy - logps.reference) - kl(logps, beta)
        values = good * (-gain).sigmoid(), bad * gain.sigmoid()
        return torch.where(logps.desirable, *(values[::-1] if swap else values))

    return loss


def kto_kl(logps, beta):
    return beta * logps.log_ratios_elsewhere.detach().mean().clamp(min=0)


def kto_logsigmoid(logps, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    gain = beta * (logps.policy - logps.reference) - kto_kl(logps, beta)
    weight = torch.where(logps.desirable, desirable_weight, undesirable_weight)
    return -weight * F.logsigmoid(torch.where(logps.desirable, gain, -gain))


KTO_TRAPS = {
    "no clamp": kto_like(lambda l, b: b * l.log_ratios_elsewhere.detach().mean()),
    "clamp before the mean": kto_like(
        lambda l, b: b * l.log_ratios_elsewhere.detach().clamp(min=0).mean()
    ),
    "gradient through the KL": kto_like(
        lambda l, b: b * l.log_ratios_elsewhere.mean().clamp(min=0)
    ),
    "KL without beta": kto_like(lambda l, b: l.log_ratios_elsewhere.detach().mean().clamp(min=0)),
    "no KL": kto_like(lambda l, b: 0.0),
    "KL added": kto_like(lambda l, b: -kto_kl(l, b)),
    "each its own KL": kto_like(lambda l, b: b * l.log_ratios_elsewhere.detach().clamp(min=0)),
    "KL of the batch's own completions": kto_like(
        lambda l, b: b * (l.policy - l.reference).detach().mean().clamp(min=0)
    ),
    "labels swapped": kto_like(kto_kl, swap=True),
    "weights swapped": kto_like(kto_kl, weights="swapped"),
    "no weights": kto_like(kto_kl, weights="none"),
    "log sigmoid": kto_logsigmoid,
    "detached": lambda l, **given: kto_loss(l, **given).detach() + 0 * l.policy,
}


def test_kto_like_without_a_mistake_passes():
    assert not caught_by(KTO_CHECKS, kto_like(kto_kl))


@pytest.mark.parametrize("trap", KTO_TRAPS)
def test_each_trap_of_kto_is_caught(trap):
    assert caught_by(KTO_CHECKS, KTO_TRAPS[trap])


def test_kto_begins_at_one_half_whatever_the_label_and_stays_between_0_and_the_weight():
    batch = labelled([-3.0, -9.0], [-3.0, -9.0], [True, False], [0.0, 0.0])
    assert kto_loss(batch).tolist() == [0.5, 0.5]
    for batch in kto_batches():
        values = kto_loss(batch, **KTO)
        most = [KTO["desirable_weight" if d else "undesirable_weight"] for d in batch.desirable]
        assert all(0 <= value <= limit for value, limit in zip(values.tolist(), most))


def test_a_weight_of_kto_counts_for_its_label_alone():
    batch = kto_batches()[0]
    plain = kto_loss(batch)
    weighted = kto_loss(batch, desirable_weight=3.0, undesirable_weight=0.25)
    ratio = torch.where(batch.desirable, 3.0, 0.25).double()
    assert torch.allclose(weighted, ratio * plain, rtol=1e-15)


def test_a_kto_batch_of_one_takes_its_one_estimate_for_the_kl():
    for elsewhere, gain in ((1.5, 0.5), (-1.5, 2.0)):
        batch = labelled([-3.0], [-5.0], [True], [elsewhere])
        assert kto_loss(batch, beta=1.0).item() == pytest.approx(1 / (1 + math.exp(gain)))


# --- arguments ---


def test_a_loss_has_its_own_defaults_and_takes_what_is_given():
    assert loss_arguments("dpo") == {"beta": 0.1}
    assert loss_arguments("simpo", beta=None, gamma=0.5) == {"beta": 2.0, "gamma": 0.5}
    assert loss_arguments("preferred-ft", beta=None) == {}
    assert loss_arguments("kto", desirable_weight=2.0) == {
        "beta": 0.1, "desirable_weight": 2.0, "undesirable_weight": 1.0,
    }  # fmt: skip
    for name in (*LOSSES, "kto"):
        assert loss_arguments(name) == loss_arguments(name, beta=None, gamma=None, alpha=None)


@pytest.mark.parametrize(
    "loss, given, words",
    [
        ("sigmoid", {}, ["no loss 'sigmoid'", "dpo, cdpo", "kto"]),
        ("ipo", {"gamma": 1.0}, ["the loss ipo takes no gamma; it takes beta."]),
        ("dpo", {"label_smoothing": 0.0}, ["takes no label_smoothing"]),
        ("preferred-ft", {"beta": 0.1}, ["takes no beta; it takes nothing."]),
        ("kto", {"alpha": 0.1}, ["takes no alpha", "desirable_weight"]),
        ("unlikelihood", {"beta": 0.1}, ["takes no beta; it takes alpha."]),
        ("simpo", {"beta": 0.0}, ["beta must be above 0, got 0.0"]),
        ("kto", {"beta": -1.0}, ["beta must be above 0, got -1.0"]),
        ("dpo", {"beta": math.nan}, ["beta must be above 0, got nan"]),
        ("robust", {"label_smoothing": 0.5}, ["[0, 0.5), got 0.5", "labels say nothing"]),
        ("cdpo", {"label_smoothing": -0.1}, ["label_smoothing must be in [0, 0.5), got -0.1"]),
        ("cdpo", {"label_smoothing": math.nan}, ["got nan"]),
    ],
)
def test_senseless_arguments_are_refused_in_a_sentence(loss, given, words):
    with pytest.raises(TrainingError) as error:
        loss_arguments(loss, **given)
    assert all(word in str(error.value) for word in words), str(error.value)
