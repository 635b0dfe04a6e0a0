"""17 Verifiable rewards: pass@k, what a spread weighs, three ways to average, and what changes."""

import itertools
import math
from fractions import Fraction

import torch

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.grpo import group_advantages, grpo_loss


def pass_cases(generator):
    def case(prompts, n, k):
        return torch.randint(0, 2, (prompts, n), generator=generator), k

    few = (torch.rand(6, 8, generator=generator) < 0.15).long()
    return [
        (torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]]), 2),
        Edge("fewer than k samples fail", case(3, 5, 4)),
        Edge("a prompt without any pass", (few * torch.tensor([0, 1, 1, 1, 1, 1])[:, None], 3)),
        (few, 1),
        case(4, 9, 5),
    ]


def pass_truth(passed, k):
    """Every choice of k samples is looked at."""
    shares = []
    for row in passed.tolist():
        chosen = list(itertools.combinations(row, k))
        shares.append(Fraction(sum(any(c) for c in chosen), len(chosen)))
    return float(sum(shares) / len(shares))


def pass_at_k(passed, k):
    n = passed.shape[1]
    counts = passed.sum(1).tolist()
    missed = [math.comb(n - c, k) / math.comb(n, k) for c in counts]
    return 1 - sum(missed) / len(missed)


def pass_by_product(passed, k):
    """The chance of k fails in a row, drawn without putting back."""
    n, found = passed.shape[1], []
    for c in passed.sum(1).tolist():
        fails = [max(0, n - c - i) / (n - i) for i in range(k)]
        found.append(1 - math.prod(fails))
    return torch.tensor(found, dtype=torch.float64).mean()


PASS = Exercise(
    "17.1", "pass@k without a bias", "implement", difficulty=2, importance=4, minutes=8,
    truth=pass_truth, cases=pass_cases,
    right=(pass_at_k, pass_by_product,),
    wrong=(
        Wrong("drawn with putting back", "math.comb(n - c, k) / math.comb(n, k) -> (1 - c / n) ** k", "c / n is only an estimate of the chance of a pass, and a power of an estimate is biased. Which choices of k different samples hold no pass?"),
        Wrong("all n samples are tries", "math.comb(n - c, k) / math.comb(n, k) -> float(c == 0)", "That is pass@n. Only k of the n samples may be looked at."),
        Wrong("the first k alone", "counts = passed.sum(1) -> n, counts = k, passed[:, :k].sum(1)", "Unbiased, but it throws the other samples away: take the mean over every choice of k."),
        Wrong("pass@1", "result = passed.double().mean().item()", "That is how often one sample passes. How often does at least one of k?"),
        Wrong("k times pass@1", "result = k * passed.double().mean().item()", "Chances of events that can happen together do not add up."),
        Wrong("all k must pass", "math.comb(n - c, k) / math.comb(n, k) -> 1 - math.comb(c, k) / math.comb(n, k)", "One pass among the k is enough."),
        Wrong("the prompts are thrown together", "n = passed.shape[1] -> n = passed.numel() | passed.sum(1).tolist() -> [passed.sum().item()]", "A prompt's tries are its own. Work out each prompt, then take the mean."),
        Wrong("the share that is missed", "result = 1 - result", "You return the chance that all k fail."),
    ),
)  # fmt: skip


def weight_cases(generator):
    rates = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return [
        (0.5, 2), (0.1, 4), (0.05 + 0.3 * rates[0], 3), (0.6 + 0.35 * rates[1], 5),
        Edge("a rare pass", (0.01 + 0.02 * rates[2], 8)),
    ]  # fmt: skip


def weight_truth(p, n):
    """Every outcome of n samples. A sample's score, differentiated by p, is 1 / p or -1 / (1 - p)."""
    total = []
    for outcome in itertools.product((0, 1), repeat=n):
        k = sum(outcome)
        if k in (0, n):
            continue
        mean = k / n
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in outcome) / (n - 1))
        step = math.fsum((r - mean) / spread * (1 / p if r else -1 / (1 - p)) for r in outcome) / n
        total.append(p**k * (1 - p) ** (n - k) * step)
    return math.fsum(total)


def weight(p, n):
    total = 0.0
    for k in range(1, n):
        chance = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        spread = math.sqrt(k * (n - k) / (n * (n - 1)))
        total += chance * spread
    return (n - 1) / n * total / (p * (1 - p))


def weight_by_groups(p, n):
    """From the advantages of a pass and of a fail in a group of k passes."""
    ks = torch.arange(1, n, dtype=torch.float64)
    spread = (ks * (n - ks) / (n * (n - 1))).sqrt()
    up, down = (1 - ks / n) / spread, -(ks / n) / spread
    step = (ks * up / p - (n - ks) * down / (1 - p)) / n
    chances = [math.comb(n, int(k)) * p ** int(k) * (1 - p) ** (n - int(k)) for k in ks]
    return (torch.tensor(chances, dtype=torch.float64) * step).sum()


WEIGHT = Exercise(
    "17.2", "What the division by the spread weighs", "implement", difficulty=4, importance=4, minutes=12,
    truth=weight_truth, cases=weight_cases,
    right=(weight, weight_by_groups,),
    wrong=(
        Wrong("without the spread", "chance * spread -> chance * spread**2", "That is the step without the division, (n - 1) / n for every p. With it one power of the spread is left."),
        Wrong("a chance for one order alone", "math.comb(n, k) * p -> p", "k passes can stand at many places among the n samples. How many?"),
        Wrong("the spread with n below", "(n * (n - 1)) -> (n * n)", "The spread here divides by n - 1, as torch.std does."),
        Wrong("the limit of large groups", "result = 1 / math.sqrt(p * (1 - p))", "That is what it tends to as n grows. With few samples a group is often silent."),
        Wrong("only the chance that a group speaks", "chance * spread -> chance", "In a group of k passes the step is (n - 1) / n times its spread over p (1 - p)."),
        Wrong("the spread is not that of the group", "spread = math.sqrt(k * (n - k) / (n * (n - 1))) -> spread = math.sqrt(p * (1 - p))", "Each group is divided by its own spread, which depends on its k."),
        Wrong("the sum over the samples", "(n - 1) / n * total -> (n - 1) * total", "The step is the mean over the samples of the group."),
        Wrong("divided by p alone", "total / (p * (1 - p)) -> total / p", "Fails take part as well: they push away what failed, by 1 / (1 - p) each."),
    ),
)  # fmt: skip


def loss_cases(generator):
    def case(lengths, width, epsilon, limit):
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        drawn = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
        advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
        old = drawn[0] - 2
        return (old + 0.4 * drawn[1]).requires_grad_(), old, advantages, mask, epsilon, limit

    return [
        case((1, 2), 2, 0.2, 4), case((3, 1, 2), 4, 0.1, 6),
        Edge("no padding in any row", case((4, 4), 4, 0.3, 4)), case((5, 1, 3, 7, 2), 8, 0.2, 16),
    ]  # fmt: skip


def loss_truth(logps, old_logps, advantages, mask, epsilon, limit):
    """A token at a time, with a case for each sign of the advantage."""
    of_rows = []
    for i, row in enumerate(mask.tolist()):
        a, terms = advantages[i].item(), []
        for t in (t for t, m in enumerate(row) if m):
            ratio = (logps[i, t] - old_logps[i, t]).exp()
            worst = 1 + epsilon if a > 0 else 1 - epsilon
            beyond = ratio > worst if a > 0 else ratio < worst
            terms.append(-a * (torch.tensor(worst, dtype=torch.float64) if beyond else ratio))
        of_rows.append(torch.stack(terms))
    everything = torch.cat(of_rows)
    by_row = torch.stack([terms.mean() for terms in of_rows]).mean()
    return torch.stack([by_row, everything.mean(), everything.sum() / (len(mask) * limit)])


def three_losses(logps, old_logps, advantages, mask, epsilon, limit):
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    each = advantages[:, None]
    losses = -torch.minimum(ratio * each, clipped * each) * mask
    sums, lengths = losses.sum(1), mask.sum(1)
    by_row, by_token = (sums / lengths).mean(), sums.sum() / lengths.sum()
    by_limit = sums.sum() / (len(mask) * limit)
    return torch.stack([by_row, by_token, by_limit])


def losses_by_weights(p, q, a, m, e, n):
    kept = torch.where(a[:, None] > 0, (p - q).exp().clamp(max=1 + e), (p - q).exp().clamp(min=1 - e))
    gains, m = kept * a[:, None], m.double()
    weights = [m / m.sum(1, keepdim=True) / len(m), m / m.sum(), m / (len(m) * n)]
    return [-(w * gains).sum() for w in weights]


LOSSES = Exercise(
    "17.3", "One loss, three averages", "implement", difficulty=3, importance=5, minutes=10,
    truth=loss_truth, cases=loss_cases,
    right=(three_losses, losses_by_weights,),
    wrong=(
        Wrong("no clip", "torch.minimum(ratio * each, clipped * each) -> (ratio * each)", "Nothing stops a ratio that has gone far: take the smaller of the two gains."),
        Wrong("the clip alone", "torch.minimum(ratio * each, clipped * each) -> (clipped * each)", "A ratio that has moved against its advantage must be able to come back: there the gain that is not clipped is the smaller one."),
        Wrong("the larger gain", "torch.minimum -> torch.maximum", "The clip is the pessimist: it takes the smaller gain."),
        Wrong("clipped before the exponential", "clipped = ratio.clamp(1 - epsilon, 1 + epsilon) -> clipped = (logps - old_logps).clamp(-epsilon, epsilon).exp()", "The interval is one of the ratio, not of its logarithm."),
        Wrong("padding counts", "* each) * mask -> * each)", "The entries outside the mask are no tokens."),
        Wrong("the rows' means over their whole width", "(sums / lengths).mean() -> (losses.mean(1)).mean()", "A row's mean is over its own tokens: divide by their number."),
        Wrong("the first and the second exchanged", "[by_row, by_token, by_limit] -> [by_token, by_row, by_limit]", "GRPO comes first: it takes the mean of each completion, and then the mean of these means."),
        Wrong("the limit without the rows", "(len(mask) * limit) -> limit", "The third divides by the most tokens that the whole batch could have."),
        Wrong("the sign", "losses = -torch -> losses = torch", "What is minimised is minus the gain."),
        Wrong("the ratio upside down", "(logps - old_logps).exp() -> (old_logps - logps).exp()", "The policy as it is now stands above, the one that sampled below."),
    ),
)  # fmt: skip


def changes_truth():
    """Each change is made, and the gradient compared with the one before it."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(4, 6, generator=generator, dtype=torch.float64) - 2
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    unequal = (torch.arange(6) < torch.tensor([6, 2, 5, 3])[:, None]).long()
    equal = torch.ones(4, 6, dtype=torch.long)

    def gradient(mask=unequal, moved=0.0, scale="none", constant=0.0, factor=1.0, **options):
        mine = logps.clone().requires_grad_()
        old = logps + moved * torch.arange(6) / 6
        advantages = group_advantages(factor * rewards + constant, scale).flatten()
        return torch.autograd.grad(grpo_loss(mine, old, advantages, mask, **options), mine)[0]

    def same(one, other):
        return "no" if torch.allclose(one, other, atol=1e-3) else "yes"

    dapo = {"loss_type": "dapo"}
    return {
        "a": same(gradient(epsilon=0.2), gradient(epsilon=1e9)),
        "b": same(gradient(moved=2.0, epsilon=0.2), gradient(moved=2.0, epsilon=1e9)),
        "c": same(gradient(equal), gradient(equal, **dapo)),
        "d": same(gradient(), gradient(**dapo)),
        "e": same(gradient(), gradient(constant=5.0)),
        "f": same(gradient(scale="group"), gradient(scale="group", factor=3.0)),
        "g": same(gradient(), gradient(factor=3.0)),
    }


CHANGES = Exercise(
    "17.4", "Which change changes anything?", "predict", difficulty=3, importance=4, minutes=6,
    truth=changes_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a: the clip acts at once", {"a": "yes"}, "Before the first update every ratio is 1. What does the clip do to a 1?"),
        Wrong("b: the clip never acts", {"b": "no"}, "After some updates ratios have moved. Those outside the interval, in their advantage's direction, stop pushing."),
        Wrong("c: the averages always differ", {"c": "yes"}, "If all lengths are L, both divide every token by the same number."),
        Wrong("d: the averages never differ", {"d": "no"}, "How much does one token of a long completion weigh in each of them?"),
        Wrong("e: the level counts", {"e": "yes"}, "The group's mean moves with the rewards. What is left of the constant in an advantage?"),
        Wrong("f: the unit counts", {"f": "yes"}, "The spread is multiplied by 3 as well."),
        Wrong("g: the unit never counts", {"g": "no"}, "Nothing divides it away here: every advantage is three times as large."),
    ),
)  # fmt: skip

EXERCISES = (PASS, WEIGHT, LOSSES, CHANGES)
