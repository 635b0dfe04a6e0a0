"""Worlds small enough to enumerate: every completion listed, every sum exact, in float64.

A policy is the vector of log pi(y | x) over all completions y of one prompt x, tensor [Y]. Where it
came from does not matter: a table of logits (`table_logps`), or any causal language model of a tiny
vocabulary (`sequence_logps` of `completions`). A reward is a tensor [Y] as well.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mini.losses import PairLogps


def completions(vocabulary: int, max_length: int, eos: int = 0) -> list[tuple[int, ...]]:
    """Every completion over the tokens 0..vocabulary-1: those that end with `eos`, each once, and
    those that the limit of `max_length` tokens cuts. Their probabilities sum to 1 in any model.
    """
    words = [token for token in range(vocabulary) if token != eos]
    ended = [(*body, eos) for n in range(max_length) for body in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=max_length))


def prefixes(responses: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Everything after which a next token is drawn, shortest first: () is the prompt alone."""
    return sorted({y[:t] for y in responses for t in range(len(y))}, key=lambda p: (len(p), p))


def table_logps(logits: Tensor, responses: list[tuple[int, ...]]) -> Tensor:
    """log pi(y) [Y] of an autoregressive policy: one row of next-token logits for each prefix.

    `logits` [prefixes, vocabulary], rows in the order of `prefixes(responses)`. By the chain rule,
    log pi(y) = sum over t of log pi(y_t | y_<t).
    """
    row = {prefix: i for i, prefix in enumerate(prefixes(responses))}
    steps = [(i, row[y[:t]], y[t]) for i, y in enumerate(responses) for t in range(len(y))]
    response, prefix, token = torch.tensor(steps).unbind(1)
    logps = logits.log_softmax(-1)[prefix, token]
    return logps.new_zeros(len(responses)).index_add(0, response, logps)


def next_token_logps(logps: Tensor, responses: list[tuple[int, ...]]) -> Tensor:
    """The inverse of `table_logps`: log pi(token | prefix) [prefixes, vocabulary] of a policy that
    is given as log pi(y) [Y]. Rows in the order of `prefixes(responses)`.

    P(token | prefix) is the probability of all that begins with prefix and token, over that of all
    that begins with the prefix.
    """
    rows, tokens = prefixes(responses), range(max(map(max, responses)) + 1)
    begins = [[[y[: len(p) + 1] == (*p, t) for y in responses] for t in tokens] for p in rows]
    mass = logps.expand(len(rows), len(tokens), -1).masked_fill(~torch.tensor(begins), -torch.inf)
    return mass.logsumexp(-1).log_softmax(-1)


def token_mixture(
    logps: Tensor, reference: Tensor, responses: list[tuple[int, ...]], strength: float
) -> Tensor:
    """log pi(y) [Y] of the policy whose next token comes from log-softmax(reference + strength
    (policy - reference)) after every prefix (Liu et al. 2024, arXiv 2402.02992).

    The same rule for whole completions gives pi* of beta / strength exactly; this one, which can
    be sampled, gives it nearly.
    """
    ours, theirs = (next_token_logps(policy, responses) for policy in (logps, reference))
    return table_logps((1 - strength) * theirs + strength * ours, responses)


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """E_pi[values], a scalar."""
    return (logps.exp() * values).sum()


def kl(logps: Tensor, other: Tensor) -> Tensor:
    """KL(pi || other) = E_pi[log pi - log other], in nats, of whole completions."""
    return (logps.exp() * (logps - other)).sum()


def total_variation(logps: Tensor, other: Tensor) -> Tensor:
    """Half the sum of |pi - other|: how much two policies can differ on any event."""
    return (logps.exp() - other.exp()).abs().sum() / 2


def log_partition(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum over y of pi_ref(y | x) exp(r(x, y) / beta) (Rafailov 2023, eq. 4)."""
    return (reference + rewards / beta).logsumexp(-1)


def optimal_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*(y | x) = log pi_ref(y | x) + r(x, y) / beta - log Z(x) (Rafailov 2023, eq. 4)."""
    return reference + rewards / beta - log_partition(reference, rewards, beta)


def optimal_chi_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi [Y] of the policy that maximises E_pi[r] - beta (KL + half E_pi_ref[(pi/pi_ref)²]).

    The optimum of chi-squared PO (Huang et al. 2024, arXiv 2407.13399): phi(pi / pi_ref) is
    (r - c) / beta with phi(z) = z + log z and the one c for which the probabilities add to 1. Both
    equations are solved by bisection.
    """

    def log_ratios(c: Tensor) -> Tensor:
        """u with exp(u) + u = (r - c) / beta, between bounds that hold it."""
        wanted = (rewards - c) / beta
        low, high = torch.minimum(wanted, -torch.ones_like(wanted)) - 1, wanted.clamp(min=1.0)
        for _ in range(200):
            middle = (low + high) / 2
            above = middle.exp() + middle > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    low, high = rewards.min() - 2 * beta, rewards.max() + 2 * beta  # a ratio of 1 has phi = 1
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (reference + log_ratios(middle)).logsumexp(0) > 0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return reference + log_ratios((low + high) / 2)


def prefix_values(
    reference: Tensor, rewards: Tensor, beta: float, responses: list[tuple[int, ...]]
) -> dict[tuple[int, ...], Tensor]:
    """V(s) = beta log E_pi_ref[exp(r(y) / beta) | y begins with s], of every prefix s and every
    completion, where V(y) = r(y).

    What a prefix is worth to the optimal policy. Its log-ratio for the token a after s is
    (V(s, a) - V(s)) / beta, and V of the empty prefix is beta log Z (Rafailov et al. 2024, "From r
    to Q*", arXiv 2404.12358).
    """
    values = {}
    for prefix in [*prefixes(responses), *responses]:
        inside = torch.tensor([y[: len(prefix)] == prefix for y in responses])
        chance, weighted = reference[inside], reference[inside] + rewards[inside] / beta
        values[prefix] = beta * (weighted.logsumexp(0) - chance.logsumexp(0))
    return values


def objective(logps: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), what RLHF maximises (Rafailov 2023, eq. 3)."""
    return expectation(logps, rewards) - beta * kl(logps, reference)


def preferences(rewards: Tensor) -> Tensor:
    """P(y_i beats y_j) = sigmoid(r_i - r_j), tensor [Y, Y]: Bradley and Terry (1952)."""
    return (rewards[:, None] - rewards[None, :]).sigmoid()


def sample_preferences(
    probabilities: Tensor, n: int, generator: torch.Generator, logps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`n` comparisons of two different completions: (chosen [n], rejected [n]), indices into Y.

    Both are drawn from the policy `logps` (uniform where it is left out); `probabilities` [Y, Y] is
    the chance that the first beats the second.
    """
    weights = torch.ones(len(probabilities)) if logps is None else logps.exp()
    pair_weights = (weights[:, None] * weights[None, :]).fill_diagonal_(0).flatten()
    drawn = torch.multinomial(pair_weights, n, replacement=True, generator=generator)
    i, j = drawn // len(weights), drawn % len(weights)
    i_wins = torch.rand(n, generator=generator, dtype=torch.float64) < probabilities[i, j]
    return torch.where(i_wins, i, j), torch.where(i_wins, j, i)


def rankings(rewards: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every ranking of `k` different completions: (indices [R, k], best first; P [R]).

    Each set of k is shown equally often and ranked as Plackett (1975) and Luce (1959) say: the best
    is drawn with odds exp(r), then the best of those left.
    """
    orders = torch.tensor(list(itertools.permutations(range(len(rewards)), k)))
    ordered = rewards[orders]
    left = ordered.flip(1).logcumsumexp(1).flip(1)
    chances = (ordered - left).sum(1).exp()
    return orders, chances / chances.sum()


def population_loss(
    loss: Callable[[PairLogps], Tensor],
    logps: Tensor,
    reference: Tensor,
    probabilities: Tensor,
    pair_weights: Tensor | None = None,
) -> Tensor:
    """What a preference loss tends to with endless data: its mean over every pair and both answers.

    `loss` as in `losses.py`; `pair_weights` [Y, Y] is how often each pair is shown (all different
    pairs equally often where it is left out). A scalar.
    """
    i, j = (~torch.eye(len(logps), dtype=torch.bool)).nonzero().unbind(1)
    shown = torch.ones_like(probabilities) if pair_weights is None else pair_weights
    shown = (shown + shown.T)[i, j]  # the pair (i, j) in either order, where i then wins
    losses = loss(PairLogps(logps[i], logps[j], reference[i], reference[j]))
    return (shown * probabilities[i, j] * losses).sum() / (shown.sum() / 2)


def best_of_n(reference: Tensor, rewards: Tensor, n: int) -> Tensor:
    """log P [Y] of the best by reward of `n` samples from pi_ref (rewards all different)."""
    order = rewards.argsort()
    below = reference.exp()[order].cumsum(0)  # P(one sample is this one or worse)
    chances = below**n - F.pad(below[:-1], (1, 0)) ** n
    return torch.empty_like(reference).index_copy_(0, order, chances.log())


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int = 2000) -> float:
    """Minimise `loss()` over `parameters` in place, until float64 losses stop improving.

    L-BFGS with a line search; the parameters themselves are then good to about 1e-6. Returns the
    loss that was reached.
    """
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=4 * steps, history_size=50, tolerance_grad=1e-14,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()
