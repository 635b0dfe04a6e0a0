"""12 The frontier: what a nat buys, what a win rate costs, and when a comparison is fair."""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import sympy
import torch
from torch import Tensor

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong

BETA, KL, REWARD = 0.25, 4.0, 2.0  # the one point that is known


def world_through_the_point(reference_reward):
    """Two answers, (reference, rewards), whose pi* at BETA has KL and REWARD; `reference_reward` is
    the reference's own mean reward.
    """
    q = 0.0  # the reference's probability of the better answer
    gain = 0.0  # by how much it is better
    for _ in range(200):
        base = reference_reward - q * gain
        log_z = (REWARD - base) / BETA - KL
        p = 1 - (1 - q) * math.exp(-log_z)
        gain = (REWARD - base) / p
        q = 1 / (1 + (1 - p) / p * math.exp(gain / BETA))
    reference = torch.tensor([math.log1p(-q), math.log(q)], dtype=torch.float64)
    rewards = torch.tensor([base, base + gain], dtype=torch.float64)
    best = exact.optimal_policy(reference, rewards, BETA)
    assert abs(exact.kl(best, reference) - KL) < 1e-9
    assert abs(exact.expectation(best, rewards) - REWARD) < 1e-9
    assert abs(exact.expectation(reference, rewards) - reference_reward) < 1e-9
    return reference, rewards


def best_reward_at(kl, reference, rewards):
    low, high = 1e-3, 1e3  # the beta whose pi* has this KL, by bisection
    for _ in range(50):
        middle = math.sqrt(low * high)
        beyond = exact.kl(exact.optimal_policy(reference, rewards, middle), reference) > kl
        low, high = (middle, high) if beyond else (low, middle)
    return exact.expectation(exact.optimal_policy(reference, rewards, high), rewards).item()


def slope_at(beta, reference, rewards):
    """dE[r] / dKL along the frontier, by autograd."""
    beta = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    policy = exact.optimal_policy(reference, rewards, beta)
    changes = [
        torch.autograd.grad(value, beta, retain_graph=True)[0]
        for value in (exact.expectation(policy, rewards), exact.kl(policy, reference))
    ]
    return (changes[0] / changes[1]).item()


def tangent_truth():
    """Excluded is what J forbids; what is called open has a world in which it happens."""
    straight, bent = world_through_the_point(0.98), world_through_the_point(-3.0)
    j_best = REWARD - BETA * KL

    def word(kl, reward, found=None, different=False):
        left = j_best - (reward - BETA * kl)  # beta KL(pi || pi*), which is never below 0
        if left < -1e-12 or (different and abs(left) < 1e-12):
            return "excluded"
        assert found >= reward  # in one world the frontier is as high
        return "open"

    doubled = straight[0], 2 * straight[1]
    same = exact.optimal_policy(*doubled, 2 * BETA)  # the beta that leads to the same KL
    assert abs(exact.kl(same, straight[0]) - KL) < 1e-9
    return {
        "KL 6, 2.6": word(6.0, 2.6),
        "KL 6, 2.4": word(6.0, 2.4, best_reward_at(6.0, *straight)),
        "KL 2, 1.6": word(2.0, 1.6),
        "twin": word(KL, REWARD, different=True),
        "reference 1.1": word(0.0, 1.1),
        "reference -3": word(0.0, -3.0, exact.expectation(*bent).item() + 1e-9),
        "0.1 nat": f"{0.1 * slope_at(BETA, *straight):.3f}",
        "doubled": f"{slope_at(2 * BETA, *doubled):.3f}",
    }


TANGENT = Exercise(
    "12.1", "What one point says of all others", "predict", difficulty=3, importance=4, minutes=7,
    truth=tangent_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("the frontier may bend upwards", {"KL 6, 2.6": "open"}, "Compute E[r] - beta KL of this claim, and of pi* at beta = 0.25. Which of the two is larger, and may it be?"),
        Wrong("more KL brings nothing more", {"KL 6, 2.4": "excluded"}, "The curve rises as long as beta is above 0, and one point does not say how fast it flattens. What does the tangent allow at 6 nats?"),
        Wrong("the bound holds only to the right", {"KL 2, 1.6": "open"}, "Pi* has the largest E[r] - beta KL of all policies, those that stay nearer to the reference included."),
        Wrong("two different policies at one point of the frontier", {"twin": "open"}, "J(pi) falls short of J(pi*) by beta KL(pi || pi*). If it does not fall short at all, what is that KL?"),
        Wrong("the reference is not bounded", {"reference 1.1": "open"}, "The reference is a policy too, one with KL 0. What is its J?"),
        Wrong("the frontier is a straight line", {"reference -3": "excluded"}, "The tangent is a ceiling, not the curve. Must a curve that flattens start on the tangent of a later point?"),
        Wrong("the average slope", {"0.1 nat": "0.050"}, "Reward over KL is what all nats so far have brought on average. The next one brings less: which number is the slope?"),
        Wrong("the nats themselves", {"0.1 nat": "0.100"}, "KL and reward have different units. What is the price of one nat, in reward?"),
        Wrong("divided by beta", {"0.1 nat": "0.400"}, "Beta has the unit reward per nat. What must it do to nats so that a reward comes out?"),
        Wrong("one whole nat", {"0.1 nat": "0.250"}, "This is what a whole nat would bring. How many were bought?"),
        Wrong("the slope does not know the reward's scale", {"doubled": "0.250"}, "The same policies have the same KL as before and twice the reward. What does that do to every rise of the curve?"),
        Wrong("the slope is halved", {"doubled": "0.125"}, "At the old beta the policy would now go further. But the question is about the same KL: what has become of the rewards there?"),
    ),
)  # fmt: skip


S = sympy.Symbol("s", positive=True)
LOG = sympy.log


def win_rate_cost_truth(w):
    """With t = -log F in place of F, the reference is an exponential distribution of rate 1 and the
    best of n one of rate n; and of n + 1 equally good samples the opponent is the best once in n + 1.
    """
    n = 1 / (1 - w) - 1
    mean_t = 1 / n
    log_densities = LOG(n) - n * mean_t, -mean_t
    return log_densities[0] - log_densities[1]


def win_rate_cost(w):
    n = w / (1 - w)
    return sympy.log(n) - (n - 1) / n


WIN_RATE_COST = Exercise(
    "12.2", "What a win rate costs", "derive", difficulty=3, importance=3, minutes=9,
    truth=win_rate_cost_truth, cases=lambda generator: [((1 + S) / (2 + S),), (S / (1 + S),)],
    right=(
        win_rate_cost,
        lambda w: sympy.log(w) - sympy.log(1 - w) + 1 / w - 2,
        lambda w: (1 - 2 * w) / w - sympy.log(1 / w - 1),
    ),
    wrong=(
        Wrong("only log n", "- (n - 1) / n -> ", "Log n is the log-ratio of the very best text, where F = 1. What does (n - 1) log F average to?"),
        Wrong("without log n", "return sympy.log(n) - -> return -", "A KL is never below 0. Where has the factor n of the ratio n F^(n-1) gone?"),
        Wrong("the second term's sign", "- (n - 1) / n -> + (n - 1) / n", "The logarithm of a rank between 0 and 1 is below 0. So what is the sign of its average?"),
        Wrong("averaged under the reference", "- (n - 1) / n -> - (n - 1)", "This is below 0, which no KL can be. Whose texts are averaged over: does F of a best-of-n text have the density 1?"),
        Wrong("the other direction", "return sympy.log(n) - (n - 1) / n -> return n - 1 - sympy.log(n)", "This is KL(pi_ref || best-of-n). Whose samples does KL(pi || pi_ref) average over? Or is your n upside down? A win rate of 3/4 must give n = 3."),
        Wrong("the win rate taken for n", "n = w / (1 - w) -> n = w", "This formula wants n, the number of samples. How often does the best of n + 1 samples come from the group of n?"),
        Wrong("win rate (n-1)/n", "n = w / -> n = 1 /", "With n = 1 the two are equal, and one wins half the time. Does your win rate say so? Count the reference's sample among those that compete."),
        Wrong("n independent duels", "n = w / (1 - w) -> n = -sympy.log(1 - w) / sympy.log(2)", "The n samples meet the same opponent: if it is good, they all lose. Which of n + 1 equally good samples is the best one?"),
        Wrong("win rate n/(n+1), solved with a slip", "n = w / -> n = (1 + w) /", "Put w = 1/2 into your n. How many samples does one need to win half the time?"),
        Wrong("the KL of win and loss", "result = w * sympy.log(2 * w) + (1 - w) * sympy.log(2 * (1 - w))", "Between two coins, one for win and one for loss, this is right. But best-of-n changes also which winning texts appear."),
        Wrong("log n less 1/n", "(n - 1) / n -> 1 / n", "With n = 1 nothing is chosen, so the KL must be 0. What is the average of log F under n F^(n-1), and what stands in front of it?"),
        Wrong("the average of log F loses a factor", "(n - 1) / n -> (n - 1) / n**2", "The density n F^(n-1) has a factor n, and the integral of F^(n-1) log F is -1/n^2. What does their product give?"),
    ),
)  # fmt: skip


def gap_cases(generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    def points(start, *steps):
        """KLs that differ by at least half of each step, in no order, and their rewards."""
        apart = tensor(*steps) * (0.5 + torch.rand(len(steps), generator=generator).double())
        kl = torch.cat([tensor(start), start + apart.cumsum(0)])
        return kl[torch.randperm(len(kl), generator=generator)], 0.7 + 0.3 * normal(len(kl))

    def mixed(*values):
        at = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        return at[torch.randperm(len(at), generator=generator)]

    cases = []
    a, b = (tensor(2.0, 0.0), 0.7 + 0.3 * normal(2)), (tensor(4.0, 1.0), 3.0 + 0.3 * normal(2))
    cases.append((*a, *b, mixed(0.3, 1.2 + 0.6 * torch.rand(1, generator=generator)[0], 3.4)))
    a, b = points(0.0, 2.0, 3.0, 4.0, 5.0), points(0.0, 3.0, 2.0, 4.0)
    high = min(a[0].max(), b[0].max())
    inner = sorted(torch.cat([a[0], b[0]]).tolist())[3]  # a point of one of them
    cases.append((*a, *b, mixed(0.0, high, inner, inner, 0.4 * high, 0.8 * high, high + 1, high + 30)))
    a, b = points(3.0, 4.0, 6.0, 8.0, 4.0), points(0.5, 1.0, 2.0, 3.0, 2.0)
    low, high = a[0].min(), b[0].max()
    cases.append(
        (*a, *b, mixed(low, 0.7 * low + 0.3 * high, 0.2 * low + 0.8 * high, 1.0, 0.1, 40.0))
    )
    apart = (*points(0.0, 1.0, 1.0), *points(6.0, 2.0, 2.0), mixed(0.2, 4.0, 6.5, 9.0))
    cases.append(Edge("no target is left", apart))
    return cases


def gap_truth(kl_a: Tensor, reward_a: Tensor, kl_b: Tensor, reward_b: Tensor, at: Tensor):
    """Plain numbers: a sum over the points of hats, each 1 at its own point and 0 at the others."""

    def along(kl, reward, k):
        points = sorted(zip(kl.tolist(), reward.tolist()))
        if not points[0][0] <= k <= points[-1][0]:
            return None
        total = []
        for i, (here, value) in enumerate(points):
            before = points[i - 1][0] if i > 0 else -math.inf
            after = points[i + 1][0] if i + 1 < len(points) else math.inf
            if k == here:
                total.append(value)
            elif before < k < here:
                total.append(value * (k - before) / (here - before))
            elif here < k < after:
                total.append(value * (after - k) / (after - here))
        return math.fsum(total)

    both = [(k, along(kl_a, reward_a, k), along(kl_b, reward_b, k)) for k in at.tolist()]
    found = [(k, a - b) for k, a, b in both if a is not None and b is not None]
    kept, gaps = zip(*found) if found else ((), ())
    return torch.tensor(kept, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64)


def one_target_at_a_time(kl_a, reward_a, kl_b, reward_b, at):
    def along(points, k):
        for (left, low), (right, high) in zip(points, points[1:]):
            if left <= k <= right:
                return ((right - k) * low + (k - left) * high) / (right - left)

    a, b = (sorted(zip(k.tolist(), r.tolist())) for k, r in ((kl_a, reward_a), (kl_b, reward_b)))
    kept, gaps = [], []
    for k in at.tolist():
        first, second = along(a, k), along(b, k)
        if first is not None and second is not None:
            kept.append(k)
            gaps.append(first - second)
    return torch.tensor(kept, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64)


def gaps_at(kl_a, reward_a, kl_b, reward_b, at):
    def along(kl, reward, k):
        order = kl.argsort()
        kl, reward = kl[order], reward[order]
        right = torch.searchsorted(kl, k).clamp(min=1)
        left = right - 1
        share = (k - kl[left]) / (kl[right] - kl[left])
        return reward[left] + share * (reward[right] - reward[left])

    low = max(kl_a.min(), kl_b.min())
    high = min(kl_a.max(), kl_b.max())
    kept = at[(at >= low) & (at <= high)]
    return kept, along(kl_a, reward_a, kept) - along(kl_b, reward_b, kept)


GAPS = Exercise(
    "12.3", "Two methods at one KL", "implement", difficulty=3, importance=4, minutes=10,
    truth=gap_truth, cases=gap_cases, tolerance=1e-9,
    right=(gaps_at, one_target_at_a_time,),
    wrong=(
        Wrong("extrapolated", "at[(at >= low) & (at <= high)] -> at | .clamp(min=1) -> .clamp(1, len(kl) - 1)", "Beyond a method's last run nothing was measured, and a line knows nothing of where the reward collapses. Which KLs have both methods reached?"),
        Wrong("the last reward goes on for ever", "at[(at >= low) & (at <= high)] -> at | order = kl.argsort() -> order, k = kl.argsort(), k.clamp(kl.min(), kl.max())", "Beyond a method's last run nothing was measured. Must its reward stay where it was? Which KLs have both methods reached?"),
        Wrong("zero outside the common range", "at[(at >= low) & (at <= high)] -> at | .clamp(min=1) -> .clamp(1, len(kl) - 1) | along(kl_a, reward_a, kept) - along(kl_b, reward_b, kept) -> (along(kl_a, reward_a, kept) - along(kl_b, reward_b, kept)) * ((at >= low) & (at <= high))",
              "A gap of 0 says that the two are equally good. What do you know where one of them has no runs?"),
        Wrong("not a number outside the common range", "at[(at >= low) & (at <= high)] -> at | .clamp(min=1) -> .clamp(1, len(kl) - 1) | along(kl_a, reward_a, kept) - along(kl_b, reward_b, kept) -> (along(kl_a, reward_a, kept) - along(kl_b, reward_b, kept)).where((at >= low) & (at <= high), math.nan)",
              "Honest, but the task wants such KLs left out of both tensors."),
        Wrong("only A's range counts", "(at >= low) & (at <= high) -> (at >= kl_a.min()) & (at <= kl_a.max()) | order = kl.argsort() -> order, k = kl.argsort(), k.clamp(kl.min(), kl.max())", "To compare, both must have been measured there. What about B's range?"),
        Wrong("only B's range counts", "(at >= low) & (at <= high) -> (at >= kl_b.min()) & (at <= kl_b.max()) | order = kl.argsort() -> order, k = kl.argsort(), k.clamp(kl.min(), kl.max())", "To compare, both must have been measured there. What about A's range?"),
        Wrong("only the upper end is looked at", "(at >= low) & (at <= high) -> at <= high | order = kl.argsort() -> order, k = kl.argsort(), k.clamp(kl.min(), kl.max())", "Not every sweep has a run close to the reference. What of the KLs below a method's first point?"),
        Wrong("either range will do", "max(kl_a.min(), kl_b.min()) -> min(kl_a.min(), kl_b.min()) | min(kl_a.max(), kl_b.max()) -> max(kl_a.max(), kl_b.max()) | order = kl.argsort() -> order, k = kl.argsort(), k.clamp(kl.min(), kl.max())",
              "The common range begins where the later of the two begins. Which of min and max is it?"),
        Wrong("the ends are left out", ">= low -> > low | <= high -> < high", "At the ends of the range one method has a measured point. Is that KL not the best known of all?"),
        Wrong("not sorted by KL", "order = kl.argsort() -> order = torch.arange(len(kl)) | .clamp(min=1) -> .clamp(1, len(kl) - 1)", "The points come in the order of the sweep, which need not be the order of their KLs. Who are a target's neighbours?"),
        Wrong("KLs sorted without their rewards", "reward[order] -> reward", "Every reward belongs to its own KL. How do you bring both into the same order?"),
        Wrong("the best reward so far", "reward[order] -> reward[order].cummax(0).values", "A method whose reward falls again at high KL is shown here without its fall. Use the points as they are."),
        Wrong("the nearest point", "reward[left] + share * (reward[right] - reward[left]) -> torch.where(share < 0.5, reward[left], reward[right])", "The nearest run may have several nats more or less, which is just what an equal KL should rule out. What lies between two points?"),
        Wrong("the point below", "reward[left] + share * (reward[right] - reward[left]) -> torch.where(share < 1, reward[left], reward[right])", "A run with less KL stands for this one, which makes the method look worse than it is. What lies between two points?"),
        Wrong("the point above", "reward[left] + share * (reward[right] - reward[left]) -> torch.where(share > 0, reward[right], reward[left])", "A run with more KL stands for this one. What lies between two points?"),
        Wrong("the middle of the two neighbours", "share * (reward -> 0.5 * (reward", "The nearer neighbour should count more. How far along the way is the target?"),
        Wrong("the weights are swapped", "reward[left] + share * (reward[right] - reward[left]) -> reward[right] + share * (reward[left] - reward[right])", "At the left point your value is the right point's reward. Which weight goes to which?"),
        Wrong("a line from the first point to the last", "kl[order], reward[order] -> kl[order][[0, -1]], reward[order][[0, -1]]", "The points between the ends were measured too. Which two are a target's neighbours?"),
        Wrong("a fitted line", "return reward[left] + share * (reward[right] - reward[left]) -> slope = ((kl - kl.mean()) * (reward - reward.mean())).sum() / (kl - kl.mean()).square().sum(); return reward.mean() + slope * (k - kl.mean())",
              "Reward is not linear in KL: the first nats buy more than the last. Stay between the two neighbours."),
        Wrong("interpolated in the square root of KL", "order = kl.argsort() -> kl, k = kl.sqrt(), k.sqrt(); order = kl.argsort()", "A defensible choice, but not the one asked for: a straight line from point to point in the plot against KL."),
        Wrong("interpolated in the logarithm of KL", "order = kl.argsort() -> kl, k = (kl + 1e-12).log(), (k + 1e-12).log(); order = kl.argsort()", "The reference has KL 0, and its logarithm is infinite. Draw a straight line in the plot against KL."),
        Wrong("KL at equal reward", "order = kl.argsort() -> kl, reward = reward, kl; order = kl.argsort() | .clamp(min=1) -> .clamp(1, len(kl) - 1)", "You looked the target up among the rewards. Which axis is it on?"),
        Wrong("a mask for the KLs", "return kept, -> return (at >= low) & (at <= high),", "The first tensor holds the KLs themselves, those that are left."),
        Wrong("the KLs sorted", "order = result[0].argsort(); result = (result[0][order], result[1][order])", "The targets keep the order in which they were given."),
    ),
)  # fmt: skip


def seeds_cases(generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def runs(seeds, prompts, common, own, ahead):
        """P(positive): what a seed does to both methods (its labels), and to each alone."""
        shared = common * normal(seeds, 1) + normal(1, prompts)
        first = shared + own * normal(seeds, 1) + 0.5 * normal(seeds, prompts)
        second = shared + own * normal(seeds, 1) + 0.5 * normal(seeds, prompts)
        return (first + ahead).sigmoid(), second.sigmoid()

    return [
        runs(2, 3, 0.5, 0.5, 0.5),
        runs(3, 8, 1.5, 0.4, 0.3),
        runs(5, 2, 0.3, 0.6, -0.5),
        runs(4, 12, 1.0, 1.0, -0.2),
        runs(6, 5, 0.2, 0.8, 0.1),
    ]


@cache
def t_quantile(degrees, share=0.95):
    """How many standard errors hold `share` of Student's t: its probability in closed form (a sum
    of powers of a cosine), solved by bisection.
    """

    def inside(t):
        angle = math.atan(t / math.sqrt(degrees))
        cosine, term, total = math.cos(angle), 1.0, 0.0
        if degrees % 2:
            term = math.cos(angle)
            for k in range(1, degrees - 1, 2):
                total += term
                term *= cosine**2 * (k + 1) / (k + 2)
            return 2 / math.pi * (angle + math.sin(angle) * total)
        for k in range(0, degrees - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return math.sin(angle) * total

    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < share else (low, middle)
    return low


def seeds_truth(first: Tensor, second: Tensor):
    """The variance by all pairs of seeds, the t quantile by bisection."""
    gaps = [
        math.fsum(a - b for a, b in zip(x, y)) / len(x)
        for x, y in zip(first.tolist(), second.tolist())
    ]
    n = len(gaps)
    mean = math.fsum(gaps) / n
    variance = math.fsum((a - b) ** 2 for a, b in combinations(gaps, 2)) / (n * (n - 1))
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def rounded_table(a, b):
    d = (a - b).mean(1).numpy()
    half = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706}[len(d) - 1]
    half = half * d.std(ddof=1) / len(d) ** 0.5
    return tuple(float(x) for x in (d.mean(), d.mean() - half, d.mean() + half))


def by_sums(a, b):
    d = a.mean(1) - b.mean(1)
    n = len(d)
    error = ((d.square().sum() - d.sum() ** 2 / n) / (n * (n - 1))).sqrt()
    return d.mean(), d.mean() - t_quantile(n - 1) * error, d.mean() + t_quantile(n - 1) * error


T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469}


def gap_over_seeds(first, second):
    gaps = (first - second).mean(1)
    n = len(gaps)
    mean = gaps.mean().item()
    half = T[n - 1] * gaps.std().item() / math.sqrt(n)
    return mean, mean - half, mean + half


SEEDS = Exercise(
    "12.4", "A gap over three seeds", "implement", difficulty=2, importance=5, minutes=7,
    truth=seeds_truth, cases=seeds_cases, tolerance=3e-5,
    right=(gap_over_seeds, rounded_table, by_sums,),
    wrong=(
        Wrong("every text is counted", ".mean(1) -> .flatten() | T[n - 1] -> 1.96", "All texts of one run come from one training: if its seed was lucky, they all were. How many trainings have you seen?"),
        Wrong("every text is counted, with 4.3027", ".mean(1) -> .flatten() | T[n - 1] -> 4.3027", "All texts of one run come from one training: if its seed was lucky, they all were. How many trainings have you seen?"),
        Wrong("prompts are counted, not seeds", ".mean(1) -> .mean(0) | T[n - 1] -> 1.96", "That is the interval of notebook 09, for other prompts and these very runs. The claim here is about what another training would give."),
        Wrong("prompts are counted, not seeds, with 4.3027", ".mean(1) -> .mean(0) | T[n - 1] -> 4.3027", "The mean over seeds comes first and hides them: what is left is the scatter of prompts. What would another training give?"),
        Wrong("1.96, as if there were many seeds", "T[n - 1] -> 1.96", "From a few seeds the standard deviation itself is badly known, and 1.96 does not know that. What is the table for?"),
        Wrong("the table's row n", "T[n - 1] -> T[n]", "One degree of freedom is spent on the mean. How many are left of n?"),
        Wrong("the table's row for three seeds, always", "T[n - 1] -> 4.3027", "4.3027 is right for three seeds. The number of seeds is the number of rows: it may be another."),
        Wrong("90%, not 95%", "T[n - 1] -> t_quantile(n - 1, 0.9)", "This leaves five in a hundred out on each side. How many should be left out in all?"),
        Wrong("unpaired", "gaps.std().item() -> (first.mean(1).var() + second.mean(1).var()).sqrt().item() | T[n - 1] -> t_quantile(2 * n - 2)", "Both runs of a seed had the same labelled completions; what these did to both must drop out. Of what is the standard deviation?"),
        Wrong("unpaired, with the t of one method", "gaps.std().item() -> (first.mean(1).var() + second.mean(1).var()).sqrt().item()", "Both runs of a seed had the same labelled completions; what these did to both must drop out. Of what is the standard deviation?"),
        Wrong("the ends of two intervals subtracted", "gaps.std().item() -> (first.mean(1).std() - second.mean(1).std()).item()", "Intervals do not subtract end by end. Take the difference seed by seed first."),
        Wrong("the worst case of two intervals", "gaps.std().item() -> (first.mean(1).std() + second.mean(1).std()).item()", "Both methods unlucky in opposite directions is rare, so this is too wide. Take the difference seed by seed first."),
        Wrong("divided by n in the variance", "gaps.std() -> gaps.std(correction=0)", "With few seeds this matters much: their deviations are taken from their own mean. By what does a sample's variance divide?"),
        Wrong("the standard deviation, not the standard error", "/ math.sqrt(n) -> ", "This says where one more seed would probably lie. How sure is the mean of n of them?"),
        Wrong("divided by n, not its root", "math.sqrt(n) -> n", "A mean's standard error falls with the square root of what was counted."),
        Wrong("divided by the root of n - 1", "math.sqrt(n) -> math.sqrt(n - 1)", "The variance has divided by n - 1 already. A mean's standard error then divides by the root of what?"),
        Wrong("one standard error", "T[n - 1] * -> ", "One standard error either way is not 95%, and least of all with few seeds. What is the table for?"),
        Wrong("half as wide", "T[n - 1] -> T[n - 1] / 2", "The table's number of standard errors is for each side, not for both together."),
        Wrong("twice as wide", "T[n - 1] -> 2 * T[n - 1]", "The table's number of standard errors is for each side: no further factor of 2."),
        Wrong("from the worst seed to the best", "mean - half, mean + half -> gaps.min().item(), gaps.max().item()", "Three seeds' range leaves their true mean out one time in four. Use the standard error and the table."),
        Wrong("the median seed", "return mean, -> return gaps.median().item(),", "The interval is about the mean of the seeds, so the mean belongs in its middle."),
        Wrong("the best seed", "mean = gaps.mean().item() -> mean = gaps.max().item()", "Whoever picks the best of several seeds measures luck, and more of it with every seed."),
        Wrong("absolute gaps", ".mean(1) -> .mean(1).abs()", "A seed in which the first method was worse counts against it."),
        Wrong("the relative gap", "(first - second).mean(1) -> first.mean(1) / second.mean(1) - 1", "The gap is a plain difference of two means."),
        Wrong("half of the width, not the ends", "mean - half, mean + half -> half, half", "The second and third number are the ends of the interval, not its distance from the mean."),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A method as it was run; one label is one completion whose true reward was asked for."""

    offline: tuple[int, int] | None = None  # prompts, completions of each, labelled once before
    trained: int = 0  # completions of each prompt that go through the policy's backward pass
    epochs: int = 1
    rounds: tuple[int, int, int] | None = None  # rounds, prompts of each, completions of each
    steps: tuple[int, int] | None = None  # of policy gradients, completions of each
    true_reward: bool = True  # asked while it trains
    kl: float = 5.0
    seeds: int = 3
    reported: str = "true reward"


def spent(plan: Plan) -> tuple[int, int]:
    """Labels and completions in backward passes, by going through the run and counting."""
    labels = passes = 0
    if plan.offline:
        prompts, completions = plan.offline
        for _ in range(prompts):
            labels += completions
        for _ in range(plan.epochs if not plan.steps else 0):
            for _ in range(prompts):
                passes += plan.trained
    if plan.rounds:
        rounds, prompts, completions = plan.rounds
        for _ in range(rounds):
            for _ in range(prompts):
                labels += completions
                passes += plan.trained
    if plan.steps:
        steps, completions = plan.steps
        for _ in range(steps):
            labels += completions if plan.true_reward else 0
            for _ in range(plan.epochs):
                passes += completions
    return labels, passes


DPO = Plan(offline=(600, 4), trained=4)
REPORTS = {
    "Report 1": Plan(steps=(75, 32), kl=5.2),
    "Report 2": Plan(rounds=(5, 240, 16), trained=2, kl=4.9),
    "Report 3": Plan(offline=(600, 4), trained=1, epochs=4, kl=5.3),
    "Report 4": Plan(offline=(600, 4), steps=(75, 32), true_reward=False, kl=5.1,
                     reported="reward model"),
    "Report 5": Plan(steps=(75, 32), epochs=4, kl=4.8),
    "Report 6": Plan(offline=(600, 4), steps=(150, 16), true_reward=False, kl=9.6),
    "Report 7": Plan(rounds=(5, 120, 4), trained=4, kl=5.1, seeds=1),
}  # fmt: skip


def fairness_truth():
    """Counted: every run is gone through, and compared with DPO's."""

    def near(a, b):
        return abs(a - b) <= 0.1 * max(a, b)

    def flaw(plan):
        ours, theirs = spent(DPO), spent(plan)
        flaws = [
            name
            for name, fine in (
                ("labels", near(ours[0], theirs[0])),
                ("passes", near(ours[1], theirs[1])),
                ("KL", abs(DPO.kl - plan.kl) <= 0.5),
                ("seeds", plan.seeds >= 3),
                ("judge", plan.reported == DPO.reported),
            )
            if not fine
        ]
        assert len(flaws) <= 1
        return flaws[0] if flaws else "fair"

    assert spent(DPO) == (2400, 2400) and spent(replace(DPO, epochs=2)) == (2400, 4800)
    return {name: flaw(plan) for name, plan in REPORTS.items()}


FAIRNESS = Exercise(
    "12.5", "Seven comparisons, fair or not", "diagnose", difficulty=2, importance=4, minutes=7,
    truth=fairness_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a completion is counted once for each of its pairs", {"Report 1": "passes"}, "In DPO's run each completion goes through the backward pass once, whatever the number of its pairs. How many are 600 times 4?"),
        Wrong("pairs are counted, not completions", {"Report 1": "labels"}, "Six pairs of a prompt are made of how many completions? So many were judged, and in PPO's run the steps times the completions of one."),
        Wrong("only what is trained on is counted as labelled", {"Report 2": "fair"}, "To find the best and the worst of sixteen, how many must be judged?"),
        Wrong("labels are taken for passes", {"Report 2": "passes"}, "Two of sixteen completions are trained on: multiply out. What was spent more, then?"),
        Wrong("labels that are not trained on do not count", {"Report 3": "labels"}, "The best of four is known only when all four are judged. How many labels is that?"),
        Wrong("epochs are forgotten", {"Report 3": "passes"}, "600 completions, but how often does each go through the backward pass?"),
        Wrong("a learned reward is the same as the true one", {"Report 4": "fair"}, "Which number is reported for PPO, and which did PPO climb? What would DPO have got by the same judge?"),
        Wrong("a learned reward needs labels at every step", {"Report 4": "labels"}, "The reward model answers without asking for a true reward. Which labels was it fitted to?"),
        Wrong("four epochs cost nothing", {"Report 5": "fair"}, "The completions of a rollout are judged once, but trained on how often?"),
        Wrong("four epochs need new labels", {"Report 5": "labels"}, "Going over a rollout again asks for no new reward. What does it ask for?"),
        Wrong("the budget is all that counts", {"Report 6": "fair"}, "Labels and passes agree. But who bought how many nats?"),
        Wrong("labels of a reward model", {"Report 6": "labels"}, "The reward model answers without asking for a true reward. Multiply out labels and passes, then read on to the next column."),
        Wrong("one run is enough", {"Report 7": "fair"}, "The interval over prompts speaks of one training. What would a second one have given?"),
        Wrong("online means more labels", {"Report 7": "labels"}, "Multiply rounds, prompts and completions. How many labels does DPO have?"),
    ),
)  # fmt: skip

EXERCISES = (TANGENT, WIN_RATE_COST, GAPS, SEEDS, FAIRNESS)
