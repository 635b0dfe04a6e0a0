"""01 Preferences: Bradley-Terry, its likelihood and gradient, and what comparisons can tell."""

import math

import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_mini.course.checks.engine import Exercise, Wrong

# --- 01.1 a comparison that was never made ---

SYMBOLS = sympy.symbols("p q", positive=True)


def third_truth(p, q):
    """Solved by sympy for the strengths e^r, that of completion 2 being 1."""
    first, third = sympy.symbols("s_1 s_3")
    at = sympy.solve([sympy.Eq(p * (first + 1), first), sympy.Eq(q * (1 + third), 1)],
                     [first, third], dict=True)[0]  # fmt: skip
    return (first / (first + third)).subs(at)


def odds(p):
    return p / (1 - p)


def sigma(z):
    return 1 / (1 + sympy.exp(-z))


THIRD = Exercise(
    id="01.1",
    title="A comparison that was never made",
    kind="derive",
    truth=third_truth,
    cases=lambda generator: [SYMBOLS],
    wrong=(
        Wrong("the two chances are multiplied", lambda p, q: p * q,
              "Try p = q = 1/2: three equal completions, so 1 against 3 must be a coin flip too."),
        Wrong("the two chances are averaged", lambda p, q: (p + q) / 2,
              "If 1 is better than 2, and 2 better than 3, then 1 against 3 is clearer than either: the average is not."),
        Wrong("the distances from 1/2 are added", lambda p, q: p + q - sympy.Rational(1, 2),
              "At p = q = 0.8 this is above 1. Something does add up, but it is not the probabilities."),
        Wrong("the chance that at least one happens", lambda p, q: 1 - (1 - p) * (1 - q),
              "Try p = q = 1/2: three equal completions, so 1 against 3 must be a coin flip too."),
        Wrong("the larger of the two", lambda p, q: sympy.Max(p, q),
              "That is only a lower limit when both are above 1/2. Bradley-Terry says more: how do the differences of rewards combine?"),
        Wrong("odds, not yet a probability", lambda p, q: odds(p) * odds(q),
              "At p = q = 1/2 this is 1. You have the odds, P / (1 - P): solve for P."),
        Wrong("the difference of rewards, not yet a probability", lambda p, q: sympy.log(odds(p) * odds(q)),
              "This is r_1 - r_3. The task asks for the probability that goes with it."),
        Wrong("the differences are subtracted", lambda p, q: odds(p) / (odds(p) + odds(q)),
              "Write r_1 - r_3 in terms of r_1 - r_2 and r_2 - r_3: which sign stands between them?"),
        Wrong("3 beats 1", lambda p, q: (1 - p) * (1 - q) / (p * q + (1 - p) * (1 - q)),
              "With p and q near 1, completion 1 should nearly always beat completion 3."),
        Wrong("probabilities where differences of rewards belong", lambda p, q: sigma(p + q),
              "The sigmoid takes a difference of rewards. Which difference has the win probability p?"),
        Wrong("log p where the log-odds belong", lambda p, q: sigma(sympy.log(p) + sympy.log(q)),
              "Check the inverse: sigma(log p) is p / (1 + p), not p."),
        Wrong("the differences are averaged", lambda p, q: sigma(sympy.log(odds(p)) / 2 + sympy.log(odds(q)) / 2),
              "From 3 up to 1 you climb both steps, from 3 to 2 and from 2 to 1."),
        Wrong("it is not normalised", lambda p, q: p * q + (1 - p) * (1 - q),
              "At p = 1 and q = 1/2 this is 1/2, but a completion that is infinitely better than 2 also beats 3."),
    ),
    others=(
        lambda p, q: sigma(sympy.log(p / (1 - p)) + sympy.log(q / (1 - q))),
        lambda p, q: 1 / (1 + (1 / p - 1) * (1 / q - 1)),
        lambda p, q: odds(p) * odds(q) / (1 + odds(p) * odds(q)),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=4,
    minutes=8,
)  # fmt: skip

# --- 01.2 the negative log-likelihood ---


def comparisons(generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Random comparisons among all but the last completion; the first three are one pair."""
    winners = torch.randint(count - 1, (size,), generator=generator)
    losers = (winners + torch.randint(1, count - 1, (size,), generator=generator)) % (count - 1)
    return torch.cat((winners[:1], winners[:1], losers[:1], winners)), torch.cat(
        (losers[:1], losers[:1], winners[:1], losers)
    )


def likelihood_cases(generator, gradient=True):
    def normal(count, scale=1.0):
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    low, high = normal(3), normal(3)
    low[1], high[1] = -1e4, 1e4  # in `high` the favourite loses, in `low` it wins
    cases = [
        (normal(2), torch.tensor([1]), torch.tensor([0])),
        (normal(4), *comparisons(generator, 4, 5)),
        (300 + normal(7, 2.0), *comparisons(generator, 7, 17)),
        (low, torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])),
        (high, torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])),
    ]
    return [(r.requires_grad_(gradient), w, l) for r, w, l in cases]


def likelihood_truth(rewards: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """One comparison after the other, each as a softmax over its two rewards."""
    total = rewards.new_zeros(())
    for w, l in zip(winners.tolist(), losers.tolist()):
        total = total + torch.stack((rewards[w], rewards[l])).logsumexp(0) - rewards[w]
    return total


def gap(r, w, l):
    return r[w] - r[l]


LIKELIHOOD = Exercise(
    id="01.2",
    title="The likelihood of comparisons",
    kind="implement",
    truth=likelihood_truth,
    cases=likelihood_cases,
    wrong=(
        Wrong("winners and losers swapped", lambda r, w, l: -F.logsigmoid(gap(r, l, w)).sum(),
              "When the winner has the higher reward, the loss must be below log 2 = 0.693."),
        Wrong("the sign of the loss", lambda r, w, l: F.logsigmoid(gap(r, w, l)).sum(),
              "A probability is at most 1, so its logarithm is at most 0: the *negative* log-likelihood cannot be below 0."),
        Wrong("mean for sum", lambda r, w, l: -F.logsigmoid(gap(r, w, l)).mean(),
              "The likelihood of the list is a product over its comparisons. What does the logarithm make of a product?"),
        Wrong("one loss per comparison", lambda r, w, l: -F.logsigmoid(gap(r, w, l)),
              "The task asks for one number for the whole list."),
        Wrong("the sigmoid or its logarithm overflows", lambda r, w, l: -torch.log(torch.sigmoid(gap(r, w, l))).sum(),
              "When the favourite loses by 10000 the probability rounds to 0 and its logarithm is infinite. torch has a function that does both steps at once."),
        Wrong("an exponential of a reward overflows", lambda r, w, l: ((r[w].exp() + r[l].exp()).log() - r[w]).sum(),
              "e^10000 is beyond every float. Only the difference of the two rewards matters: work with it."),
        Wrong("an exponential of a difference overflows", lambda r, w, l: ((1 + gap(r, w, l).exp()).log() - gap(r, w, l)).sum(),
              "At a difference of +10000 this is infinity minus 10000. Look for a function that is exact at both ends."),
        Wrong("a small number inside the logarithm", lambda r, w, l: -torch.log(torch.sigmoid(gap(r, w, l)) + 1e-12).sum(),
              "This hides the overflow: where the model is most wrong, the gradient is then 0. An exact function makes the small number unnecessary."),
        Wrong("the logarithm is cut off at -100", lambda r, w, l: F.binary_cross_entropy(torch.sigmoid(gap(r, w, l)), torch.ones_like(gap(r, w, l)), reduction="sum"),
              "binary_cross_entropy clamps its logarithms. Its sibling that takes logits does not need to."),
        Wrong("the sigmoid without its logarithm", lambda r, w, l: -torch.sigmoid(gap(r, w, l)).sum(),
              "The sigmoid is the likelihood of one comparison; the task asks for minus its logarithm."),
        Wrong("the chance of being wrong", lambda r, w, l: torch.sigmoid(-gap(r, w, l)).sum(),
              "That is 1 - sigma(difference), the size of the slope. The loss itself is a logarithm."),
        Wrong("the difference itself", lambda r, w, l: -gap(r, w, l).sum(),
              "Without the log-sigmoid the loss has no bottom: it falls for ever as the rewards drift apart."),
        Wrong("the differences are summed first", lambda r, w, l: -F.logsigmoid(gap(r, w, l).sum()),
              "Every comparison has its own probability; take the logarithm of each, then sum."),
        Wrong("the logarithm of a sum", lambda r, w, l: -F.logsigmoid(gap(r, w, l)).logsumexp(0),
              "Independent comparisons multiply: the logarithm comes first, the sum second."),
        Wrong("repeated comparisons counted once", lambda r, w, l: -F.logsigmoid(gap(r, *torch.stack((w, l)).unique(dim=1))).sum(),
              "The same pair with the same winner may come up many times, and each time is evidence."),
        Wrong("every winner against every loser", lambda r, w, l: -F.logsigmoid(r[w][:, None] - r[l][None, :]).sum(),
              "Comparison k is between winners[k] and losers[k] only: check the shape of the differences."),
        Wrong("a softmax over all completions", lambda r, w, l: -r.log_softmax(0)[w].sum(),
              "That is the best of n completions, as in Plackett-Luce. Here two were shown each time: who is in the denominator?"),
        Wrong("both outcomes counted", lambda r, w, l: -(F.logsigmoid(gap(r, w, l)) + F.logsigmoid(gap(r, l, w))).sum(),
              "Each comparison had one outcome. The probability of what did not happen has no place here."),
        Wrong("the rewards are detached", lambda r, w, l: -F.logsigmoid(gap(r.detach(), w, l)).sum(),
              "The value is right, but no gradient flows back to the rewards, so nothing could be fitted."),
        Wrong("the losers are detached", lambda r, w, l: -F.logsigmoid(r[w] - r.detach()[l]).sum(),
              "A lost comparison must push the loser's reward down: its reward carries a gradient too."),
        Wrong("logarithm to base 2", lambda r, w, l: -F.logsigmoid(gap(r, w, l)).sum() / math.log(2),
              "At equal rewards one comparison must cost 0.693, the natural logarithm of 2."),
        Wrong("half", lambda r, w, l: -0.5 * F.logsigmoid(gap(r, w, l)).sum(),
              "At equal rewards one comparison must cost log 2 = 0.693."),
        Wrong("zero", lambda r, w, l: 0 * r.sum(),
              "At equal rewards one comparison must cost log 2 = 0.693."),
    ),
    others=(
        lambda r, w, l: F.softplus(r[l] - r[w]).sum(),
        lambda r, w, l: F.binary_cross_entropy_with_logits(gap(r, w, l), torch.ones(len(w)).to(r), reduction="sum"),
        lambda r, w, l: -torch.stack((r[w], r[l])).log_softmax(0)[0].sum(),
        lambda r, w, l: -(torch.zeros(len(r), len(r)).to(r).index_put((w, l), torch.ones(len(w)).to(r), accumulate=True)
                          * F.logsigmoid(r[:, None] - r[None, :])).sum(),
    ),
    tolerance=1e-8,
    difficulty=2,
    importance=5,
    minutes=10,
)  # fmt: skip

# --- 01.3 its gradient by hand ---


def gradient_truth(rewards: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """Autograd's."""
    leaf = rewards.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(likelihood_truth(leaf, winners, losers), [leaf])
    return gradient


def spread(r, w, l, to_winners, to_losers):
    """Add what each comparison gives to its winner and to its loser."""
    return torch.zeros_like(r).index_add(0, w, to_winners).index_add(0, l, to_losers)


def surprise(r, w, l):
    return torch.sigmoid(r[l] - r[w])


def weighted(weight):
    return lambda r, w, l: spread(r, w, l, -weight(r, w, l), weight(r, w, l))


def last_write_wins(r, w, l):
    gradient = torch.zeros_like(r)
    for i, s in zip(w.tolist(), surprise(r, w, l)):
        gradient[i] = -s
    before = gradient.clone()
    for i, s in zip(l.tolist(), surprise(r, w, l)):
        gradient[i] = before[i] + s
    return gradient


def overwritten(r, w, l):
    gradient, weights = torch.zeros_like(r), surprise(r, w, l)
    for i, s in zip(w.tolist(), weights):
        gradient[i] = -s
    for i, s in zip(l.tolist(), weights):
        gradient[i] = s
    return gradient


def counts(r, i):
    return torch.zeros_like(r).index_add(0, i, torch.ones_like(i, dtype=r.dtype))


def per_comparison_of_each(r, w, l):
    return gradient_truth(r, w, l) / (counts(r, w) + counts(r, l)).clamp(min=1)


GRADIENT = Exercise(
    id="01.3",
    title="Wins and expected wins",
    kind="implement",
    truth=gradient_truth,
    cases=lambda generator: likelihood_cases(generator, gradient=False),
    wrong=(
        Wrong("only one comparison of each completion is kept", last_write_wins,
              "With repeated indices, gradient[winners] -= ... writes instead of adding up: the last one stays. torch has an operation that accumulates."),
        Wrong("each comparison overwrites the one before", overwritten,
              "A completion's entry collects something from every comparison that it took part in: add to it, do not set it."),
        Wrong("the direction of ascent", weighted(lambda r, w, l: -surprise(r, w, l)),
              "Minimising steps against the gradient. A winner's reward should rise, so what sign has its gradient?"),
        Wrong("the chance of being right as weight", weighted(lambda r, w, l: 1 - surprise(r, w, l)),
              "A comparison that the model already expects should hardly move it. Look again at the slope of the loss."),
        Wrong("every comparison has the same weight", weighted(lambda r, w, l: torch.ones_like(r[w])),
              "Losses minus wins ignores against whom: beating a weak completion says less than beating a strong one."),
        Wrong("every comparison has weight 1/2", weighted(lambda r, w, l: torch.ones_like(r[w]) / 2),
              "That is the slope at equal rewards only. The weight depends on the difference."),
        Wrong("the slope of the probability", weighted(lambda r, w, l: surprise(r, w, l) * (1 - surprise(r, w, l))),
              "You differentiated sigma; the loss is minus its logarithm. Divide by what the logarithm contains."),
        Wrong("only the winners have a gradient", lambda r, w, l: spread(r, w, l, -surprise(r, w, l), 0 * r[l]),
              "Each loss contains two rewards, so each comparison adds to two entries."),
        Wrong("only the losers have a gradient", lambda r, w, l: spread(r, w, l, 0 * r[w], surprise(r, w, l)),
              "Each loss contains two rewards, so each comparison adds to two entries."),
        Wrong("winner and loser are pushed the same way", lambda r, w, l: spread(r, w, l, -surprise(r, w, l), -surprise(r, w, l)),
              "The loser's reward enters the difference with a minus. The entries of the gradient must sum to 0: why?"),
        Wrong("mean for sum", lambda r, w, l: gradient_truth(r, w, l) / len(w),
              "The loss of 01.2 is a sum over comparisons, and so is its gradient."),
        Wrong("averaged over each completion's comparisons", per_comparison_of_each,
              "A completion that was compared often has collected more evidence: do not divide by the number of its comparisons."),
        Wrong("one number per comparison", lambda r, w, l: -surprise(r, w, l),
              "The gradient has one entry per reward. Add up, for each completion, what its comparisons contribute."),
        Wrong("wins alone", lambda r, w, l: -counts(r, w),
              "Wins count only as far as they were not expected: what must be subtracted?"),
        Wrong("expected wins alone", lambda r, w, l: gradient_truth(r, w, l) + counts(r, w),
              "This is how many wins the model expects of each completion. Compare it with what happened."),
        Wrong("a softmax over all completions", lambda r, w, l: len(w) * r.softmax(0) - counts(r, w),
              "Each comparison had two completions in it; the others did not take part."),
        Wrong("half", lambda r, w, l: gradient_truth(r, w, l) / 2,
              "Check with one comparison at equal rewards: the entries must be -1/2 and 1/2."),
        Wrong("zeros", lambda r, w, l: torch.zeros_like(r),
              "That would mean that the rewards already explain the comparisons best."),
    ),
    others=(
        lambda r, w, l: (F.one_hot(l, len(r)) - F.one_hot(w, len(r))).to(r).T @ surprise(r, w, l),
        lambda r, w, l: spread(r, w, l, torch.sigmoid(r[w] - r[l]), surprise(r, w, l)) - counts(r, w),
        lambda r, w, l: torch.stack([surprise(r, w, l)[l == i].sum() - surprise(r, w, l)[w == i].sum() for i in range(len(r))]),
    ),
    tolerance=1e-8,
    difficulty=3,
    importance=4,
    minutes=15,
)  # fmt: skip

# --- 01.4 what comparisons can reveal ---


def reveal_truth():
    """Computed: all win probabilities under both rewards, within each of two prompts."""
    rewards = ((0.4, -1.1, 0.9), (1.7, 0.2, -0.6))  # [prompt][completion]
    prompt_words, words = (3, 8), ((5, 12, 9), (4, 4, 20))

    def chances(reward):
        strengths = [[math.exp(reward(x, y)) for y in range(3)] for x in range(2)]
        return [a / (a + b) for at_x in strengths for a in at_x for b in at_x]

    def told_apart(other):
        pairs = zip(chances(lambda x, y: rewards[x][y]), chances(other))
        return "yes" if any(abs(a - b) > 1e-9 for a, b in pairs) else "no"

    # 20 wins against rewards of 0: the loss falls at every reward up to where float64 ends.
    slopes = [20 / (1 + math.exp(r)) for r in range(-700, 701)]
    return {
        "shift": told_apart(lambda x, y: rewards[x][y] + 41.5),
        "scale": told_apart(lambda x, y: 2 * rewards[x][y]),
        "strengths": told_apart(lambda x, y: math.log(2 * math.exp(rewards[x][y]))),
        "prompt": told_apart(lambda x, y: rewards[x][y] + prompt_words[x]),
        "length": told_apart(lambda x, y: rewards[x][y] + 0.1 * words[x][y]),
        "unbeaten": "no" if all(slope > 0 for slope in slopes) else "yes",
    }


REVEAL = Exercise(
    id="01.4",
    title="What comparisons reveal",
    kind="predict",
    truth=reveal_truth,
    cases=lambda generator: [()],
    wrong=(
        Wrong("the level of the rewards is thought to show", lambda: {"shift": "yes"},
              "Only differences enter the probability. What does a shared constant do to a difference?"),
        Wrong("the scale of the rewards is thought to be hidden", lambda: {"scale": "no"},
              "Doubling the rewards doubles the differences: compare sigma(1) with sigma(2). The notebook estimated just this, as sharpness."),
        Wrong("doubled strengths are taken for doubled rewards", lambda: {"strengths": "yes"},
              "The weight is e^r. Twice the weight is which change of r?"),
        Wrong("the prompt's own constant is thought to show", lambda: {"prompt": "yes"},
              "The two completions of a comparison answer the same prompt, so what depends on the prompt alone stands in both rewards."),
        Wrong("a bonus for length is taken for a constant", lambda: {"length": "no"},
              "Only what depends on x alone cancels. Take two completions of different lengths: does their difference change?"),
        Wrong("an unbeaten completion is thought to have a best reward", lambda: {"unbeaten": "yes"},
              "Take any reward and raise it by 1. What happens to the probability of its twenty wins? The slope of the loss is never 0."),
    ),
    difficulty=2,
    importance=5,
    minutes=5,
    workshop=True,
)  # fmt: skip

# --- 01.5 how many comparisons ---

EXACT_QUANTILE = 1.959964  # 1.96 before rounding: cases are chosen so that both give the same


def needed(p, w, z=1.96):
    return {"probability": z**2 * p * (1 - p) / w**2, "reward": z**2 / (p * (1 - p) * w**2)}


def up(p, w, z=1.96):
    return {key: math.ceil(n) for key, n in needed(p, w, z).items()}


def needed_cases(generator):
    """Four cases whose results, before rounding up, are well away from whole numbers: their
    fractions are below 1/2 and above it in turn, so that no other rounding gives the same.
    """
    cases = []
    for low, high, above in ((0.1, 0.4, False), (0.6, 0.9, True), (0.1, 0.4, True), (0.6, 0.9, False)):  # fmt: skip
        while True:
            u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            p = 0.6 + 0.32 * u if above else 0.4 - 0.32 * u
            p, w = round(p, 3), round(0.03 + 0.07 * v, 4)
            numbers = needed(p, w)
            clear = all(low < n % 1 < high for n in numbers.values())
            if clear and numbers["probability"] > 20 and up(p, w) == up(p, w, EXACT_QUANTILE):
                break
        cases.append((p, w))
    return cases


def needed_truth(p: float, w: float) -> dict[str, int]:
    """Searched: the smallest n whose interval is narrow enough; the curvature is autograd's."""
    gap = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    loss = -p * F.logsigmoid(gap) - (1 - p) * F.logsigmoid(-gap)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss, [gap], create_graph=True)
        (curvature,) = torch.autograd.grad(slope, [gap])

    def smallest(error):
        low, high = 0, 1
        while 1.96 * error(high) > w:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if 1.96 * error(middle) > w else (low, middle)
        return high

    return {
        "probability": smallest(lambda n: math.sqrt(p * (1 - p) / n)),
        "reward": smallest(lambda n: 1 / math.sqrt(n * curvature.item())),
    }


def part(key, number):
    """A wrong answer about one entry, rounded up."""
    return lambda p, w: {key: math.ceil(number(p, w))}


Z2 = 1.96**2
NEEDED = Exercise(
    id="01.5",
    title="How many comparisons?",
    kind="design",
    truth=needed_truth,
    cases=needed_cases,
    wrong=(
        Wrong("rounded down", lambda p, w: {k: math.floor(n) for k, n in needed(p, w).items()},
              "With one comparison fewer than needed, the interval is still a little too wide."),
        Wrong("rounded to the nearest", lambda p, w: {k: round(n) for k, n in needed(p, w).items()},
              "Half of the time this is one comparison too few."),
        Wrong("not rounded", lambda p, w: needed(p, w),
              "There are no fractions of a comparison: return whole numbers, large enough."),
        Wrong("the two answers are swapped", lambda p, w: dict(zip(("reward", "probability"), up(p, w).values())),
              "For a nearly certain winner, which is known sooner: that it wins nearly always, or by how much it is better?"),
        Wrong("one standard error instead of a 95% interval", part("probability", lambda p, w: p * (1 - p) / w**2),
              "An interval of plus or minus one standard error covers only 68%. How many standard errors make 95%?"),
        Wrong("1.96 is not squared", part("probability", lambda p, w: 1.96 * p * (1 - p) / w**2),
              "Solve 1.96 times the standard error = w for n: to free n from its square root, square both sides, all of them."),
        Wrong("w taken for the whole width", part("probability", lambda p, w: 4 * Z2 * p * (1 - p) / w**2),
              "The interval reaches w to each side of the estimate: w is its half-width."),
        Wrong("w is not squared", part("probability", lambda p, w: Z2 * p * (1 - p) / w),
              "The error falls as 1 / sqrt(n): half the width must cost four times the comparisons."),
        Wrong("the whole equation is not squared", part("probability", lambda p, w: 1.96 * math.sqrt(p * (1 - p)) / w),
              "That is the square root of n: n stands under a root in the standard error."),
        Wrong("the worst case, p = 1/2", part("probability", lambda p, w: Z2 / (4 * w**2)),
              "Safe when nothing is known of p. Here p is given, and away from 1/2 fewer comparisons will do."),
        Wrong("p for p(1 - p)", part("probability", lambda p, w: Z2 * p / w**2),
              "At p = 1 the outcome never varies and the share is known at once: the variance must vanish there too."),
        Wrong("a standard deviation where the variance belongs", part("probability", lambda p, w: Z2 * math.sqrt(p * (1 - p)) / w**2),
              "Under the root stands p(1 - p) / n; squaring leaves p(1 - p), without a root."),
        Wrong("the reward treated like the probability", part("reward", lambda p, w: Z2 * p * (1 - p) / w**2),
              "A nearly certain winner shows its probability at once, but not by how much it is better. Where does the curvature stand in the error?"),
        Wrong("the reward with one standard error", part("reward", lambda p, w: 1 / (p * (1 - p) * w**2)),
              "The error 1 / sqrt(curvature) is one standard error; the interval reaches 1.96 of them."),
        Wrong("the reward's curvature squared", part("reward", lambda p, w: Z2 / (p * (1 - p) * w) ** 2),
              "The error is 1 / sqrt(n times the curvature of one comparison): after squaring, the curvature has power 1."),
        Wrong("the reward without the curvature", part("reward", lambda p, w: Z2 / w**2),
              "The error depends on how sharply one comparison bends the loss: sigma(Delta) sigma(-Delta). What is that in terms of p?"),
        Wrong("the reward with w taken for the whole width", part("reward", lambda p, w: 4 * Z2 / (p * (1 - p) * w**2)),
              "The interval reaches w to each side of the estimate: w is its half-width."),
        Wrong("the reward with w not squared", part("reward", lambda p, w: Z2 / (p * (1 - p) * w)),
              "The error falls as 1 / sqrt(n): half the width must cost four times the comparisons."),
    ),
    others=(
        up,
        lambda p, w: up(p, w, EXACT_QUANTILE),
        lambda p, w: {
            "probability": int((1.96 / w) ** 2 * (p - p * p)) + 1,
            "reward": int((1.96 / w) ** 2 * (1 / p + 1 / (1 - p))) + 1,
        },
    ),
    tolerance=1e-9,
    difficulty=3,
    importance=4,
    minutes=10,
)  # fmt: skip

EXERCISES = (THIRD, LIKELIHOOD, GRADIENT, REVEAL, NEEDED)
