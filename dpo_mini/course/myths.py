"""What the myth lab computes more than once: noisy comparisons in a world that can be listed, and
stored runs that are near each other in KL.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dpo_mini import exact
from dpo_mini.course.frontier import over_seeds
from dpo_mini.evaluation import Estimate


def comparison_counts(rewards: Tensor, n: int, turned: float, generator: torch.Generator) -> Tensor:
    """How often i beat j among `n` comparisons of two different completions, [Y, Y], float64.

    All different pairs are equally likely. The winner is drawn as Bradley and Terry (1952) say, and
    then the label is turned round with probability `turned`.
    """
    size = len(rewards)
    upper = torch.triu_indices(size, size, offset=1)
    pair = torch.randint(upper.shape[1], (n,), generator=generator)
    i, j = upper[:, pair]
    wins = exact.preferences(rewards)[i, j]
    wins = (1 - turned) * wins + turned * (1 - wins)
    i_won = torch.rand(n, generator=generator, dtype=torch.float64) < wins
    flat = torch.where(i_won, i * size + j, j * size + i)
    return torch.bincount(flat, minlength=size * size).view(size, size).double()


def fitted_rewards(
    counts: Tensor, turned: float = 0.0, features: Tensor | None = None, steps: int = 40
) -> Tensor:
    """The rewards [Y], mean 0, under which the `counts` are most likely: Newton's method.

    P(i beats j) = (1 - turned) sigmoid(r_i - r_j) + turned sigmoid(r_j - r_i); with `turned` 0 this
    is Bradley-Terry. `features` [Y, k]: only rewards that are linear in them, else any. A ridge of
    1e-3 keeps the reward finite of a completion that never lost, and is lost beside the counts of
    all others. The steps use the expected information in the place of the Hessian, which is never
    negative, and no step is longer than 2.
    """
    size = len(counts)
    design = torch.eye(size, dtype=counts.dtype) if features is None else features
    weights = counts.new_zeros(design.shape[1])
    shown = counts + counts.T
    for _ in range(steps):
        rewards = design @ weights
        p = exact.preferences(rewards)
        q = (1 - 2 * turned) * p + turned
        slope = (1 - 2 * turned) * p * (1 - p)  # dq / d(r_i - r_j)
        score = (counts / q * slope).sum(1) - (counts.T / (1 - q) * slope).sum(1)
        information = shown * slope**2 / (q * (1 - q))
        laplacian = torch.diag(information.sum(1)) - information
        matrix = design.T @ laplacian @ design + 1e-3 * torch.eye(len(weights), dtype=p.dtype)
        step = torch.linalg.solve(matrix, design.T @ score - 1e-3 * weights)
        longest = step.abs().max().item()
        weights = weights + step * min(1.0, 2.0 / max(longest, 2.0))
        if longest < 1e-8:
            break
    rewards = design @ weights
    return rewards - rewards.mean()


def policy_at(kl: float, reference: Tensor, rewards: Tensor) -> Tensor:
    """log pi_ref exp(r / beta) / Z, [Y], with the beta that makes its KL from pi_ref equal to `kl`
    (found by bisection; the KL falls as beta rises).
    """
    low, high = 1e-3, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        beyond = exact.kl(exact.optimal_policy(reference, rewards, middle), reference) > kl
        low, high = (middle, high) if beyond else (low, middle)
    return exact.optimal_policy(reference, rewards, high)


def below_frontier(logps: Tensor, reference: Tensor, rewards: Tensor) -> float:
    """How much expected reward the policy lacks beside the best policy of its own KL, 0 or more."""
    best = policy_at(exact.kl(logps, reference), reference, rewards)
    return (exact.expectation(best, rewards) - exact.expectation(logps, rewards)).item()


def interval(values: Sequence[float]) -> Estimate:
    """The mean with its 95% interval over independent repetitions, 20 or more: normal."""
    values = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return Estimate(values.mean().item(), values.mean().item() - half, values.mean().item() + half)


def with_bars(estimates: Iterable[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Means, and the lengths of their error bars below and above, as matplotlib takes them."""
    estimates = list(estimates)
    bars = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    return [e.mean for e in estimates], bars


def near_differences(
    runs: Sequence[dict], rival: str, number: str = "reward_policy", factor: float = 1.2
) -> list[tuple[float, float, Estimate]]:
    """For each setting of `rival`: its mean KL, that of DPO's nearest setting, and its `number`
    minus DPO's of the same seed, with the interval over seeds.

    Only where the two mean KLs are within `factor`: no lines are drawn between runs.
    """

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    def settings(method):
        found: dict[float, dict[int, tuple[float, float]]] = {}
        for run in runs:
            if run["setting"]["method"] == method:
                report = run["report"]
                place = report["kl"]["mean"], report[number]["mean"]
                found.setdefault(run["setting"]["value"], {})[run["setting"]["seed"]] = place
        return [(mean(kl for kl, _ in seeds.values()), seeds) for seeds in found.values()]

    rows = []
    for kl, seeds in sorted(settings(rival), key=lambda one: one[0]):
        near, theirs = min(settings("dpo"), key=lambda one: abs(math.log(one[0] / kl)))
        if max(near / kl, kl / near) <= factor:
            gaps = [seeds[seed][1] - theirs[seed][1] for seed in sorted(seeds.keys() & theirs)]
            rows.append((kl, near, over_seeds(gaps)))
    return rows


def decided(difference: Estimate) -> str:
    """What an interval says of the sign of a difference."""
    if difference.low > 0:
        return "above"
    return "below" if difference.high < 0 else "not decided"


def inner_products(logps: Callable[[Tensor], Tensor], parameters: Tensor) -> Tensor:
    """<grad log pi(y), grad log pi(y')> of all completions, [Y, Y]; `logps` maps the parameters
    (one tensor) to log pi [Y].
    """
    jacobian = torch.autograd.functional.jacobian(logps, parameters).flatten(1)
    return jacobian @ jacobian.T
