"""11 The family: where IPO stops, ORPO's odds, KTO without pairs, lengths, and which loss when."""

import functools
import inspect
import math

import sympy
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.family import LOSSES, LabelledLogps, kto_loss, orpo_loss
from dpo_mini.losses import PairLogps


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


def stopping_margin(P, eps, beta):
    q = (1 - eps) * P + eps * (1 - P)
    return (2 * q - 1) / (2 * beta)


STOP = Exercise(
    "11.1", "Where IPO stops", "derive", difficulty=2, importance=4, minutes=8,
    truth=stop_truth, cases=stop_cases,
    right=(
        stopping_margin,
        lambda P, e, b: (1 - 2 * e) * (2 * P - 1) / (2 * b),
        lambda P, e, b: mixed(P, e) / (2 * b) - mixed(1 - P, e) / (2 * b),
        lambda P, e, b: (P - sympy.Rational(1, 2)) / b - e * (2 * P - 1) / b,
    ),
    wrong=(
        Wrong("where DPO stops", lambda P, e, b: logit(mixed(P, e)) / b, "That is notebook 05's answer, for the log-sigmoid. Here the loss is a square: differentiate that."),
        Wrong("every label is taken for right and certain", "(2 * q - 1) / (2 * beta) -> 1 / (2 * beta)", "That is the target of one label. The labels disagree, and each pulls towards its own side: average their losses."),
        Wrong("the flips are left out", "eps = 0 * eps", "P is the chance that y_w wins. With what chance does the label that reaches you say so?"),
        Wrong("P is taken for 1", "P = 1", "Without any flip the labels still disagree: y_l wins with chance 1 - P."),
        Wrong("reversed labels are left out", lambda P, e, b: mixed(P, e) / (2 * b), "A reversed label does not ask for nothing: it has the margin -Delta, and wants that at 1 / (2 beta)."),
        Wrong("a flip that makes a label right is forgotten", "(1 - eps) * P + eps * (1 - P) -> (1 - eps) * P", "A label names y_w in two ways: y_w won and nothing was flipped, or y_l won and the label was flipped."),
        Wrong("flips that strengthen", "eps = -eps", "Put eps = 1/2 in: the labels are coins then, and no side may be preferred."),
        Wrong("flips undone, not suffered", lambda P, e, b: (2 * P - 1) / (2 * b * (1 - 2 * e)), "That is what a loss would need that undoes the flips. IPO takes the labels as they come."),
        Wrong("multiplied by beta", "(2 * q - 1) / (2 * beta) -> (2 * q - 1) * (2 * beta)", "The target is 1 / (2 beta), so a large beta keeps the margin small."),
    ),
)  # fmt: skip




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
    extreme = (summed(tiny, w), summed(sure, l), w, l, 0.7), (summed(sure, w), summed(tiny, l), w, l, 0.3)
    return cases + [Edge("probabilities are nearly 0 or 1", case) for case in extreme]


def orpo_truth(chosen, rejected, chosen_tokens, rejected_tokens, beta):
    """log(1 - e^m) as Mächler does it: another function on either side of -log 2."""
    m, n = chosen / chosen_tokens, rejected / rejected_tokens

    def log_rest(m):
        near = m > -math.log(2)
        by_expm1 = (-torch.expm1(torch.where(near, m, -1.0))).log()
        return torch.where(near, by_expm1, torch.log1p(-torch.where(near, -1.0, m).exp()))

    return -m + beta * softplus(n - log_rest(n) - m + log_rest(m), threshold=500)


def orpo_loss_by_hand(chosen, rejected, chosen_tokens, rejected_tokens, beta):
    def log_odds(m):
        return m - torch.log(-torch.expm1(m))

    log_p_w, log_p_l = chosen / chosen_tokens, rejected / rejected_tokens
    ratio = log_odds(log_p_w) - log_odds(log_p_l)
    return -log_p_w - beta * torch.nn.functional.logsigmoid(ratio)


ORPO = Exercise(
    "11.2", "ORPO's odds", "implement", difficulty=3, importance=3, minutes=10,
    truth=orpo_truth, cases=orpo_cases,
    right=(orpo_loss_by_hand, lambda w, l, m, n, b: orpo_loss(PairLogps(w, l, w, l, m, n), b),),
    wrong=(
        Wrong("1 - p loses its digits", "-torch.expm1(m) -> 1 - m.exp()", "Where p is nearly 1 the subtraction 1 - p leaves only rounding. torch has a function that computes e^x - 1 without this loss."),
        Wrong("p rounds to 0 or 1", "m - torch.log(-torch.expm1(m)) -> torch.log(m.exp() / (1 - m.exp()))", "At a mean of -1000 p rounds to 0, near 0 it rounds to 1. Stay in logarithms: the logarithm of a quotient is a difference, and log p is what you were given."),
        Wrong("odds from an exponential that overflows", "m - torch.log(-torch.expm1(m)) -> -torch.log(torch.expm1(-m))", "Right in mathematics: the odds are 1 / (e^-m - 1). But at m = -1000 that exponential is infinite; which one tends to 0 instead?"),
        Wrong("a small number added to 1 - p", "-torch.expm1(m) -> 1 - m.exp() + 1e-8", "This is finite and wrong: for a text that the model is sure of, 1 - p is smaller than the number that you add."),
        Wrong("p is cut off below 1", "return m - -> m = m.clamp(max=-1e-6); return m -", "A clamp has no gradient where it acts, and it acts on the texts that the model is surest of."),
        Wrong("p of the whole completion", "log_odds(log_p_w) - log_odds(log_p_l) -> log_odds(chosen) - log_odds(rejected)", "Over a whole text p is so small that 1 - p is 1 and the odds are p itself. ORPO's p is that of an average token."),
        Wrong("sums over tokens everywhere", "chosen_tokens, rejected_tokens = 1, 1", "The lengths are given for a purpose: both parts of ORPO take the mean over a completion's tokens."),
        Wrong("the likelihood is a sum over tokens", "return -log_p_w -> return -chosen", "The odds are right. The other part, too, is a mean over the tokens of the chosen completion."),
        Wrong("one length for both", "rejected_tokens = chosen_tokens", "The two completions of a pair have lengths of their own."),
        Wrong("no odds", "m - torch.log(-torch.expm1(m)) -> m", "That compares p with p. The odds also divide by 1 - p."),
        Wrong("odds that multiply by 1 - p", "m - torch.log -> m + torch.log", "Odds are p against 1 - p: three to one for p = 0.75. Which sign has log(1 - p) then?"),
        Wrong("the odds, not their logarithm", "m - torch.log(-torch.expm1(m)) -> 1 / torch.expm1(-m.clamp(min=-500))", "The sigmoid is taken of the logarithm of the odds ratio: equal odds must give sigma(0) = 1/2."),
        Wrong("the logarithm of a sigmoid that rounds to 0", "torch.nn.functional.logsigmoid(ratio) -> torch.sigmoid(ratio).log()", "Where the rejected text's odds are far above, the sigmoid rounds to 0 and its logarithm is infinite. torch has both in one function."),
        Wrong("the ratio is upside down", "logsigmoid(ratio) -> logsigmoid(-ratio)", "This raises the odds of the rejected completion. When must the second part be small?"),
        Wrong("the first part has the wrong sign", "return -log_p_w -> return log_p_w", "Both parts are minus a logarithm of a probability: neither can be below 0."),
        Wrong("the first part is missing", "return -log_p_w - -> return -", "ORPO replaces fine-tuning as well: what makes the chosen text itself likely?"),
        Wrong("the first part is the rejected completion's", "return -log_p_w -> return -log_p_l", "Which of the two texts is the model to imitate?"),
        Wrong("both completions are imitated", "return -log_p_w -> return -log_p_w - log_p_l", "The rejected completion enters only through its odds."),
        Wrong("beta inside the sigmoid", "beta * torch.nn.functional.logsigmoid(ratio) -> torch.nn.functional.logsigmoid(beta * ratio)", "Here beta is not the price of a nat: it weighs the second part against the first."),
        Wrong("beta before the first part", "-log_p_w - beta * -> -beta * log_p_w - ", "The likelihood counts once. Which part does beta weigh?"),
        Wrong("beta before both parts", "-log_p_w - beta * torch.nn.functional.logsigmoid(ratio) -> beta * (-log_p_w - torch.nn.functional.logsigmoid(ratio))", "Beta would then be a learning rate. It weighs one part against the other."),
        Wrong("no logarithm of the sigmoid", "torch.nn.functional.logsigmoid -> torch.sigmoid", "The second part is minus beta times a log-sigmoid, like DPO's loss."),
        Wrong("the odds ratio without a sigmoid", "torch.nn.functional.logsigmoid(ratio) -> ratio", "Without the log-sigmoid nothing says when a pair is settled."),
        Wrong("the odds carry no gradient", "log_odds(log_p_w) - log_odds(log_p_l) -> (log_odds(log_p_w) - log_odds(log_p_l)).detach()", "The value is right. Which part of the loss still moves the policy, and which one no longer does?"),
    ),
)  # fmt: skip


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
        Edge("the mean of the other log-ratios is below 0", case(labels(*good, *bad, *bad), -0.9, 0.4, 1.2, 0.5)),
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


def kto_by_signs(p, q, d, e, b, w_good, w_bad):
    sign = 2 * d.double() - 1
    weight = w_bad + (w_good - w_bad) * d.double()
    with torch.no_grad():
        z = torch.relu(e.sum() / e.numel())
    return weight * (1 - torch.sigmoid(b * sign * (p - q - z)))


def kto_loss_by_hand(
    policy, reference, desirable, elsewhere, beta, desirable_weight, undesirable_weight
):
    z = elsewhere.detach().mean().clamp(min=0)
    gain = beta * (policy - reference - z)
    good = desirable_weight * torch.sigmoid(-gain)
    bad = undesirable_weight * torch.sigmoid(gain)
    return torch.where(desirable, good, bad)


KTO = Exercise(
    "11.3", "KTO: a loss without pairs", "implement", difficulty=3, importance=4, minutes=9,
    truth=kto_truth, cases=kto_cases,
    right=(
        kto_loss_by_hand,
        lambda p, q, d, e, b, g, u: kto_loss(LabelledLogps(p, q, d, e), b, g, u),
        kto_by_signs,
    ),
    wrong=(
        Wrong("z keeps its gradient", "elsewhere.detach() -> elsewhere", "The values are right, but the policy could now lower its loss by moving z. z is a point to measure from, not something to train."),
        Wrong("z is not clamped", ".clamp(min=0) -> ", "z stands for a KL, which is never below 0; its estimate from a few completions can be."),
        Wrong("clamped before the mean", ".mean().clamp(min=0) -> .clamp(min=0).mean()", "Single log-ratios may be below 0; only their mean stands for a KL. If you drop the negative ones first, z is too large."),
        Wrong("the mean's absolute value for the clamp", ".clamp(min=0) -> .abs()", "An estimate of -0.9 does not say that the KL is 0.9. The nearest value that a KL can have is 0."),
        Wrong("z is a sum", ".mean() -> .sum()", "A KL is an expectation: its estimate must not grow with the batch."),
        Wrong("a z for each item", ".mean() -> ", "One completion's log-ratio is no KL. All items of the batch share one z."),
        Wrong("a z for each item, not clamped", ".mean().clamp(min=0) -> ", "One completion's log-ratio is no KL. All items of the batch share one z."),
        Wrong("z from the items' own log-ratios", "elsewhere.detach() -> (policy - reference).detach()", "The loss moves the items' own log-ratios. z is measured on the completions of other prompts."),
        Wrong("z from the desirable items' places only", "elsewhere.detach() -> elsewhere[desirable].detach()", "All of `elsewhere` counts for z, whatever the label of the item beside it."),
        Wrong("no z", "reference - z) -> reference)", "Without z gains and losses are felt from the reference. KTO feels them from where the policy is on average."),
        Wrong("z is added", "reference - z -> reference + z", "A desirable completion is a gain only as far as its log-ratio exceeds z."),
        Wrong("z on the same side for both labels", "bad = undesirable_weight * torch.sigmoid(gain) -> bad = undesirable_weight * torch.sigmoid(beta * (policy - reference + z))", "For an undesirable completion the whole difference u - z is turned round, z as well."),
        Wrong("z without beta", "beta * (policy - reference - z) -> beta * (policy - reference) - z", "u and z are both in nats: beta multiplies their difference."),
        Wrong("beta outside the sigmoid", "gain = beta * -> gain = 1 * | torch.where(desirable, good, bad) -> beta * torch.where(desirable, good, bad)", "Beta scales what the sigmoid sees, not the loss."),
        Wrong("the weights are missing", "desirable_weight, undesirable_weight = 1, 1", "Desirable and undesirable completions have weights, for batches that hold more of one kind."),
        Wrong("one weight for both labels", "undesirable_weight = desirable_weight", "Each label has its own weight."),
        Wrong("the weights inside the sigmoid", "good = desirable_weight * torch.sigmoid(-gain) -> good = torch.sigmoid(-gain * desirable_weight) | bad = undesirable_weight * torch.sigmoid(gain) -> bad = torch.sigmoid(gain * undesirable_weight)",
              "A weight says how much an item's loss counts; beta alone stands inside."),
        Wrong("every completion is taken for desirable", "torch.sigmoid(gain) -> torch.sigmoid(-gain)", "Undesirable completions must be pushed down: theirs is the sigmoid of z - u."),
        Wrong("undesirable completions are left out", "bad = undesirable_weight * -> bad = 0 *", "Half of what KTO learns is from the completions that were called bad."),
        Wrong("minus the value", "result = result - torch.where(desirable, desirable_weight, undesirable_weight)", "The gradient is right, the level is not: the loss is weight times (1 - sigmoid), never below 0."),
        Wrong("a log-sigmoid", "torch.sigmoid(-gain) -> -torch.nn.functional.logsigmoid(gain) | torch.sigmoid(gain) -> -torch.nn.functional.logsigmoid(-gain)", "KTO has no logarithm: a completion that is hopelessly lost pulls as little as one that is settled."),
        Wrong("the sigmoid by an exponential that overflows", "torch.sigmoid(-gain) -> (1 - 1 / (1 + (-gain).exp())) | torch.sigmoid(gain) -> (1 - 1 / (1 + gain.exp()))", "The values are finite, the gradients not: the exponential of ten thousand is infinite. torch has a sigmoid that is safe."),
    ),
)  # fmt: skip


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
    "11.4", "Twice as long", "predict", difficulty=2, importance=4, minutes=6,
    truth=longer_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("DPO's margin counted per token", {"dpo": "same"}, "DPO adds up a completion's tokens and divides by nothing. What becomes of the chosen log-ratio, which was 3?"),
        Wrong("a longer text taken for a less likely one, in DPO", {"dpo": "larger"}, "The longer text is less likely under the policy, but even less so under the reference. Compute its log-ratio."),
        Wrong("a larger margin is always better", {"ipo": "smaller"}, "With beta = 0.1, which margin does IPO want? The pair had 4; how many has it now?"),
        Wrong("IPO's margin counted per token", {"ipo": "same"}, "In the form of the table IPO's margin is a difference of sums, and the chosen one's sum has doubled."),
        Wrong("KTO's log-ratio counted per token", {"kto": "same"}, "KTO compares a whole completion's log-ratio with z. z stays; does the log-ratio?"),
        Wrong("a longer text taken for a loss, in KTO", {"kto": "larger"}, "The completion is desirable and its log-ratio is above z. Does the distance to z grow or shrink?"),
        Wrong("length-normalised DPO sees the length", {"dpo-norm": "smaller"}, "The chosen log-ratio is doubled, then divided by twice as many tokens."),
        Wrong("length-normalised DPO punishes the length", {"dpo-norm": "larger"}, "The chosen log-ratio is doubled, then divided by twice as many tokens."),
        Wrong("SimPO punishes the length", {"simpo": "larger"}, "It has no reference, but what does it divide by?"),
        Wrong("SimPO rewards the length", {"simpo": "smaller"}, "SimPO sees the log-probability of an average token. Has that changed?"),
        Wrong("ORPO punishes the length", {"orpo": "larger"}, "Both parts of ORPO are about an average token: -20 in 10 tokens, then -40 in 20."),
        Wrong("ORPO rewards the length", {"orpo": "smaller"}, "Both parts of ORPO are about an average token: -20 in 10 tokens, then -40 in 20."),
        Wrong("CPO taken for normalised", {"cpo": "same"}, "Only CPO's likelihood is divided by a length. Its margin compares whole texts: -20 with -30 first, and then?"),
        Wrong("CPO taken for DPO", {"cpo": "smaller"}, "Where DPO has a log-ratio CPO has a bare log-probability, and that of a longer text is lower."),
        Wrong("Preferred-FT taken for a mean over tokens", {"preferred-ft": "same"}, "As the table has it the loss is minus the log-probability of the whole text."),
        Wrong("Preferred-FT rewards the length", {"preferred-ft": "smaller"}, "The loss is minus the log-probability: 20 at first, and then?"),
        Wrong("DPO rewards length from the start", {"dpo, at the start": "smaller"}, "Where policy and reference agree, all log-ratios are 0. What is twice 0?"),
        Wrong("DPO punishes length from the start", {"dpo, at the start": "larger"}, "Where policy and reference agree, all log-ratios are 0. What is twice 0?"),
        Wrong("CPO is blind to length at the start", {"cpo, at the start": "same"}, "CPO does not look at the reference, so it cannot notice that the two agree."),
        Wrong("CPO rewards length at the start", {"cpo, at the start": "smaller"}, "CPO does not look at the reference: this is the same comparison of -20 with -30, then of -40 with -30."),
    ),
)  # fmt: skip


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
        q_w, q_l, u_w, u_l = (torch.rand(4, generator=generator, dtype=torch.float64)).tolist()
        q_w, q_l = -20 - 5 * q_w, -24 - 5 * q_l
        w, l, m, n = q_w + u_w, q_l + u_l, 9.0, 13.0  # margin below 1: no hinge is at rest
        pair, swapped = (w, l, q_w, q_l, m, n), (l, w, q_l, q_w, n, m)
        value, by_w, by_l = at(name, *pair)
        chance = 1 / (1 + math.exp(-beta * (u_w - u_l)))  # the label's, if the margin is right
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
    "11.5", "Which loss?", "design", difficulty=2, importance=5, minutes=7,
    truth=lambda: dict(choice_truth()), cases=lambda generator: [()],
    wrong=(
        Wrong("pairs made of thumbs", {"thumbs": "dpo"}, "DPO compares two completions of the same prompt. Which loss takes a completion by itself?"),
        Wrong("labels that are unsure, not unpaired", {"thumbs": "robust"}, "The trouble is not that labels are wrong, but that there is nothing to compare with."),
        Wrong("imitation of single completions", {"thumbs": "orpo"}, "ORPO's second part needs a rejected completion of the same prompt."),
        Wrong("flips believed", {"coins": "dpo"}, "Averaged over the flips DPO's loss is a mixture of both labels' losses. Which loss takes that mixture apart again?"),
        Wrong("a finite margin against flips", {"coins": "ipo"}, "IPO keeps the margin finite, but the flips shrink it all the same (11.1). Which loss averages to the clean one?"),
        Wrong("a hinge against flips", {"coins": "hinge"}, "A hinge stops pulling at a margin; flipped labels still pull the other way. Which loss averages to the clean one?"),
        Wrong("certain labels for DPO", {"sure": "dpo"}, "With a certain pair DPO's loss falls without end: where is its minimum?"),
        Wrong("certain labels for a hinge", {"sure": "hinge"}, "A hinge lets go at 1 / beta. But does it bring a margin back that has gone too far?"),
        Wrong("certain labels for robust DPO", {"sure": "robust"}, "Nothing is flipped here, and this loss falls even below 0, without end."),
        Wrong("long texts without a reference", {"long": "simpo"}, "It does count per token, but it throws away the reference, which is to be used."),
        Wrong("long texts for plain DPO", {"long": "dpo"}, "DPO's margin is a sum over tokens (11.4): a longer text earns more with the same gain per token."),
        Wrong("long texts for IPO", {"long": "ipo"}, "In the form of the table IPO's margin is a sum over tokens, too."),
        Wrong("a second model after all", {"one model": "dpo-norm"}, "This loss needs log pi_ref, from a second model or from a file."),
        Wrong("DPO on one model", {"one model": "dpo"}, "DPO needs log pi_ref, from a second model or from a file."),
        Wrong("CPO where nothing is to be imitated", {"one model": "cpo"}, "CPO has no reference, but its second term imitates the chosen text."),
        Wrong("ORPO where nothing is to be imitated", {"one model": "orpo"}, "ORPO has no reference, but its first term imitates the chosen text."),
        Wrong("CPO counted per token", {"base": "cpo"}, "CPO's likelihood is per token, but its margin is not: what does a longer text do to it (11.4)?"),
        Wrong("SimPO for a model that has learned nothing yet", {"base": "simpo"}, "SimPO only compares: no term makes the chosen text itself likely."),
        Wrong("DPO on a base model", {"base": "dpo"}, "DPO needs a reference that writes such texts already, and only compares."),
        Wrong("IPO for RLHF's optimum", {"rlhf": "ipo"}, "IPO's margin is (2P - 1) / (2 beta). Which margin has the optimum of J when labels follow Bradley-Terry?"),
        Wrong("robust DPO on clean labels", {"rlhf": "robust"}, "Nothing is flipped here. Undoing flips that never happened overstates every preference."),
        Wrong("normalised DPO for RLHF's optimum", {"rlhf": "dpo-norm"}, "The derivation of notebook 03 has log pi(y) of the whole text. Divided by lengths it is no longer that reward."),
        Wrong("KTO for RLHF's optimum", {"rlhf": "kto"}, "You have comparisons, and they follow Bradley-Terry. Which loss is the likelihood of just these labels?"),
    ),
)  # fmt: skip

EXERCISES = (STOP, ORPO, KTO, LONGER, CHOICE)
