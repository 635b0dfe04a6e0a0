"""11 The family: where IPO stops, ORPO's odds, KTO without pairs, lengths, and which loss when."""

import functools
import inspect
import math

import mpmath
import sympy
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dpo_mini.course.checks.engine import Exercise, Wrong
from dpo_mini.family import LOSSES, LabelledLogps, kto_loss, log_odds, orpo_loss
from dpo_mini.losses import PairLogps

# --- 11.1 where IPO stops ---


def stop_cases(generator):
    """P and eps as expressions in positive symbols, so that they stay between 0 and 1."""
    a, b, beta = sympy.symbols("a b beta", positive=True)
    return [(a / (1 + a), 1 / (1 + b), beta)]


def stop_truth(P, eps, beta):
    """All four kinds of label written out; the average is a parabola, and three points fix it."""

    def loss(margin):
        return (margin - 1 / (2 * beta)) ** 2

    def average(margin):
        y_w_won = (1 - eps) * loss(margin) + eps * loss(-margin)
        y_l_won = (1 - eps) * loss(-margin) + eps * loss(margin)
        return P * y_w_won + (1 - P) * y_l_won

    left, middle, right = map(average, (-1, 0, 1))
    return (left - right) / (2 * (left - 2 * middle + right))


def mixed(P, eps):
    return (1 - eps) * P + eps * (1 - P)


def logit(p):
    return sympy.log(p / (1 - p))


STOP = Exercise(
    id="11.1",
    title="Where IPO stops",
    kind="derive",
    truth=stop_truth,
    cases=stop_cases,
    wrong=(
        Wrong("where DPO stops", lambda P, e, b: logit(mixed(P, e)) / b,
              "That is notebook 05's answer, for the log-sigmoid. Here the loss is a square: differentiate that."),
        Wrong("every label is taken for right and certain", lambda P, e, b: 1 / (2 * b),
              "That is the target of one label. The labels disagree, and each pulls towards its own side: average their losses."),
        Wrong("the flips are left out", lambda P, e, b: (2 * P - 1) / (2 * b),
              "P is the chance that y_w wins. With what chance does the label that reaches you say so?"),
        Wrong("P is taken for 1", lambda P, e, b: (1 - 2 * e) / (2 * b),
              "Without any flip the labels still disagree: y_l wins with chance 1 - P."),
        Wrong("reversed labels are left out", lambda P, e, b: mixed(P, e) / (2 * b),
              "A reversed label does not ask for nothing: it has the margin -Delta, and wants that at 1 / (2 beta)."),
        Wrong("a flip that makes a label right is forgotten", lambda P, e, b: (2 * (1 - e) * P - 1) / (2 * b),
              "A label names y_w in two ways: y_w won and nothing was flipped, or y_l won and the label was flipped."),
        Wrong("flipped labels are thrown away", lambda P, e, b: (1 - e) * (2 * P - 1) / (2 * b),
              "A flipped label is not missing, it pulls the other way."),
        Wrong("flips that strengthen", lambda P, e, b: (1 + 2 * e) * (2 * P - 1) / (2 * b),
              "Put eps = 1/2 in: the labels are coins then, and no side may be preferred."),
        Wrong("flips undone, not suffered", lambda P, e, b: (2 * P - 1) / (2 * b * (1 - 2 * e)),
              "That is what a loss would need that undoes the flips. IPO takes the labels as they come."),
        Wrong("the 2 of the target is missing", lambda P, e, b: (2 * mixed(P, e) - 1) / b,
              "With P = 1 and no flips, 1 / (2 beta) must come out."),
        Wrong("half", lambda P, e, b: (2 * mixed(P, e) - 1) / (4 * b),
              "With P = 1 and no flips, 1 / (2 beta) must come out."),
        Wrong("beta is missing", lambda P, e, b: (2 * mixed(P, e) - 1) / 2,
              "The target is 1 / (2 beta): which beta wants the larger margin?"),
        Wrong("multiplied by beta", lambda P, e, b: 2 * b * (2 * mixed(P, e) - 1),
              "The target is 1 / (2 beta), so a large beta keeps the margin small."),
        Wrong("beta before the margin as well", lambda P, e, b: (2 * mixed(P, e) - 1) / (2 * b**2),
              "In IPO's square the margin is in nats, without beta: beta enters through the target alone."),
        Wrong("the sign", lambda P, e, b: (1 - 2 * mixed(P, e)) / (2 * b),
              "With P near 1 and few flips y_w must come out ahead: Delta above 0."),
        Wrong("no target", lambda P, e, b: sympy.Integer(0),
              "Delta = 0 is where the pulls of both sides meet if both are equally frequent. What if they are not?"),
    ),
    others=(
        lambda P, e, b: (1 - 2 * e) * (2 * P - 1) / (2 * b),
        lambda P, e, b: mixed(P, e) / (2 * b) - mixed(1 - P, e) / (2 * b),
        lambda P, e, b: (P - sympy.Rational(1, 2)) / b - e * (2 * P - 1) / b,
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=4,
    minutes=8,
)  # fmt: skip

# --- 11.2 ORPO, with odds that survive ---

PRECISE = mpmath.mp.clone()
PRECISE.dps = 50


def orpo_cases(generator):
    def lengths(n):
        return torch.randint(3, 40, (n,), generator=generator)

    def summed(means, tokens):
        return (torch.as_tensor(means, dtype=torch.float64) * tokens).requires_grad_()

    def drawn(n, low=0.05, high=4.0):
        return -(low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64))

    cases = []
    for n, beta in ((1, 0.5), (4, 0.1), (6, 2.0)):
        w, l = lengths(n), lengths(n) + 3
        cases.append((summed(drawn(n), w), summed(drawn(n), l), w, l, beta))
    tiny, sure = torch.tensor([-1e3, -2.0, -1e3, -0.1, -900.0]), [-1e-12, -3e-13, -0.5, -1e-9, -1e3]
    w, l = lengths(5), lengths(5) + 1
    return [*cases, (summed(tiny, w), summed(sure, l), w, l, 0.7),
            (summed(sure, w), summed(tiny, l), w, l, 0.3)]  # fmt: skip


class FiftyDigits(torch.autograd.Function):
    """ORPO of mean log-probabilities, value and slopes written out, to fifty digits."""

    @staticmethod
    def forward(ctx, chosen, rejected, beta):
        mp, rows = PRECISE, []
        for w, l in zip(chosen.tolist(), rejected.tolist()):
            p, q, b = mp.exp(w), mp.exp(l), mp.mpf(beta)
            odds_w, odds_l = p / (1 - p), q / (1 - q)
            right = odds_w / (odds_w + odds_l)  # sigma of the log of the odds ratio
            pull = b * odds_l / (odds_w + odds_l)
            value = -mp.log(p) - b * mp.log(right)
            rows.append([float(value), float(-1 - pull / (1 - p)), float(pull / (1 - q))])
        value, *slopes = torch.tensor(rows, dtype=torch.float64).unbind(1)
        ctx.save_for_backward(*slopes)
        return value.contiguous()

    @staticmethod
    def backward(ctx, grad):
        by_chosen, by_rejected = ctx.saved_tensors
        return grad * by_chosen, grad * by_rejected, None


def orpo_truth(chosen, rejected, chosen_tokens, rejected_tokens, beta):
    return FiftyDigits.apply(chosen / chosen_tokens, rejected / rejected_tokens, beta)


def orpo(odds=log_odds, combine=lambda m, n, ratio, b: -m - b * logsigmoid(ratio), means=None):
    """ORPO with one part replaced by a learner's mistake."""

    def loss(w, l, w_tokens, l_tokens, b):
        m, n = means(w, l, w_tokens, l_tokens) if means else (w / w_tokens, l / l_tokens)
        return combine(m, n, odds(m) - odds(n), b)

    return loss


def rounded_odds(m):
    return m - torch.log(1 - m.exp())


def orpo_of_sums(w, l, w_tokens, l_tokens, b):
    return -w / w_tokens - b * logsigmoid(log_odds(w) - log_odds(l))


def orpo_in_two_branches(w, l, w_tokens, l_tokens, b):
    """log(1 - e^m) as Mächler does it: another function on either side of -log 2."""
    m, n = w / w_tokens, l / l_tokens

    def log_rest(m):
        near = m > -math.log(2)
        by_expm1 = (-torch.expm1(torch.where(near, m, -1.0))).log()
        return torch.where(near, by_expm1, torch.log1p(-torch.where(near, -1.0, m).exp()))

    return -m + b * softplus(n - log_rest(n) - m + log_rest(m), threshold=500)


ORPO = Exercise(
    id="11.2",
    title="ORPO's odds",
    kind="implement",
    truth=orpo_truth,
    cases=orpo_cases,
    wrong=(
        Wrong("1 - p loses its digits", orpo(odds=rounded_odds),
              "Where p is nearly 1 the subtraction 1 - p leaves only rounding. torch has a function that computes e^x - 1 without this loss."),
        Wrong("p rounds to 0 or 1", orpo(odds=lambda m: torch.log(m.exp() / (1 - m.exp()))),
              "At a mean of -1000 p rounds to 0, near 0 it rounds to 1. Stay in logarithms: the logarithm of a quotient is a difference, and log p is what you were given."),
        Wrong("odds from an exponential that overflows", orpo(odds=lambda m: -torch.log(torch.expm1(-m))),
              "Right in mathematics: the odds are 1 / (e^-m - 1). But at m = -1000 that exponential is infinite; which one tends to 0 instead?"),
        Wrong("a small number added to 1 - p", orpo(odds=lambda m: m - torch.log(1 - m.exp() + 1e-8)),
              "This is finite and wrong: for a text that the model is sure of, 1 - p is smaller than the number that you add."),
        Wrong("p is cut off below 1", orpo(odds=lambda m: log_odds(m.clamp(max=-1e-6))),
              "A clamp has no gradient where it acts, and it acts on the texts that the model is surest of."),
        Wrong("p of the whole completion", orpo_of_sums,
              "Over a whole text p is so small that 1 - p is 1 and the odds are p itself. ORPO's p is that of an average token."),
        Wrong("sums over tokens everywhere", orpo(means=lambda w, l, m, n: (w, l)),
              "The lengths are given for a purpose: both parts of ORPO take the mean over a completion's tokens."),
        Wrong("the likelihood is a sum over tokens", lambda w, l, m, n, b: orpo()(w, l, m, n, b) + w / m - w,
              "The odds are right. The other part, too, is a mean over the tokens of the chosen completion."),
        Wrong("each completion has the other's length", lambda w, l, m, n, b: orpo()(w, l, n, m, b),
              "A mean over tokens divides by the number of tokens of the same completion."),
        Wrong("one length for both", lambda w, l, m, n, b: orpo()(w, l, m, m, b),
              "The two completions of a pair have lengths of their own."),
        Wrong("no odds", orpo(odds=lambda m: m),
              "That compares p with p. The odds also divide by 1 - p."),
        Wrong("odds that multiply by 1 - p", orpo(odds=lambda m: m + torch.log(-torch.expm1(m))),
              "Odds are p against 1 - p: three to one for p = 0.75. Which sign has log(1 - p) then?"),
        Wrong("the odds, not their logarithm", orpo(odds=lambda m: (-torch.expm1(-m.clamp(min=-500))).neg().reciprocal()),
              "The sigmoid is taken of the logarithm of the odds ratio: equal odds must give sigma(0) = 1/2."),
        Wrong("the logarithm of a sigmoid that rounds to 0", orpo(combine=lambda m, n, ratio, b: -m - b * torch.sigmoid(ratio).log()),
              "Where the rejected text's odds are far above, the sigmoid rounds to 0 and its logarithm is infinite. torch has both in one function."),
        Wrong("the ratio is upside down", orpo(combine=lambda m, n, ratio, b: -m - b * logsigmoid(-ratio)),
              "This raises the odds of the rejected completion. When must the second part be small?"),
        Wrong("the second part has the wrong sign", orpo(combine=lambda m, n, ratio, b: -m + b * logsigmoid(ratio)),
              "Both parts are minus a logarithm of a probability: neither can be below 0."),
        Wrong("the first part has the wrong sign", orpo(combine=lambda m, n, ratio, b: m - b * logsigmoid(ratio)),
              "Both parts are minus a logarithm of a probability: neither can be below 0."),
        Wrong("the first part is missing", orpo(combine=lambda m, n, ratio, b: -b * logsigmoid(ratio)),
              "ORPO replaces fine-tuning as well: what makes the chosen text itself likely?"),
        Wrong("the first part is the rejected completion's", orpo(combine=lambda m, n, ratio, b: -n - b * logsigmoid(ratio)),
              "Which of the two texts is the model to imitate?"),
        Wrong("both completions are imitated", orpo(combine=lambda m, n, ratio, b: -m - n - b * logsigmoid(ratio)),
              "The rejected completion enters only through its odds."),
        Wrong("beta inside the sigmoid", orpo(combine=lambda m, n, ratio, b: -m - logsigmoid(b * ratio)),
              "Here beta is not the price of a nat: it weighs the second part against the first."),
        Wrong("beta is missing", orpo(combine=lambda m, n, ratio, b: -m - logsigmoid(ratio)),
              "The second part counts beta times."),
        Wrong("beta before the first part", orpo(combine=lambda m, n, ratio, b: -b * m - logsigmoid(ratio)),
              "The likelihood counts once. Which part does beta weigh?"),
        Wrong("beta before both parts", orpo(combine=lambda m, n, ratio, b: b * (-m - logsigmoid(ratio))),
              "Beta would then be a learning rate. It weighs one part against the other."),
        Wrong("no logarithm of the sigmoid", orpo(combine=lambda m, n, ratio, b: -m - b * torch.sigmoid(ratio)),
              "The second part is minus beta times a log-sigmoid, like DPO's loss."),
        Wrong("the odds ratio without a sigmoid", orpo(combine=lambda m, n, ratio, b: -m - b * ratio),
              "Without the log-sigmoid nothing says when a pair is settled."),
        Wrong("the odds carry no gradient", orpo(odds=lambda m: log_odds(m).detach()),
              "The value is right. Which part of the loss still moves the policy, and which one no longer does?"),
        Wrong("the rejected completion carries no gradient", lambda w, l, m, n, b: orpo()(w, l.detach(), m, n, b),
              "ORPO pushes the rejected completion down: its log-probability has a gradient."),
        Wrong("averaged over the batch", lambda *a: orpo()(*a).mean(),
              "The task asks for one loss a pair, tensor [batch]; the training loop takes the mean."),
        Wrong("half", lambda *a: orpo()(*a) / 2,
              "The two parts are added, not averaged."),
        Wrong("zeros", lambda w, l, m, n, b: 0 * (w + l),
              "Neither part is ever exactly 0."),
    ),
    others=(
        lambda w, l, m, n, b: orpo_loss(PairLogps(w, l, w, l, m, n), b),
        orpo_in_two_branches,
    ),
    tolerance=1e-9,
    difficulty=3,
    importance=3,
    minutes=10,
)  # fmt: skip

# --- 11.3 KTO ---


def kto_cases(generator):
    def normal(n, shift=0.0, scale=3.0):
        return shift + scale * torch.randn(n, generator=generator, dtype=torch.float64)

    def elsewhere(n, mean):
        """With values on both sides of 0, whatever their mean."""
        drawn = normal(n)
        return (drawn - drawn.mean() + mean * (1 + drawn.abs().mean() / 10)).requires_grad_()

    def labels(*values):
        return torch.tensor(values)[torch.randperm(len(values), generator=generator)]

    def case(desirable, mean, *numbers):
        n = len(desirable)
        reference = normal(n, -60.0)
        return ((reference + normal(n)).requires_grad_(), reference, desirable,
                elsewhere(n, mean), *numbers)  # fmt: skip

    good, bad = [True] * 2, [False] * 3
    far = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.5], dtype=torch.float64).requires_grad_()
    return [
        case(torch.tensor([True]), 0.8, 0.5, 1.5, 0.7),
        case(labels(*good, *bad), 1.0, 0.3, 1.0, 1.0),
        case(labels(*good, *good, *bad), 0.6, 0.7, 0.6, 1.3),
        case(labels(*good, *bad, *bad), -0.9, 0.4, 1.2, 0.5),  # z is 0
        (far, torch.zeros(5, dtype=torch.float64), torch.tensor([True, True, False, False, True]),
         elsewhere(5, 0.7), 1.0, 0.8, 1.7),
    ]  # fmt: skip


def kto_truth(
    policy, reference, desirable, elsewhere, beta, desirable_weight, undesirable_weight
) -> Tensor:
    """Item by item: lambda minus the value that is felt, its sigmoid written as a tanh."""
    z = max(0.0, math.fsum(elsewhere.tolist()) / len(elsewhere))
    losses = []
    for logp, start, good in zip(policy, reference.tolist(), desirable.tolist()):
        gain = (logp - start - z) if good else (z - logp + start)
        weight = desirable_weight if good else undesirable_weight
        losses.append(weight - weight * (1 + torch.tanh(beta * gain / 2)) / 2)
    return torch.stack(losses)


def kl_estimate(p, q, d, e):
    return e.detach().mean().clamp(min=0)


def kto(z=kl_estimate, good=None, bad=None, gain=lambda b, r, z: b * (r - z), ratio=torch.sub):
    """KTO with one part replaced by a learner's mistake."""
    good, bad = good or (lambda g, w: w * (-g).sigmoid()), bad or (lambda g, w: w * g.sigmoid())

    def loss(p, q, d, e, b, w_good, w_bad):
        g = gain(b, ratio(p, q), z(p, q, d, e))
        return torch.where(d, good(g, w_good), bad(g, w_bad))

    return loss


def sigma_of_exponential(x):
    return 1 / (1 + (-x).exp())


def kto_by_signs(p, q, d, e, b, w_good, w_bad):
    sign = 2 * d.double() - 1
    weight = w_bad + (w_good - w_bad) * d.double()
    with torch.no_grad():
        z = torch.relu(e.sum() / e.numel())
    return weight * (1 - torch.sigmoid(b * sign * (p - q - z)))


KTO = Exercise(
    id="11.3",
    title="KTO: a loss without pairs",
    kind="implement",
    truth=kto_truth,
    cases=kto_cases,
    wrong=(
        Wrong("z keeps its gradient", kto(z=lambda p, q, d, e: e.mean().clamp(min=0)),
              "The values are right, but the policy could now lower its loss by moving z. z is a point to measure from, not something to train."),
        Wrong("z is not clamped", kto(z=lambda p, q, d, e: e.detach().mean()),
              "z stands for a KL, which is never below 0; its estimate from a few completions can be."),
        Wrong("clamped before the mean", kto(z=lambda p, q, d, e: e.detach().clamp(min=0).mean()),
              "Single log-ratios may be below 0; only their mean stands for a KL. If you drop the negative ones first, z is too large."),
        Wrong("the mean's absolute value for the clamp", kto(z=lambda p, q, d, e: e.detach().mean().abs()),
              "An estimate of -0.9 does not say that the KL is 0.9. The nearest value that a KL can have is 0."),
        Wrong("z is a sum", kto(z=lambda p, q, d, e: e.detach().sum().clamp(min=0)),
              "A KL is an expectation: its estimate must not grow with the batch."),
        Wrong("a z for each item", kto(z=lambda p, q, d, e: e.detach().clamp(min=0)),
              "One completion's log-ratio is no KL. All items of the batch share one z."),
        Wrong("a z for each item, not clamped", kto(z=lambda p, q, d, e: e.detach()),
              "One completion's log-ratio is no KL. All items of the batch share one z."),
        Wrong("z from the items' own log-ratios", kto(z=lambda p, q, d, e: (p - q).detach().mean().clamp(min=0)),
              "The loss moves the items' own log-ratios. z is measured on the completions of other prompts."),
        Wrong("z from the desirable items' places only", kto(z=lambda p, q, d, e: e[d].detach().mean().clamp(min=0)),
              "All of `elsewhere` counts for z, whatever the label of the item beside it."),
        Wrong("no z", kto(z=lambda p, q, d, e: 0.0),
              "Without z gains and losses are felt from the reference. KTO feels them from where the policy is on average."),
        Wrong("z is added", kto(gain=lambda b, r, z: b * (r + z)),
              "A desirable completion is a gain only as far as its log-ratio exceeds z."),
        Wrong("z on the same side for both labels", lambda p, q, d, e, b, g, u: kto()(p, q, d, e, b, g, u) * d + ~d * u * torch.sigmoid(b * (p - q + kl_estimate(p, q, d, e))),
              "For an undesirable completion the whole difference r - z is turned round, z as well."),
        Wrong("z without beta", kto(gain=lambda b, r, z: b * r - z),
              "r and z are both in nats: beta multiplies their difference."),
        Wrong("beta is missing", kto(gain=lambda b, r, z: r - z),
              "The sigmoid sees beta times the difference."),
        Wrong("divided by beta", kto(gain=lambda b, r, z: (r - z) / b),
              "The implicit reward is beta times the log-ratio."),
        Wrong("beta outside the sigmoid", lambda p, q, d, e, b, g, u: b * kto(gain=lambda b, r, z: r - z)(p, q, d, e, b, g, u),
              "Beta scales what the sigmoid sees, not the loss."),
        Wrong("the two labels are swapped", lambda p, q, d, e, b, g, u: kto()(p, q, ~d, e, b, g, u),
              "Where `desirable` is True, the first weight counts and a larger log-ratio means a smaller loss."),
        Wrong("the weights are swapped", lambda p, q, d, e, b, g, u: kto()(p, q, d, e, b, u, g),
              "Each label has its own weight; which one comes first?"),
        Wrong("the weights are missing", lambda p, q, d, e, b, g, u: kto()(p, q, d, e, b, 1.0, 1.0),
              "Desirable and undesirable completions have weights, for batches that hold more of one kind."),
        Wrong("one weight for both labels", lambda p, q, d, e, b, g, u: kto()(p, q, d, e, b, g, g),
              "Each label has its own weight."),
        Wrong("the weights inside the sigmoid", kto(good=lambda g, w: (-g * w).sigmoid(), bad=lambda g, w: (g * w).sigmoid()),
              "A weight says how much an item's loss counts; beta alone stands inside."),
        Wrong("every completion is taken for desirable", kto(bad=lambda g, w: w * (-g).sigmoid()),
              "Undesirable completions must be pushed down: theirs is the sigmoid of z - r."),
        Wrong("undesirable completions are left out", kto(bad=lambda g, w: 0 * g),
              "Half of what KTO learns is from the completions that were called bad."),
        Wrong("the value for the loss, or the sign of the difference", kto(good=lambda g, w: w * g.sigmoid(), bad=lambda g, w: w * (-g).sigmoid()),
              "That is the value felt, which is to be large: it grows as a desirable completion becomes more likely. Which way must a loss go?"),
        Wrong("minus the value", kto(good=lambda g, w: -w * g.sigmoid(), bad=lambda g, w: -w * (-g).sigmoid()),
              "The gradient is right, the level is not: the loss is weight times (1 - sigmoid), never below 0."),
        Wrong("a log-sigmoid", kto(good=lambda g, w: -w * logsigmoid(g), bad=lambda g, w: -w * logsigmoid(-g)),
              "KTO has no logarithm: a completion that is hopelessly lost pulls as little as one that is settled."),
        Wrong("the sigmoid by an exponential that overflows", kto(good=lambda g, w: w * (1 - sigma_of_exponential(g)), bad=lambda g, w: w * (1 - sigma_of_exponential(-g))),
              "The values are finite, the gradients not: the exponential of ten thousand is infinite. torch has a sigmoid that is safe."),
        Wrong("no reference", kto(ratio=lambda p, q: p),
              "r is a log-ratio: subtract the reference's log-probability of the same completion."),
        Wrong("the reference is added", kto(ratio=torch.add),
              "The logarithm of a ratio is a difference."),
        Wrong("the ratio is upside down", kto(ratio=lambda p, q: q - p),
              "A completion that the policy has made more likely than the reference has r above 0."),
        Wrong("the policy carries no gradient", kto(ratio=lambda p, q: p.detach() - q + 0 * p),
              "z is constant, and so is the reference. The policy's log-probability is what is trained."),
        Wrong("averaged over the batch", lambda *a: kto()(*a).mean(),
              "The task asks for one loss an item, tensor [batch]; the training loop takes the mean."),
        Wrong("half", lambda *a: kto()(*a) / 2,
              "Where r = z the loss is half of the weight already."),
        Wrong("zeros", lambda p, q, *rest: 0 * p,
              "Where r = z the loss is half of the weight."),
    ),
    others=(
        lambda p, q, d, e, b, g, u: kto_loss(LabelledLogps(p, q, d, e), b, g, u),
        kto_by_signs,
    ),
    tolerance=1e-9,
    difficulty=3,
    importance=4,
    minutes=9,
)  # fmt: skip

# --- 11.4 twice as long ---


def longer_truth():
    """Computed: the losses themselves, on the pair before and after."""

    def tensor(x):
        return torch.tensor([x], dtype=torch.float64)

    def loss(name, times, start):
        w, l, n_w, n_l = -20.0 * times, -30.0, 10.0 * times, 12.0
        r_w, r_l = (w, l) if start else (-23.0 * times, -29.0)
        if name == "kto":
            yes, z = torch.tensor([True]), tensor(1.0)
            return kto_loss(LabelledLogps(tensor(w), tensor(r_w), yes, z)).item()
        logps = PairLogps(*map(tensor, (w, l, r_w, r_l, n_w, n_l)))
        options = inspect.signature(LOSSES[name]).parameters
        return LOSSES[name](logps, **({"beta": 0.1} if "beta" in options else {})).item()

    def word(name, start=False):
        change = loss(name, 2, start) - loss(name, 1, start)
        return "same" if abs(change) < 1e-9 else "smaller" if change < 0 else "larger"

    names = ("dpo", "ipo", "kto", "dpo-norm", "simpo", "orpo", "cpo", "preferred-ft")
    return {name: word(name) for name in names} | {
        "dpo, at the start": word("dpo", True),
        "cpo, at the start": word("cpo", True),
    }


LONGER = Exercise(
    id="11.4",
    title="Twice as long",
    kind="predict",
    truth=longer_truth,
    cases=lambda generator: [()],
    wrong=(
        Wrong("DPO's margin counted per token", lambda: {"dpo": "same"},
              "DPO adds up a completion's tokens and divides by nothing. What becomes of the chosen log-ratio, which was 3?"),
        Wrong("a longer text taken for a less likely one, in DPO", lambda: {"dpo": "larger"},
              "The longer text is less likely under the policy, but even less so under the reference. Compute its log-ratio."),
        Wrong("a larger margin is always better", lambda: {"ipo": "smaller"},
              "With beta = 0.1, which margin does IPO want? The pair had 4; how many has it now?"),
        Wrong("IPO's margin counted per token", lambda: {"ipo": "same"},
              "In the form of the table IPO's margin is a difference of sums, and the chosen one's sum has doubled."),
        Wrong("KTO's log-ratio counted per token", lambda: {"kto": "same"},
              "KTO compares a whole completion's log-ratio with z. z stays; does the log-ratio?"),
        Wrong("a longer text taken for a loss, in KTO", lambda: {"kto": "larger"},
              "The completion is desirable and its log-ratio is above z. Does the distance to z grow or shrink?"),
        Wrong("length-normalised DPO sees the length", lambda: {"dpo-norm": "smaller"},
              "The chosen log-ratio is doubled, then divided by twice as many tokens."),
        Wrong("length-normalised DPO punishes the length", lambda: {"dpo-norm": "larger"},
              "The chosen log-ratio is doubled, then divided by twice as many tokens."),
        Wrong("SimPO punishes the length", lambda: {"simpo": "larger"},
              "It has no reference, but what does it divide by?"),
        Wrong("SimPO rewards the length", lambda: {"simpo": "smaller"},
              "SimPO sees the log-probability of an average token. Has that changed?"),
        Wrong("ORPO punishes the length", lambda: {"orpo": "larger"},
              "Both parts of ORPO are about an average token: -20 in 10 tokens, then -40 in 20."),
        Wrong("ORPO rewards the length", lambda: {"orpo": "smaller"},
              "Both parts of ORPO are about an average token: -20 in 10 tokens, then -40 in 20."),
        Wrong("CPO taken for normalised", lambda: {"cpo": "same"},
              "Only CPO's likelihood is divided by a length. Its margin compares whole texts: -20 with -30 first, and then?"),
        Wrong("CPO taken for DPO", lambda: {"cpo": "smaller"},
              "Where DPO has a log-ratio CPO has a bare log-probability, and that of a longer text is lower."),
        Wrong("Preferred-FT taken for a mean over tokens", lambda: {"preferred-ft": "same"},
              "As the table has it the loss is minus the log-probability of the whole text."),
        Wrong("Preferred-FT rewards the length", lambda: {"preferred-ft": "smaller"},
              "The loss is minus the log-probability: 20 at first, and then?"),
        Wrong("DPO rewards length from the start", lambda: {"dpo, at the start": "smaller"},
              "Where policy and reference agree, all log-ratios are 0. What is twice 0?"),
        Wrong("DPO punishes length from the start", lambda: {"dpo, at the start": "larger"},
              "Where policy and reference agree, all log-ratios are 0. What is twice 0?"),
        Wrong("CPO is blind to length at the start", lambda: {"cpo, at the start": "same"},
              "CPO does not look at the reference, so it cannot notice that the two agree."),
        Wrong("CPO rewards length at the start", lambda: {"cpo, at the start": "smaller"},
              "CPO does not look at the reference: this is the same comparison of -20 with -30, then of -40 with -30."),
    ),
    difficulty=2,
    importance=4,
    minutes=6,
)  # fmt: skip

# --- 11.5 which loss? ---

CANDIDATES = ("dpo", "robust", "ipo", "hinge", "dpo-norm", "simpo", "cpo", "orpo")
NEEDS = {
    "thumbs": {"pairs": False},
    "coins": {"clean on average": True},
    "sure": {"pairs": True, "pulls back": True},
    "long": {"pairs": True, "reference": True, "per token": True},
    "one model": {"pairs": True, "reference": False, "imitates": False},
    "base": {"pairs": True, "reference": False, "imitates": True, "per token": True},
    "rlhf": {"finds pi*": True},
}


def traits(name: str) -> dict[str, bool]:
    """What a loss of pairs is like, found by trying it: values and slopes at random pairs."""
    beta, eps, generator = 0.3, 0.2, torch.Generator().manual_seed(0)
    given = {"beta": beta, "label_smoothing": eps}

    def at(loss, w, l, q_w, q_l, m, n):
        """Value of the loss, and its slopes by log pi of chosen and rejected."""
        row = torch.tensor([[w], [l], [q_w], [q_l], [m], [n]], dtype=torch.float64)
        logps = PairLogps(*row.requires_grad_())
        options = inspect.signature(LOSSES[loss]).parameters
        value = LOSSES[loss](logps, **{k: v for k, v in given.items() if k in options})
        slopes = torch.autograd.grad(value.sum(), row)[0][:2, 0]
        return value.item(), *slopes.tolist()

    def equal(a, b):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)

    found = {}
    for _ in range(3):
        q_w, q_l, r_w, r_l = (torch.rand(4, generator=generator, dtype=torch.float64)).tolist()
        q_w, q_l = -20 - 5 * q_w, -24 - 5 * q_l
        w, l, m, n = q_w + r_w, q_l + r_l, 9.0, 13.0  # margin below 1: no hinge is at rest
        pair, swapped = (w, l, q_w, q_l, m, n), (l, w, q_l, q_w, n, m)
        value, by_w, by_l = at(name, *pair)
        chance = 1 / (1 + math.exp(-beta * (r_w - r_l)))  # the label's, if the margin is right
        _, back_l, back_w = at(name, *swapped)
        one = {
            "pairs": True,
            "reference": not equal(value, at(name, w, l, q_w - 0.5, q_l, m, n)[0]),
            "per token": equal(value, at(name, 2 * w, l, 2 * q_w, q_l, 2 * m, n)[0]),
            "imitates": not equal(by_w, -by_l) and not equal(m * by_w, -n * by_l),
            "pulls back": at(name, w + 500, l - 500, q_w, q_l, m, n)[1] > 0,
            "clean on average": equal(
                (1 - eps) * value + eps * at(name, *swapped)[0], at("dpo", *pair)[0]
            ),
            "finds pi*": equal(chance * by_w, -(1 - chance) * back_w)
            and equal(chance * by_l, -(1 - chance) * back_l),
        }
        for trait, holds in one.items():
            found.setdefault(trait, set()).add(holds)
    assert all(len(seen) == 1 for seen in found.values()), (name, found)
    return {trait: seen.pop() for trait, seen in found.items()}


@functools.cache
def choice_truth():
    """Computed: for each situation the one candidate that has what it needs."""
    known = {name: traits(name) for name in CANDIDATES}
    known["kto"] = {"pairs": False, "reference": True}  # its arguments are single completions
    chosen = {}
    for situation, needs in NEEDS.items():
        (chosen[situation],) = [
            name
            for name, has in known.items()
            if all(has.get(trait, not wanted) == wanted for trait, wanted in needs.items())
        ]
    return chosen


CHOICE = Exercise(
    id="11.5",
    title="Which loss?",
    kind="design",
    truth=lambda: dict(choice_truth()),
    cases=lambda generator: [()],
    wrong=(
        Wrong("pairs made of thumbs", lambda: {"thumbs": "dpo"},
              "DPO compares two completions of the same prompt. Which loss takes a completion by itself?"),
        Wrong("labels that are unsure, not unpaired", lambda: {"thumbs": "robust"},
              "The trouble is not that labels are wrong, but that there is nothing to compare with."),
        Wrong("imitation of single completions", lambda: {"thumbs": "orpo"},
              "ORPO's second part needs a rejected completion of the same prompt."),
        Wrong("flips believed", lambda: {"coins": "dpo"},
              "Averaged over the flips DPO's loss is a mixture of both labels' losses. Which loss takes that mixture apart again?"),
        Wrong("a finite margin against flips", lambda: {"coins": "ipo"},
              "IPO keeps the margin finite, but the flips shrink it all the same (11.1). Which loss averages to the clean one?"),
        Wrong("a hinge against flips", lambda: {"coins": "hinge"},
              "A hinge stops pulling at a margin; flipped labels still pull the other way. Which loss averages to the clean one?"),
        Wrong("certain labels for DPO", lambda: {"sure": "dpo"},
              "With a certain pair DPO's loss falls without end: where is its minimum?"),
        Wrong("certain labels for a hinge", lambda: {"sure": "hinge"},
              "A hinge lets go at 1 / beta. But does it bring a margin back that has gone too far?"),
        Wrong("certain labels for robust DPO", lambda: {"sure": "robust"},
              "Nothing is flipped here, and this loss falls even below 0, without end."),
        Wrong("long texts without a reference", lambda: {"long": "simpo"},
              "It does count per token, but it throws away the reference, which is to be used."),
        Wrong("long texts for plain DPO", lambda: {"long": "dpo"},
              "DPO's margin is a sum over tokens (11.4): a longer text earns more with the same gain per token."),
        Wrong("long texts for IPO", lambda: {"long": "ipo"},
              "In the form of the table IPO's margin is a sum over tokens, too."),
        Wrong("a second model after all", lambda: {"one model": "dpo-norm"},
              "This loss needs log pi_ref, from a second model or from a file."),
        Wrong("DPO on one model", lambda: {"one model": "dpo"},
              "DPO needs log pi_ref, from a second model or from a file."),
        Wrong("CPO where nothing is to be imitated", lambda: {"one model": "cpo"},
              "CPO has no reference, but its second term imitates the chosen text."),
        Wrong("ORPO where nothing is to be imitated", lambda: {"one model": "orpo"},
              "ORPO has no reference, but its first term imitates the chosen text."),
        Wrong("CPO counted per token", lambda: {"base": "cpo"},
              "CPO's likelihood is per token, but its margin is not: what does a longer text do to it (11.4)?"),
        Wrong("SimPO for a model that has learned nothing yet", lambda: {"base": "simpo"},
              "SimPO only compares: no term makes the chosen text itself likely."),
        Wrong("DPO on a base model", lambda: {"base": "dpo"},
              "DPO needs a reference that writes such texts already, and only compares."),
        Wrong("IPO for RLHF's optimum", lambda: {"rlhf": "ipo"},
              "IPO's margin is (2P - 1) / (2 beta). Which margin has the optimum of J when labels follow Bradley-Terry?"),
        Wrong("robust DPO on clean labels", lambda: {"rlhf": "robust"},
              "Nothing is flipped here. Undoing flips that never happened overstates every preference."),
        Wrong("normalised DPO for RLHF's optimum", lambda: {"rlhf": "dpo-norm"},
              "The derivation of notebook 03 has log pi(y) of the whole text. Divided by lengths it is no longer that reward."),
        Wrong("KTO for RLHF's optimum", lambda: {"rlhf": "kto"},
              "You have comparisons, and they follow Bradley-Terry. Which loss is the likelihood of just these labels?"),
    ),
    difficulty=2,
    importance=5,
    minutes=7,
)  # fmt: skip

EXERCISES = (STOP, ORPO, KTO, LONGER, CHOICE)
