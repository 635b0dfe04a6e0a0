"""16 Cures: what pays for length, DPO-Positive, rankings, a token's credit, and what shaping is."""

import functools

import sympy
import torch
from torch.nn.functional import logsigmoid, relu, softplus

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.family import RankingLogps, plackett_luce_loss


def length_cases(generator):
    return [sympy.symbols("d n a alpha beta", positive=True)]


def length_truth(d, n, a, alpha, beta):
    """By the likelihood's own condition: P of the label is sigmoid(beta Delta + alpha n)."""
    margin = sympy.Symbol("margin")
    label, model = d + a * n, beta * margin + alpha * n
    return sympy.solve(sympy.Eq(label, model), margin)[0]


def margin_with_length(d, n, a, alpha, beta):
    return (d + (a - alpha) * n) / beta


LENGTH = Exercise(
    "16.1", "What length explains", "derive", difficulty=2, importance=4, minutes=7,
    truth=length_truth, cases=length_cases,
    right=(
        margin_with_length,
        lambda d, n, a, alpha, beta: d / beta + a * n / beta - alpha * n / beta,
        lambda d, n, a, alpha, beta: ((d + a * n) - alpha * n) / beta,
    ),
    wrong=(
        Wrong("DPO's margin", "(a - alpha) -> a", "That is the margin without the correction. The loss adds alpha n inside the sigmoid: beta times the margin has so much less to explain."),
        Wrong("the correction added", "(a - alpha) -> (a + alpha)", "Put alpha = a in: then length must have no effect on the margin."),
        Wrong("labels that do not pay for length", "(a - alpha) -> (-alpha)", "The labels come from r + a |y|, so their logit is d + a n."),
        Wrong("a correction that is always right", "(a - alpha) * n -> 0 * n", "Only alpha = a takes the whole temptation away. What is left when they differ?"),
        Wrong("length outside of beta", lambda d, n, a, alpha, beta: d / beta + (a - alpha) * n, "Solve beta Delta + alpha n = d + a n for Delta: everything is divided by beta."),
        Wrong("multiplied by beta", "/ beta -> * beta", "The margin is in nats, the rewards in logits: a larger beta asks for fewer nats."),
        Wrong("beta forgotten", "/ beta -> / 1", "The sigmoid is taken of beta times the margin."),
    ),
)  # fmt: skip


def positive_cases(generator):
    def drawn(n, scale=4.0):
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    def case(n, beta, alpha, shift=0.0):
        reference = -40 + drawn(n), -40 + drawn(n)
        policy = reference[0] + drawn(n) + shift, reference[1] + drawn(n)
        return (*[p.clone().requires_grad_() for p in policy], *reference, beta, alpha)

    both = case(8, 0.3, 2.0)
    far = torch.tensor([-9e3, -10.0, -20.0], dtype=torch.float64).requires_grad_()
    near = torch.tensor([-10.0, -9e3, -30.0], dtype=torch.float64)
    return [
        both,
        case(5, 0.1, 5.0),
        Edge("every chosen one is below the reference", case(4, 0.2, 3.0, shift=-20.0)),
        Edge("every chosen one is above the reference", case(4, 0.2, 3.0, shift=20.0)),
        (far, near.clone().requires_grad_(), near, far.detach().clone(), 1.0, 2.0),
    ]


def positive_truth(chosen, rejected, reference_chosen, reference_rejected, beta, alpha):
    lost = torch.minimum(chosen - reference_chosen, torch.zeros_like(chosen))
    margin = chosen - reference_chosen - rejected + reference_rejected + alpha * lost
    return softplus(-beta * margin, threshold=500)


def dpo_positive(chosen, rejected, reference_chosen, reference_rejected, beta, alpha):
    u_w, u_l = chosen - reference_chosen, rejected - reference_rejected
    penalty = torch.nn.functional.relu(-u_w)
    return -torch.nn.functional.logsigmoid(beta * (u_w - u_l - alpha * penalty))


POSITIVE = Exercise(
    "16.2", "DPO-Positive", "implement", difficulty=2, importance=4, minutes=7,
    truth=positive_truth, cases=positive_cases,
    right=(dpo_positive, lambda w, l, rw, rl, b, a: -logsigmoid(b * (w - rw - l + rl) - a * relu(b * (rw - w)))),
    wrong=(
        Wrong("plain DPO", " - alpha * penalty -> ", "This is DPO's loss: it does not ask where the chosen completion has gone."),
        Wrong("the penalty is on what rises", "relu(-u_w) -> relu(u_w)", "The penalty is max(0, log pi_ref - log pi): when is that above 0?"),
        Wrong("the penalty has no corner", "torch.nn.functional.relu(-u_w) -> -u_w", "A chosen completion above the reference must be left alone: which function is 0 there?"),
        Wrong("the rejected one is kept up", "relu(-u_w) -> relu(-u_l)", "Which of the two completions is to stay as likely as it was?"),
        Wrong("a fall is rewarded", "- alpha * penalty -> + alpha * penalty", "A fall of the chosen completion must make the loss larger: should the penalty take from the margin, or give to it?"),
        Wrong("the penalty is outside the sigmoid", "(beta * (u_w - u_l - alpha * penalty)) -> (beta * (u_w - u_l)) + alpha * penalty", "It stands inside: it takes from the margin."),
        Wrong("the penalty is outside beta", "u_w - u_l - alpha * penalty) -> u_w - u_l) - alpha * penalty", "beta multiplies the penalty as well as the margin."),
        Wrong("alpha is left out", "alpha * penalty -> penalty", "alpha says how much a nat of the chosen completion's fall weighs."),
        Wrong("the logarithm of a sigmoid that rounds to 0", lambda w, l, rw, rl, b, a: -torch.log(torch.sigmoid(b * (w - rw - l + rl - a * relu(rw - w)))), "Far below 0 the sigmoid rounds to 0 and its logarithm is infinite. torch has both in one function."),
        Wrong("the penalty carries no gradient", "relu(-u_w) -> relu(-u_w).detach()", "The value is right. But what should pull the chosen completion back up?"),
        Wrong("no reference", "chosen - reference_chosen, rejected - reference_rejected -> chosen, rejected", "Every log-probability is below 0; below the reference is another matter."),
        Wrong("the sign of the loss", "return -torch -> return torch", "A loss is minus the log-probability of the label."),
    ),
)  # fmt: skip


def ranking_cases(generator):
    def drawn(n, k, scale=5.0):
        return scale * torch.randn(n, k, generator=generator, dtype=torch.float64) - 30

    def case(n, k, beta):
        return drawn(n, k).requires_grad_(), drawn(n, k), beta

    far = torch.tensor([[-9e3, -10.0, -5e3], [-10.0, -9e3, -8e3]], dtype=torch.float64)
    return [
        case(2, 3, 0.5), case(4, 4, 0.2),
        Edge("there are only two in a ranking", case(3, 2, 0.3)),
        Edge("a completion is thousands of nats off", (far.requires_grad_(), drawn(2, 3), 1.0)),
    ]  # fmt: skip


def ranking_truth(policy, reference, beta):
    """Place by place, each sum by logsumexp."""
    rewards = beta * (policy - reference)
    places = [rewards[:, i:].logsumexp(1) - rewards[:, i] for i in range(rewards.shape[1] - 1)]
    return torch.stack(places).sum(0)


def ranking_loss(policy, reference, beta):
    rewards = beta * (policy - reference)
    loss = 0
    for place in range(rewards.shape[1]):
        left = rewards[:, place:]
        loss = loss - left.log_softmax(1)[:, 0]
    return loss


RANKING = Exercise(
    "16.3", "DPO on rankings", "implement", difficulty=3, importance=4, minutes=10,
    truth=ranking_truth, cases=ranking_cases,
    right=(ranking_loss, lambda p, q, beta: plackett_luce_loss(RankingLogps(p, q), beta)),
    wrong=(
        Wrong("the worst is drawn first", "left = rewards[:, place:] -> left = rewards.flip(1)[:, place:]", "The first column is the best: it is drawn first, from all k."),
        Wrong("what was drawn stays in the urn", "left.log_softmax(1)[:, 0] -> rewards.log_softmax(1)[:, place]", "The second is drawn from those that are left: whose odds still stand below the fraction?"),
        Wrong("the first place alone", "range(rewards.shape[1]) -> range(1)", "That is the chance of the best. The order of the others is a part of the label too."),
        Wrong("the last two are not compared", "range(rewards.shape[1]) -> range(rewards.shape[1] - 2)", "Which is the last place where there is still a choice?"),
        Wrong("an exponential that overflows", "left.log_softmax(1)[:, 0] -> (left[:, 0].exp() / left.exp().sum(1)).log()", "exp of a thousand is infinite, of minus a thousand 0. Stay in logarithms: torch has log_softmax and logsumexp."),
        Wrong("no reference", "(policy - reference) -> policy", "The odds are those of the implicit rewards, which compare with the reference."),
        Wrong("beta is left out", "beta * (policy -> (policy", "A reward is beta times a log-ratio."),
        Wrong("the sign of the loss", "loss = loss - left -> loss = loss + left", "A loss is minus the log-probability of what was seen."),
        Wrong("a mean over places", "return loss -> return loss / rewards.shape[1]", "The probability of the ranking is a product over places: its logarithm is a sum."),
        Wrong("all pairs", lambda p, q, beta: sum(-logsigmoid(beta * (p - q)[:, i] - beta * (p - q)[:, j]) for i in range(p.shape[1]) for j in range(i + 1, p.shape[1])), "That is DPO on all pairs of the ranking, as if they were independent answers. One ranking is one answer: draw place after place."),
        Wrong("neighbours alone", lambda p, q, beta: sum(-logsigmoid(beta * (p - q)[:, i] - beta * (p - q)[:, i + 1]) for i in range(p.shape[1] - 1)), "Each place competes with all that come after it, not with its neighbour alone."),
        Wrong("no gradient", "return loss -> return loss.detach()", "The value is right; what shall move the policy?"),
    ),
)  # fmt: skip


RESPONSES = tuple(exact.completions(3, 3))


def credit_cases(generator):
    def case(beta, world, least):
        """A world in any order, and a completion of `least` tokens or more."""
        responses = exact.completions(*world)
        order = torch.randperm(len(responses), generator=generator).tolist()
        responses = [responses[i] for i in order]

        def drawn():
            return torch.randn(len(responses), generator=generator, dtype=torch.float64)

        completion = next(y for y in responses if len(y) >= least)
        return (1.5 * drawn()).log_softmax(0), 2 * drawn(), beta, responses, completion

    one_token = case(0.5, (3, 3), 1)
    return [
        case(0.7, (3, 2), 2), case(0.2, (3, 3), 3), case(2.0, (2, 4), 4),
        Edge("the completion is one token", (*one_token[:4], (0,))),
    ]  # fmt: skip


def credit_truth(reference, rewards, beta, responses, completion):
    """From the optimum: beta log pi*/pi_ref of each token, chances of prefixes by summing."""
    optimum = exact.optimal_policy(reference, rewards, beta)

    def chance(logps, t):
        begin = [y[:t] == completion[:t] for y in responses]
        return logps[torch.tensor(begin)].logsumexp(0)

    ratios = [chance(optimum, t) - chance(reference, t) for t in range(len(completion) + 1)]
    return beta * torch.stack(ratios).diff()


def token_credits(reference, rewards, beta, responses, completion):
    values = []
    for t in range(len(completion) + 1):
        inside = torch.tensor([y[:t] == completion[:t] for y in responses])
        total = (reference[inside] + rewards[inside] / beta).logsumexp(0)
        values.append(beta * (total - reference[inside].logsumexp(0)))
    return torch.stack(values).diff()


CREDIT = Exercise(
    "16.4", "A token's credit", "implement", difficulty=4, importance=4, minutes=12,
    truth=credit_truth, cases=credit_cases,
    right=(
        token_credits,
        lambda q, r, beta, ys, y: torch.stack([
            (v := exact.prefix_values(q, r, beta, ys))[y[: t + 1]] - v[y[:t]] for t in range(len(y))
        ]),
    ),
    wrong=(
        Wrong("values, not credits", "torch.stack(values).diff() -> torch.stack(values)[1:]", "These are the values of the prefixes. A token's credit is what it changes: value after it minus value before it."),
        Wrong("the mean reward", "values.append(beta * (total - reference[inside].logsumexp(0))) -> values.append((reference[inside].softmax(0) * rewards[inside]).sum())", "That is the reward to be expected when the reference goes on. The optimal policy goes on: what stands for it is beta log E exp(r / beta)."),
        Wrong("chances that do not add to 1", " - reference[inside].logsumexp(0) -> ", "The mean is over completions that begin with this prefix: divide by the chance of the prefix."),
        Wrong("no beta before the logarithm", "beta * (total -> (total", "Without beta this is a log-ratio, in nats. The credit is in the unit of the reward."),
        Wrong("rewards not divided by beta", "rewards[inside] / beta -> rewards[inside]", "The weight of a completion under the optimum is exp(r / beta)."),
        Wrong("rewards multiplied by beta", "rewards[inside] / beta -> rewards[inside] * beta", "The weight of a completion under the optimum is exp(r / beta)."),
        Wrong("the best that can follow", "values.append(beta * (total - reference[inside].logsumexp(0))) -> values.append(rewards[inside].max())", "That is the value when deviation costs nothing (beta towards 0). Here a nat costs beta."),
        Wrong("before minus after", "torch.stack(values).diff() -> -torch.stack(values).diff()", "A token that leads to something better has credit above 0."),
        Wrong("every completion counts for every prefix", "y[:t] == completion[:t] -> True", "After two tokens only completions that begin with these two can still be written."),
        Wrong("the whole reward on the last token", lambda q, r, beta, ys, y: torch.tensor([0.0] * (len(y) - 1) + [r[ys.index(y)].item()], dtype=torch.float64), "That is where the reward is paid. The credit of a token is what it changes in the value."),
    ),
)  # fmt: skip


CHANGES = (
    "a bonus for every token", "a bonus for every completion", "all of it moved to the last token",
    "a potential", "a potential that stays at the end", "twice the reward",
)  # fmt: skip


@functools.cache
def shaping_truth():
    """Computed in a world of all completions: is the optimum after the change the same?"""
    generator = torch.Generator().manual_seed(0)

    def drawn(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    prefixes = exact.prefixes(list(RESPONSES))
    reference = drawn(len(RESPONSES)).log_softmax(0)
    token = {(*p, a): x for p in prefixes for a, x in zip(range(3), drawn(3).tolist())}
    potential = dict(zip([*prefixes, *RESPONSES], drawn(len(prefixes) + len(RESPONSES)).tolist()))

    def shaped(phi_at_end):
        def change(before, after, reward):
            phi = potential[after] if phi_at_end or after in prefixes else 0.0
            return reward + phi - potential[before]

        return change

    steps = {
        "a bonus for every token": lambda before, after, reward: reward + 0.3,
        "a potential": shaped(False),
        "a potential that stays at the end": shaped(True),
        "twice the reward": lambda before, after, reward: 2 * reward,
    }

    def returns(step=lambda before, after, reward: reward):
        parts = [
            [step(y[:t], y[: t + 1], token[y[: t + 1]]) for t in range(len(y))] for y in RESPONSES
        ]
        return torch.tensor([sum(part) for part in parts], dtype=torch.float64)

    plain = returns()
    changed = {name: returns(step) for name, step in steps.items()}
    changed["a bonus for every completion"] = plain + 0.3
    changed["all of it moved to the last token"] = plain.clone()
    best = exact.optimal_policy(reference, plain, 0.5)
    return {
        name: bool((exact.optimal_policy(reference, changed[name], 0.5) - best).abs().max() < 1e-9)
        for name in CHANGES
    }


SHAPING = Exercise(
    "16.5", "What leaves the optimum alone", "predict", difficulty=3, importance=4, minutes=6,
    truth=lambda: dict(shaping_truth()), cases=lambda generator: [()],
    wrong=(
        Wrong("a token's bonus taken for harmless", {"a bonus for every token": True}, "Completions have different numbers of tokens: what does a long one earn more?"),
        Wrong("a completion's bonus taken for a change", {"a bonus for every completion": False}, "All completions gain the same, and Z grows by just that factor (notebook 03)."),
        Wrong("the place of the reward taken for a part of it", {"all of it moved to the last token": False}, "The objective reads the reward of the whole completion. Has any of these sums changed?"),
        Wrong("a potential taken for a change", {"a potential": False}, "Write the sum over a completion's tokens: what is left of the potentials, all but one?"),
        Wrong("the end of the potential overlooked", {"a potential that stays at the end": True}, "The sum leaves the potential of the end minus that of the beginning. Is the end the same for all completions?"),
        Wrong("a scale taken for harmless", {"twice the reward": True}, "The optimum is pi_ref exp(r / beta) / Z: doubling r is halving beta."),
    ),
)  # fmt: skip

EXERCISES = (LENGTH, POSITIVE, RANKING, CREDIT, SHAPING)
