"""01 Preferences: Bradley-Terry, its likelihood and gradient, and what comparisons can tell."""

import math

import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong

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


def first_beats_third(p, q):
    difference = sympy.log(p / (1 - p)) + sympy.log(q / (1 - q))  # (r_1 - r_2) + (r_2 - r_3)
    return 1 / (1 + sympy.exp(-difference))


THIRD = Exercise(
    "01.1", "A comparison that was never made", "derive", difficulty=2, importance=4, minutes=8,
    truth=third_truth, cases=lambda generator: [SYMBOLS],
    right=(
        first_beats_third,
        lambda p, q: sigma(sympy.log(p / (1 - p)) + sympy.log(q / (1 - q))),
        lambda p, q: 1 / (1 + (1 / p - 1) * (1 / q - 1)),
        lambda p, q: odds(p) * odds(q) / (1 + odds(p) * odds(q)),
    ),
    wrong=(
        Wrong("the two chances are multiplied", lambda p, q: p * q, "Try p = q = 1/2: three equal completions, so 1 against 3 must be a coin flip too."),
        Wrong("the two chances are averaged", lambda p, q: (p + q) / 2, "If 1 is better than 2, and 2 better than 3, then 1 against 3 is clearer than either: the average is not."),
        Wrong("the distances from 1/2 are added", lambda p, q: p + q - sympy.Rational(1, 2), "At p = q = 0.8 this is above 1. Something does add up, but it is not the probabilities."),
        Wrong("the chance that at least one happens", lambda p, q: 1 - (1 - p) * (1 - q), "Try p = q = 1/2: three equal completions, so 1 against 3 must be a coin flip too."),
        Wrong("the larger of the two", lambda p, q: sympy.Max(p, q), "That is only a lower limit when both are above 1/2. Bradley-Terry says more: how do the differences of rewards combine?"),
        Wrong("odds, not yet a probability", "1 + sympy.exp(-difference) -> sympy.exp(-difference)", "At p = q = 1/2 this is 1. You have the odds, P / (1 - P): solve for P."),
        Wrong("the difference of rewards, not yet a probability", lambda p, q: sympy.log(odds(p) * odds(q)), "This is r_1 - r_3. The task asks for the probability that goes with it."),
        Wrong("the differences are subtracted", "q = 1 - q", "Write r_1 - r_3 in terms of r_1 - r_2 and r_2 - r_3: which sign stands between them?"),
        Wrong("probabilities where differences of rewards belong", lambda p, q: sigma(p + q), "The sigmoid takes a difference of rewards. Which difference has the win probability p?"),
        Wrong("log p where the log-odds belong", lambda p, q: sigma(sympy.log(p) + sympy.log(q)), "Check the inverse: sigma(log p) is p / (1 + p), not p."),
        Wrong("the differences are averaged", lambda p, q: sigma(sympy.log(odds(p)) / 2 + sympy.log(odds(q)) / 2), "From 3 up to 1 you climb both steps, from 3 to 2 and from 2 to 1."),
        Wrong("it is not normalised", lambda p, q: p * q + (1 - p) * (1 - q), "At p = 1 and q = 1/2 this is 1/2, but a completion that is infinitely better than 2 also beats 3."),
    ),
)  # fmt: skip


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
    cases = [(r.requires_grad_(gradient), w, l) for r, w, l in cases]
    return cases[:3] + [Edge("the rewards are extreme", case) for case in cases[3:]]


def likelihood_truth(rewards: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """One comparison after the other, each as a softmax over its two rewards."""
    total = rewards.new_zeros(())
    for w, l in zip(winners.tolist(), losers.tolist()):
        total = total + torch.stack((rewards[w], rewards[l])).logsumexp(0) - rewards[w]
    return total


def gap(r, w, l):
    return r[w] - r[l]


def negative_log_likelihood(rewards, winners, losers):
    return -torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]).sum()


LIKELIHOOD = Exercise(
    "01.2", "The likelihood of comparisons", "implement", difficulty=2, importance=5, minutes=10,
    truth=likelihood_truth, cases=likelihood_cases,
    right=(
        negative_log_likelihood,
        lambda r, w, l: F.softplus(r[l] - r[w]).sum(),
        lambda r, w, l: F.binary_cross_entropy_with_logits(r[w] - r[l], torch.ones(len(w)).to(r), reduction="sum"),
        lambda r, w, l: -torch.stack((r[w], r[l])).log_softmax(0)[0].sum(),
    ),
    wrong=(
        Wrong("winners and losers swapped", "rewards = -rewards", "When the winner has the higher reward, the loss must be below log 2 = 0.693."),
        Wrong("one loss per comparison", "torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]).sum() -> torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers])", "The task asks for one number for the whole list."),
        Wrong("the sigmoid or its logarithm overflows", "torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]) -> torch.sigmoid(rewards[winners] - rewards[losers]).log()",
              "When the favourite loses by 10000 the probability rounds to 0 and its logarithm is infinite. torch has a function that does both steps at once."),
        Wrong("an exponential of a reward overflows", "result = ((rewards[winners].exp() + rewards[losers].exp()).log() - rewards[winners]).sum()", "e^10000 is beyond every float. Only the difference of the two rewards matters: work with it."),
        Wrong("an exponential of a difference overflows", "gap = rewards[winners] - rewards[losers]; result = ((1 + gap.exp()).log() - gap).sum()", "At a difference of +10000 this is infinity minus 10000. Look for a function that is exact at both ends."),
        Wrong("a small number inside the logarithm", "torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]) -> torch.sigmoid(rewards[winners] - rewards[losers]).add(1e-12).log()",
              "This hides the overflow: where the model is most wrong, the gradient is then 0. An exact function makes the small number unnecessary."),
        Wrong("the logarithm is cut off at -100", "gap = rewards[winners] - rewards[losers]; result = F.binary_cross_entropy(gap.sigmoid(), torch.ones_like(gap), reduction='sum')", "binary_cross_entropy clamps its logarithms. Its sibling that takes logits does not need to."),
        Wrong("the sigmoid without its logarithm", "torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]) -> torch.nn.functional.sigmoid(rewards[winners] - rewards[losers])", "The sigmoid is the likelihood of one comparison; the task asks for minus its logarithm."),
        Wrong("the chance of being wrong", "result = torch.sigmoid(rewards[losers] - rewards[winners]).sum()", "That is 1 - sigma(difference), the size of the slope. The loss itself is a logarithm."),
        Wrong("the difference itself", "torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]) -> (rewards[winners] - rewards[losers])", "Without the log-sigmoid the loss has no bottom: it falls for ever as the rewards drift apart."),
        Wrong("the differences are summed first", "(rewards[winners] - rewards[losers]).sum() -> ((rewards[winners] - rewards[losers]).sum())", "Every comparison has its own probability; take the logarithm of each, then sum."),
        Wrong("the logarithm of a sum", ".sum() -> .logsumexp(0)", "Independent comparisons multiply: the logarithm comes first, the sum second."),
        Wrong("repeated comparisons counted once", "winners, losers = torch.stack((winners, losers)).unique(dim=1)", "The same pair with the same winner may come up many times, and each time is evidence."),
        Wrong("every winner against every loser", "rewards[winners] - rewards[losers] -> rewards[winners][:, None] - rewards[losers]", "Comparison k is between winners[k] and losers[k] only: check the shape of the differences."),
        Wrong("a softmax over all completions", "result = -rewards.log_softmax(0)[winners].sum()", "That is the best of n completions, as in Plackett-Luce. Here two were shown each time: who is in the denominator?"),
        Wrong("both outcomes counted", "result = result - torch.nn.functional.logsigmoid(rewards[losers] - rewards[winners]).sum()", "Each comparison had one outcome. The probability of what did not happen has no place here."),
        Wrong("the losers are detached", "- rewards[l -> - rewards.detach()[l", "A lost comparison must push the loser's reward down: its reward carries a gradient too."),
    ),
)  # fmt: skip


def gradient_truth(rewards: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """Autograd's."""
    leaf = rewards.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(likelihood_truth(leaf, winners, losers), [leaf])
    return gradient


def gradient(rewards, winners, losers):
    wrong = torch.sigmoid(rewards[losers] - rewards[winners])  # the chance of the other outcome
    return torch.zeros_like(rewards).index_add(0, winners, -wrong).index_add(0, losers, wrong)


GRADIENT = Exercise(
    "01.3", "Wins and expected wins", "implement", difficulty=3, importance=4, minutes=15,
    truth=gradient_truth, cases=lambda generator: likelihood_cases(generator, gradient=False),
    right=(
        gradient,
        lambda r, w, l: (F.one_hot(l, len(r)) - F.one_hot(w, len(r))).to(r).T @ torch.sigmoid(r[l] - r[w]),
        lambda r, w, l: torch.stack([(r[l] - r[w]).sigmoid()[l == i].sum() - (r[l] - r[w]).sigmoid()[w == i].sum() for i in range(len(r))]),
    ),
    wrong=(
        Wrong("only one comparison of each completion is kept", "return torch.zeros_like(rewards).index_add(0, winners, -wrong).index_add(0, losers, wrong) -> gradient = torch.zeros_like(rewards); gradient[winners] -= wrong; gradient[losers] += wrong; return gradient",
              "With repeated indices, gradient[winners] -= ... writes instead of adding up: the last one stays. torch has an operation that accumulates."),
        Wrong("each comparison overwrites the one before", "index_add(0, winners, -wrong) -> index_put((winners,), -wrong) | index_add(0, losers, wrong) -> index_put((losers,), wrong)", "A completion's entry collects something from every comparison that it took part in: add to it, do not set it."),
        Wrong("the chance of being right as weight", "rewards[losers] - rewards[winners] -> rewards[winners] - rewards[losers]", "A comparison that the model already expects should hardly move it. Look again at the slope of the loss."),
        Wrong("every comparison has the same weight", "torch.sigmoid(rewards[losers] - rewards[winners]) -> torch.ones_like(rewards[winners])", "Losses minus wins ignores against whom: beating a weak completion says less than beating a strong one."),
        Wrong("every comparison has weight 1/2", "torch.sigmoid(rewards[losers] - rewards[winners]) -> torch.ones_like(rewards[winners]) / 2", "That is the slope at equal rewards only. The weight depends on the difference."),
        Wrong("the slope of the probability", "return -> wrong = wrong * (1 - wrong)\n    return", "You differentiated sigma; the loss is minus its logarithm. Divide by what the logarithm contains."),
        Wrong("only the winners have a gradient", ".index_add(0, losers, wrong) -> ", "Each loss contains two rewards, so each comparison adds to two entries."),
        Wrong("only the losers have a gradient", ".index_add(0, winners, -wrong) -> ", "Each loss contains two rewards, so each comparison adds to two entries."),
        Wrong("winner and loser are pushed the same way", "losers, wrong -> losers, -wrong", "The loser's reward enters the difference with a minus. The entries of the gradient must sum to 0: why?"),
        Wrong("averaged over each completion's comparisons", "result = result / torch.cat((winners, losers)).bincount(minlength=len(rewards)).clamp(min=1)", "A completion that was compared often has collected more evidence: do not divide by the number of its comparisons."),
        Wrong("one number per comparison", "result = -torch.sigmoid(rewards[losers] - rewards[winners])", "The gradient has one entry per reward. Add up, for each completion, what its comparisons contribute."),
        Wrong("wins alone", "result = -winners.bincount(minlength=len(rewards)).to(rewards)", "Wins count only as far as they were not expected: what must be subtracted?"),
        Wrong("expected wins alone", "result = result + winners.bincount(minlength=len(rewards))", "This is how many wins the model expects of each completion. Compare it with what happened."),
        Wrong("a softmax over all completions", "result = len(winners) * rewards.softmax(0) - winners.bincount(minlength=len(rewards))", "Each comparison had two completions in it; the others did not take part."),
    ),
)  # fmt: skip


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
    "01.4", "What comparisons reveal", "predict", difficulty=2, importance=5, minutes=5, workshop=True,
    truth=reveal_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("the level of the rewards is thought to show", {"shift": "yes"}, "Only differences enter the probability. What does a shared constant do to a difference?"),
        Wrong("the scale of the rewards is thought to be hidden", {"scale": "no"}, "Doubling the rewards doubles the differences: compare sigma(1) with sigma(2). The notebook estimated just this, as sharpness."),
        Wrong("doubled strengths are taken for doubled rewards", {"strengths": "yes"}, "The weight is e^r. Twice the weight is which change of r?"),
        Wrong("the prompt's own constant is thought to show", {"prompt": "yes"}, "The two completions of a comparison answer the same prompt, so what depends on the prompt alone stands in both rewards."),
        Wrong("a bonus for length is taken for a constant", {"length": "no"}, "Only what depends on x alone cancels. Take two completions of different lengths: does their difference change?"),
        Wrong("an unbeaten completion is thought to have a best reward", {"unbeaten": "yes"}, "Take any reward and raise it by 1. What happens to the probability of its twenty wins? The slope of the loss is never 0."),
    ),
)  # fmt: skip


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


def comparisons_needed(p, w):
    curvature = p * (1 - p)  # of one comparison; also the variance of one outcome
    return {
        "probability": math.ceil(1.96**2 * curvature / w**2),
        "reward": math.ceil(1.96**2 / (curvature * w**2)),
    }


NEEDED = Exercise(
    "01.5", "How many comparisons?", "design", difficulty=3, importance=4, minutes=10,
    truth=needed_truth, cases=needed_cases,
    right=(
        comparisons_needed,
        up,
        lambda p, w: up(p, w, EXACT_QUANTILE),
        lambda p, w: {
            "probability": int((1.96 / w) ** 2 * (p - p * p)) + 1,
            "reward": int((1.96 / w) ** 2 * (1 / p + 1 / (1 - p))) + 1,
        },
    ),
    wrong=(
        Wrong("rounded to the nearest", "math.ceil -> round", "Half of the time this is one comparison too few."),
        Wrong("not rounded", "math.ceil -> float", "There are no fractions of a comparison: return whole numbers, large enough."),
        Wrong("one standard error instead of a 95% interval", "1.96**2 * curvature -> curvature", "An interval of plus or minus one standard error covers only 68%. How many standard errors make 95%?"),
        Wrong("1.96 is not squared", "1.96**2 * curvature -> 1.96 * curvature", "Solve 1.96 times the standard error = w for n: to free n from its square root, square both sides, all of them."),
        Wrong("w taken for the whole width", "1.96**2 * curvature -> 4 * 1.96**2 * curvature", "The interval reaches w to each side of the estimate: w is its half-width."),
        Wrong("w is not squared", "curvature / w**2 -> curvature / w", "The error falls as 1 / sqrt(n): half the width must cost four times the comparisons."),
        Wrong("the whole equation is not squared", "1.96**2 * curvature / w**2 -> 1.96 * math.sqrt(curvature) / w", "That is the square root of n: n stands under a root in the standard error."),
        Wrong("the worst case, p = 1/2", "1.96**2 * curvature -> 1.96**2 / 4", "Safe when nothing is known of p. Here p is given, and away from 1/2 fewer comparisons will do."),
        Wrong("p for p(1 - p)", "1.96**2 * curvature -> 1.96**2 * p", "At p = 1 the outcome never varies and the share is known at once: the variance must vanish there too."),
        Wrong("a standard deviation where the variance belongs", "1.96**2 * curvature -> 1.96**2 * math.sqrt(curvature)", "Under the root stands p(1 - p) / n; squaring leaves p(1 - p), without a root."),
        Wrong("the reward treated like the probability", "1.96**2 / (curvature * w**2) -> 1.96**2 * curvature / w**2", "A nearly certain winner shows its probability at once, but not by how much it is better. Where does the curvature stand in the error?"),
        Wrong("the reward with one standard error", "1.96**2 / (curvature -> 1 / (curvature", "The error 1 / sqrt(curvature) is one standard error; the interval reaches 1.96 of them."),
        Wrong("the reward's curvature squared", "(curvature * w**2) -> (curvature * w) ** 2", "The error is 1 / sqrt(n times the curvature of one comparison): after squaring, the curvature has power 1."),
        Wrong("the reward without the curvature", "(curvature * w**2) -> w**2", "The error depends on how sharply one comparison bends the loss: sigma(d) sigma(-d). What is that in terms of p?"),
        Wrong("the reward with w taken for the whole width", "1.96**2 / (curvature -> 4 * 1.96**2 / (curvature", "The interval reaches w to each side of the estimate: w is its half-width."),
        Wrong("the reward with w not squared", "(curvature * w**2) -> (curvature * w)", "The error falls as 1 / sqrt(n): half the width must cost four times the comparisons."),
    ),
)  # fmt: skip

EXERCISES = (THIRD, LIKELIHOOD, GRADIENT, REVEAL, NEEDED)
