"""14 One training, every beta: another beta's odds, the mixture's rule, and what it leaves out."""

import math

import sympy
import torch
from torch import Tensor

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong

SYMBOLS = sympy.symbols("pi_a pi_b ref_a ref_b beta new_beta", positive=True)


def odds_truth(pi_a, pi_b, ref_a, ref_b, beta, new_beta):
    """By way of the rewards, each solved by sympy from the optimum of the old beta."""
    r, Z = sympy.Symbol("r", real=True), sympy.Symbol("Z", positive=True)
    rewards = [
        sympy.solve(sympy.Eq(pi, ref * sympy.exp(r / beta) / Z), r)[0]
        for pi, ref in ((pi_a, ref_a), (pi_b, ref_b))
    ]
    difference = sympy.expand(sympy.expand_log(rewards[0] - rewards[1], force=True))
    return sympy.log(ref_a / ref_b) + difference / new_beta


def log_odds(pi_a, pi_b, ref_a, ref_b, beta, new_beta):
    strength = beta / new_beta
    shift = sympy.log(pi_a / ref_a) - sympy.log(pi_b / ref_b)
    return sympy.log(ref_a / ref_b) + strength * shift


LOG = sympy.log
ODDS = Exercise(
    "14.1", "The odds at another beta", "derive", difficulty=2, importance=4, minutes=8,
    truth=odds_truth, cases=lambda generator: [SYMBOLS],
    right=(
        log_odds,
        lambda pa, pb, ra, rb, b, n: (1 - b / n) * LOG(ra / rb) + b / n * LOG(pa / pb),
    ),
    wrong=(
        Wrong("the strength upside down", "beta / new_beta -> new_beta / beta", "A larger new beta must stay closer to the reference: let new_beta grow, and see where your odds go."),
        Wrong("the reference is left out", "sympy.log(ref_a / ref_b) + -> ", "At an endless new beta the reference is left, not even odds: where does it stand in pi*?"),
        Wrong("the policy's odds are scaled", "pi_a / ref_a -> pi_a | pi_b / ref_b -> pi_b", "What beta scales is the log-ratio to the reference, not the log-probability."),
        Wrong("the reference counts twice", "sympy.log(ref_a / ref_b) + -> sympy.log(pi_a / pi_b) +", "Start from the reference's odds and add the shift; the policy's odds hold the shift already."),
        Wrong("odds, not their logarithm", lambda pa, pb, ra, rb, b, n: ra / rb * (pa * rb / (pb * ra)) ** (b / n), "The task asks for the logarithm of the odds."),
        Wrong("the old odds", lambda pa, pb, ra, rb, b, n: LOG(pa / pb), "These are the odds at the old beta: nothing depends on the new one."),
    ),
)  # fmt: skip


def rule_cases(generator):
    def logits(rows, vocabulary, scale=2.0):
        drawn = scale * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
        return drawn[0].requires_grad_(), drawn[1].requires_grad_()

    return [
        (*logits(1, 3), 0.5),
        (*logits(4, 6), 0.25),
        Edge("the strength is above 1", (*logits(3, 5), 2.5)),
        Edge("the strength is below 0", (*logits(3, 5), -0.75)),
        Edge("probabilities underflow", (*logits(2, 4, 800.0), 0.5)),
    ]


def rule_truth(policy: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Row by row, the largest exponent taken out by hand."""
    rows = []
    for p, q in zip(policy, reference):
        scores = [b + strength * (a - b) for a, b in zip(p, q)]
        top = max(score.item() for score in scores)
        total = sum((score - top).exp() for score in scores)
        rows.append(torch.stack([score - top - total.log() for score in scores]))
    return torch.stack(rows)


def mixture_logps(policy, reference, strength):
    mixed = reference + strength * (policy - reference)
    return mixed.log_softmax(-1)


RULE = Exercise(
    "14.2", "The mixture's next token", "implement", difficulty=2, importance=5, minutes=8,
    truth=rule_truth, cases=rule_cases, tolerance=1e-9,
    right=(
        mixture_logps,
        lambda p, q, s: ((1 - s) * q.log_softmax(-1) + s * p.log_softmax(-1)).log_softmax(-1),
        lambda p, q, s: q + s * (p - q) - (q + s * (p - q)).logsumexp(-1, keepdim=True),
    ),
    wrong=(
        Wrong("an average of probabilities", lambda p, q, s: ((1 - s) * q.softmax(-1) + s * p.softmax(-1)).log(), "An average of probabilities keeps what either model likes. The rule multiplies: it averages log-probabilities."),
        Wrong("not normalised", lambda p, q, s: q.log_softmax(-1) + s * (p.log_softmax(-1) - q.log_softmax(-1)), "A weighted sum of two log-probabilities is no log-probability: do the exponentials of a row sum to 1?"),
        Wrong("raw scores", "mixed.log_softmax(-1) -> mixed", "These are scores. What turns a row of scores into log-probabilities?"),
        Wrong("the two models exchanged", "reference + strength * (policy - reference) -> policy + strength * (reference - policy)", "At strength 0 the reference must be left, at strength 1 the policy."),
        Wrong("the shift added to the policy", "reference + strength -> policy + strength", "Start from the reference: with strength 1 yours has already passed the policy."),
        Wrong("the policy added to the reference", "(policy - reference) -> policy", "What the strength scales is the difference of the two models."),
        Wrong("the softmax runs over rows", "log_softmax(-1) -> log_softmax(0)", "The tokens of one row compete with each other, not the same token of different rows."),
        Wrong("probabilities, not logarithms", "log_softmax(-1) -> softmax(-1)", "The task asks for log-probabilities."),
        Wrong("log(softmax) underflows", "mixed.log_softmax(-1) -> mixed.softmax(-1).log()", "A probability of e^-800 is 0 in float64, and its logarithm infinite. torch has one function for both steps."),
        Wrong("the strength held between 0 and 1", "strength = min(max(strength, 0.0), 1.0)", "Nothing in the rule stops at 0 or at 1: above 1 it goes on in the same direction, below 0 in the other."),
        Wrong("the strength divides", "strength * (policy -> 1 / strength * (policy", "Strength is old beta over new beta: more strength moves further from the reference."),
    ),
)  # fmt: skip


def off_cases(generator):
    def case(first, second, beta, strength, spread=1.0):
        draw = spread * torch.randn(2, first, second, generator=generator, dtype=torch.float64)
        reference = draw[0].flatten().log_softmax(0).view(first, second)
        return reference, draw[1], beta, strength

    return [
        case(2, 2, 1.0, 0.5),
        case(3, 4, 0.5, 0.25),
        Edge("the strength is above 1", case(3, 3, 0.7, 2.0)),
        Edge("the strength is below 0", case(2, 3, 0.7, -1.0)),
        Edge("rewards are large", case(3, 3, 0.05, 0.5, 4.0)),
    ]


def off_truth(reference: Tensor, rewards: Tensor, beta: float, strength: float) -> Tensor:
    """With the library's exact world: all texts of two tokens, the mixture after every prefix."""
    first, second = reference.shape
    size = max(first, second)
    texts = [(a, b) for a in range(size) for b in range(size)]
    inside = torch.tensor([a < first and b < second for a, b in texts])
    far = torch.full((len(texts),), -1e9, dtype=torch.float64)  # texts that this world lacks
    logps, values = far.clone(), torch.zeros(len(texts), dtype=torch.float64)
    logps[inside], values[inside] = reference.flatten(), rewards.flatten()
    optimum = exact.optimal_policy(reference.flatten(), rewards.flatten(), beta)
    policy = far.clone()
    policy[inside] = optimum
    rows = [exact.next_token_logps(x, texts) for x in (policy, logps)]
    mixed = rows[1] + strength * (rows[0] - rows[1])
    mixed = mixed.masked_fill(rows[1] < -1e6, -1e9)
    return exact.table_logps(mixed, texts)[inside].view(first, second)


def token_mixture(reference, rewards, beta, strength):
    policy = (reference + rewards / beta).flatten().log_softmax(0).view_as(reference)
    first_p, first_q = policy.logsumexp(1), reference.logsumexp(1)
    second_p, second_q = policy - first_p[:, None], reference - first_q[:, None]
    first = ((1 - strength) * first_q + strength * first_p).log_softmax(0)
    second = ((1 - strength) * second_q + strength * second_p).log_softmax(1)
    return first[:, None] + second


OFF = Exercise(
    "14.3", "Token by token, in a world of two tokens", "implement", difficulty=4, importance=3,
    minutes=15, truth=off_truth, cases=off_cases, tolerance=1e-8,
    right=(
        token_mixture,
        lambda r, v, b, s: (lambda p: ((1 - s) * r.logsumexp(1) + s * p.logsumexp(1)).log_softmax(0)[:, None] + ((1 - s) * r.log_softmax(1) + s * p.log_softmax(1)).log_softmax(1))(r + v / b),
    ),
    wrong=(
        Wrong("the whole-text rule", lambda r, v, b, s: (r + s * v / b).flatten().log_softmax(0).view_as(r), "That is the optimum of beta / strength itself: it weighs whole texts. A sampler does not know the second token when it draws the first."),
        Wrong("the first token is not mixed", "first = ((1 - strength) * first_q + strength * first_p).log_softmax(0) -> first = first_p", "The rule is applied after every beginning, the empty one included."),
        Wrong("the second token is not mixed", "second = ((1 - strength) * second_q + strength * second_p).log_softmax(1) -> second = second_p", "The rule is applied after every beginning, after the first token as well."),
        Wrong("the second tokens are not normalised", "strength * second_p).log_softmax(1) -> strength * second_p)", "After each first token the chances of the second sum to 1: a log-softmax for each row."),
        Wrong("the first token is not normalised", "strength * first_p).log_softmax(0) -> strength * first_p)", "The chances of the first token sum to 1 as well."),
        Wrong("the second tokens share one sum", "strength * second_p).log_softmax(1) -> strength * second_p).flatten().log_softmax(0).view_as(policy)", "Each first token has its own distribution of second tokens: one softmax a row."),
        Wrong("rows and columns exchanged", "log_softmax(1) -> log_softmax(0)", "A row belongs to a first token: its second tokens stand beside each other in the row."),
        Wrong("beta without the reward's division", "rewards / beta -> rewards * beta", "pi* has r / beta in its exponent."),
        Wrong("the optimum of beta itself", lambda r, v, b, s: (r + v / b).flatten().log_softmax(0).view_as(r), "This is the policy at strength 1: the strength changes nothing in yours."),
        Wrong("an average of probabilities", "(1 - strength) * first_q + strength * first_p).log_softmax(0) -> (1 - strength) * first_q.exp() + strength * first_p.exp()).log()", "The rule averages log-probabilities and normalises."),
    ),
)  # fmt: skip


def facts_truth():
    """Computed in exact worlds: one where the rewards of a text add up, and one where they do not."""
    texts = [(a, b) for a in (0, 1) for b in (0, 1)]
    reference = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log()
    product = torch.tensor([0.24, 0.36, 0.16, 0.24], dtype=torch.float64).log()
    additive = torch.tensor([1.0, 0.2, 0.5, -0.3], dtype=torch.float64)
    other = torch.tensor([2.0, -1.0, 0.2, 0.3], dtype=torch.float64)
    beta = 0.5

    def mixture(ref, rewards, strength):
        return exact.token_mixture(exact.optimal_policy(ref, rewards, beta), ref, texts, strength)

    def off(ref, rewards, strength):
        target = exact.optimal_policy(ref, rewards, beta / strength)
        return exact.total_variation(mixture(ref, rewards, strength), target).item()

    reward, start = (
        exact.expectation(policy, other).item()
        for policy in (mixture(reference, other, -0.5), reference)
    )
    half, whole = (  # of a policy not far from its reference
        exact.kl(mixture(reference, other / 10, s), reference).item() for s in (0.5, 1.0)
    )
    new_beta = beta / 0.5
    assert math.isclose(new_beta, 2 * beta)
    return {
        "beta": "larger" if new_beta > beta else "smaller",
        "kl": "less" if half < whole / 2 - 1e-9 else "half" if half < whole / 2 + 1e-9 else "more",
        "reward": "lower" if reward < start else "higher",
        "additive": "exact" if off(product, additive, 2.0) < 1e-12 else "near",
        "one": "exact" if off(reference, other, 1.0) < 1e-12 else "near",
        "two": "exact" if off(reference, other, 2.0) < 1e-12 else "near",
    }


FACTS = Exercise(
    "14.4", "What a strength does", "predict", difficulty=2, importance=4, minutes=5,
    truth=facts_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a smaller beta for half the strength", {"beta": "smaller"}, "Strength is old beta over new beta. A larger beta stays closer to the reference, and so does half the strength."),
        Wrong("the KL grows like a line", {"kl": "half"}, "Near the reference a KL grows with the square of the step, not with the step."),
        Wrong("half the strength costs more than half", {"kl": "more"}, "Near the reference a KL grows with the square of the step: the first half of the way is the cheap one."),
        Wrong("below 0 the reward rises", {"reward": "higher"}, "A strength below 0 makes likelier what training made less likely."),
        Wrong("never exact", {"additive": "near"}, "If nothing about the future depends on the token, the values of all futures differ by the same number at every beta: what does the softmax do with it?"),
        Wrong("strength 1 is off", {"one": "near"}, "At strength 1 the reference drops out of the rule."),
        Wrong("always exact", {"two": "exact"}, "The rule scales the value of each beginning. The optimum of another beta averages over the futures with other weights."),
    ),
)  # fmt: skip

EXERCISES = (ODDS, RULE, OFF, FACTS)
