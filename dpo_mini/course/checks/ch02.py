"""02 The objective of RLHF: what it rewards, what it charges for, and the policy that is best."""

import math
import random

import sympy
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def two_answers_cases(generator):
    """The reference's probability is a fraction, the rest are symbols."""
    percents = (torch.randperm(19, generator=generator) + 1).tolist()
    r_a, r_b = sympy.symbols("r_a r_b", real=True)
    beta = sympy.Symbol("beta", positive=True)
    chosen = [p for p in percents if p != 10][:3]  # 1/2 would hide a missing reference
    return [(sympy.Rational(p, 20), r_a, r_b, beta) for p in chosen]


def two_answers_truth(reference_a, r_a, r_b, beta):
    """dJ/dp = r_a - r_b - beta (log-odds of p - log-odds of the reference) is 0; no Z(x) in it."""
    log_odds = sympy.Symbol("log_odds", real=True)
    start = sympy.log(reference_a / (1 - reference_a))
    (best,) = sympy.solve(r_a - r_b - beta * (log_odds - start), log_odds)
    return 1 / (1 + sympy.exp(-best))


def tilted(a, b):
    return a / (a + b)


EXP = sympy.exp
def best_probability(reference_a, r_a, r_b, beta):
    weight_a = reference_a * sympy.exp(r_a / beta)
    weight_b = (1 - reference_a) * sympy.exp(r_b / beta)
    return weight_a / (weight_a + weight_b)


TWO_ANSWERS = Exercise(
    "02.1", "The best policy with two answers", "derive", difficulty=2, importance=5, minutes=7,
    truth=two_answers_truth, cases=two_answers_cases,
    right=(
        best_probability,
        lambda q, a, b, beta: 1 / (1 + (1 - q) / q * EXP((b - a) / beta)),
        lambda q, a, b, beta: (1 + sympy.tanh((sympy.log(q) - sympy.log(1 - q) + (a - b) / beta) / 2)) / 2,
        lambda q, a, b, beta: EXP(sympy.log(q) + a / beta - sympy.log(q * EXP(a / beta) + (1 - q) * EXP(b / beta))),
    ),
    wrong=(
        Wrong("not normalised", "weight_a / (weight_a + weight_b) -> weight_a", "That is the tilted weight of answer a. Do the weights of the two answers sum to 1?"),
        Wrong("not normalised, the multiplier taken as 0", lambda q, a, b, beta: q * EXP(a / beta - 1), "The constant e^(-1 - lambda/beta) is not e^(-1): it is whatever makes the two probabilities sum to 1."),
        Wrong("the reference is left out", "1 - reference_a -> reference_a", "Suppose that both rewards are 0: then nothing pays for leaving the reference, so what must pi* be?"),
        Wrong("the reference is left out of Z", lambda q, a, b, beta: q * EXP(a / beta) / (EXP(a / beta) + EXP(b / beta)), "Z(x) sums the very weights that stand above it, each with its own probability under the reference."),
        Wrong("Z has only answer a's probability", "(1 - reference_a) * sympy.exp(r_b / beta) -> sympy.exp(r_b / beta)", "In Z(x) answer b has a reference probability as well. Which, if a has pi_ref(a) and there are no others?"),
        Wrong("beta flattens the reference too", lambda q, a, b, beta: tilted((q * EXP(a)) ** (1 / beta), ((1 - q) * EXP(b)) ** (1 / beta)), "Only the reward is divided by beta. Check yours with both rewards 0: it must give pi_ref(a)."),
        Wrong("no exponential", lambda q, a, b, beta: tilted(q * a / beta, (1 - q) * b / beta), "The stationary condition gives the logarithm of p / q. How do you free p from a logarithm?"),
        Wrong("log-odds, not a probability", lambda q, a, b, beta: sympy.log(q / (1 - q)) + (a - b) / beta, "These are the right log-odds of answer a. The logistic function turns log-odds into a probability."),
        Wrong("odds, not a probability", "weight_a + weight_b -> weight_b", "This is how many times likelier a is than b. A probability compares a with both answers together."),
        Wrong("the reference itself", "r_a = r_b", "The reference is best only where both rewards are equal."),
        Wrong("no price on KL", lambda q, a, b, beta: sympy.Heaviside(a - b), "All on the better answer is the limit as beta goes to 0; here KL has a price."),
    ),
)  # fmt: skip


def policy(answers, scale, generator):
    drawn = scale * torch.randn(answers, generator=generator, dtype=torch.float64)
    return drawn.log_softmax(0)


def kl_cases(generator):
    cases = [
        (policy(n, scale, generator).requires_grad_(), policy(n, scale, generator))
        for n, scale in ((2, 1.0), (2, 0.5), (6, 2.0))
    ]
    remote = torch.randn(4, generator=generator, dtype=torch.float64)
    remote[0] = -800.0  # the probability is 0 in float64, its logarithm is not
    extreme = policy(4, 1.0, generator).requires_grad_(), remote.log_softmax(0)
    return [*cases, Edge("a probability is 0 in float64", extreme)]


def kl_truth(policy, reference):
    """Term by term."""
    return sum(log_p.exp() * (log_p - log_q) for log_p, log_q in zip(policy, reference))


def kl_divergence_by_hand(policy, reference):
    return (policy.exp() * (policy - reference)).sum()


KL = Exercise(
    "02.2", "The KL divergence of two policies", "implement", difficulty=2, importance=5, minutes=8,
    truth=kl_truth, cases=kl_cases, tolerance=1e-9,
    right=(
        kl_divergence_by_hand,
        lambda p, q: torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True),
        lambda p, q: torch.dot(torch.exp(p), p - q),
        lambda p, q: -(p.exp() * q).sum() - torch.special.entr(p.exp()).sum(),
    ),
    wrong=(
        Wrong("averaged under the reference", "(policy. -> (reference.", "The log-ratio is right. Its average is over completions drawn from the policy: whose probabilities are the weights?"),
        Wrong("no weights", "policy.exp() * (policy - reference) -> policy - reference", "An expectation weights each answer by how often it is drawn. Here an answer that is never drawn counts as much as any other."),
        Wrong("an unweighted mean", lambda p, q: (p - q).mean(), "The plain mean of the log-ratios would be right for samples drawn from the policy. Here every answer is listed once, so weigh it by its probability."),
        Wrong("absolute log-ratios", lambda p, q: (p.exp() * (p - q).abs()).sum(), "The terms may be negative: where the policy finds a text less probable than the reference does, its log-ratio counts with a minus."),
        Wrong("squared log-ratios", lambda p, q: (p.exp() * (p - q).square()).sum(), "A square keeps the result positive, but KL is positive without help, by Gibbs' inequality: only the log-ratio itself is averaged."),
        Wrong("one value per answer", "(policy.exp() * (policy - reference)).sum() -> policy.exp() * (policy - reference)", "These are the right terms. KL is one number: what is the expectation made from them?"),
        Wrong("log-probabilities as weights", "policy.exp() -> policy", "The arguments are logarithms of probabilities, and weights are probabilities."),
        Wrong("arguments taken for probabilities", lambda p, q: (p * (p / q).log()).sum(), "The arguments are logarithms already, all of them at most 0: a ratio becomes a difference."),
        Wrong("cross-entropy", "policy - reference -> 0 - reference", "This is only how improbable the reference finds the policy's texts. Where pi = pi_ref KL must be 0; is yours?"),
        Wrong("difference of probabilities", lambda p, q: (p.exp() * (p.exp() - q.exp())).sum(), "The logarithm of the ratio is averaged, and a ratio's logarithm is a difference of logarithms, not of probabilities."),
        Wrong("half of the sum of both directions", lambda p, q: ((p.exp() - q.exp()) * (p - q)).sum() / 2, "That is symmetric; the objective uses one direction only, the average over the policy's own texts."),
        Wrong("the probability of the reference underflows", lambda p, q: (p.exp() * (p.exp() / q.exp()).log()).sum(), "A log-probability of -800 is quite common for a long text, but its exponential is 0 in float64. Can you have log(p / q) without ever forming q?"),
        Wrong("the logarithm of the reference's exponential", lambda p, q: (p.exp() * (p.exp().log() - q.exp().log())).sum(), "A log-probability of -800 is quite common for a long text, but its exponential is 0 in float64, and there is no way back. You had the logarithms to begin with."),
        Wrong("a small number inside the logarithm", lambda p, q: (p.exp() * (p.exp() / (q.exp() + 1e-8)).log()).sum(), "The small number hides how improbable the reference finds an answer, and that is what KL is there to say. The logarithms that you were given need no protection."),
        Wrong("the weights are detached", "(policy. -> (policy.detach().", "The value is right, but the weights depend on the policy too: a gradient has to flow through both factors."),
        Wrong("the log-ratio is detached", ") * (policy - re -> ) * (policy.detach() - re", "The value is right, but the log-ratio depends on the policy too: a gradient has to flow through both factors."),
        Wrong("renormalised first", lambda p, q: (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum(), "The value is right. But the gradient is asked for with each log-probability a number of its own, and a softmax (torch.distributions has one inside) ties them together."),
        Wrong("left to torch.distributions", lambda p, q: kl_divergence(Categorical(logits=p), Categorical(logits=q)), "Categorical renormalises, which changes the gradient, and calls the KL infinite where exp(-800) is 0 in float64. The sum itself is short enough to write out."),
        Wrong("single precision", lambda p, q: (p.float().exp() * (p.float() - q.float())).sum().double(), "Somewhere the numbers pass through float32 and lose half of their digits."),
    ),
)  # fmt: skip


def optimum_cases(generator):
    cases = []
    for answers, beta, highest in ((2, 1.7, 1.0), (2, 0.6, -2.0), (6, 2.5, 3.0), (5, 0.002, 9.0)):
        rewards = 2 * torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards[0] = highest  # at beta = 0.002 its exponential is beyond float64
        reference = policy(answers, 1.5, generator)
        cases.append((reference.requires_grad_(), rewards.requires_grad_(), beta))
    return [*cases[:-1], Edge("beta is small", cases[-1])]


def optimum_truth(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """From the odds: 1 / pi*(y) is the sum over all y' of pi*(y') / pi*(y), where Z has gone."""
    result = []
    for i in range(len(rewards)):
        log_odds = (reference - reference[i]) + (rewards - rewards[i]) / beta
        total = log_odds[0]
        for other in log_odds[1:]:
            total = torch.logaddexp(total, other)
        result.append(-total)
    return torch.stack(result)


def optimal_policy(reference, rewards, beta):
    return (reference + rewards / beta).log_softmax(0)


OPTIMUM = Exercise(
    "02.3", "The best policy, in log-probabilities", "implement", difficulty=2, importance=4, minutes=7,
    truth=optimum_truth, cases=optimum_cases, tolerance=1e-9,
    right=(
        optimal_policy,
        lambda q, r, b: q + r / b - torch.logsumexp(q + r / b, dim=0),
        lambda q, r, b: (q + (r - r.max()) / b).log_softmax(-1),
        lambda q, r, b: -torch.logsumexp((q + r / b)[None, :] - (q + r / b)[:, None], dim=1),
    ),
    wrong=(
        Wrong("log Z(x) is left out", "(reference + rewards / beta).log_softmax(0) -> reference + rewards / beta", "The exponentials of your numbers do not sum to 1. What has to be subtracted from each, so that they do?"),
        Wrong("the reference is left out of Z", lambda q, r, b: q + r / b - (r / b).logsumexp(0), "Z(x) is an average under pi_ref: its terms are the very weights that you normalise."),
        Wrong("beta divides the reference too", lambda q, r, b: ((q + r) / b).log_softmax(0), "Only the reward is divided by beta. With all rewards 0 the answer must be log pi_ref, whatever beta is."),
        Wrong("the sign of the rewards", "rewards = -rewards", "A higher reward must make an answer more probable."),
        Wrong("logarithm of a softmax", lambda q, r, b: (q + r / b).softmax(0).log(), "At a small beta most probabilities are 0 in float64, and their logarithm is infinite. There is a function that never leaves the logarithms."),
        Wrong("exp before log overflows", lambda q, r, b: q + r / b - (q + r / b).exp().sum().log(), "At beta = 0.002 the exponents are in the thousands. A sum of exponentials can be taken with the largest one factored out; torch has it ready."),
        Wrong("probabilities first, logarithm last", lambda q, r, b: (q.exp() * (r / b).exp() / (q.exp() * (r / b).exp()).sum()).log(), "At beta = 0.002 the exponents are in the thousands, and infinity divided by infinity is no number. Can you stay in logarithms from beginning to end?"),
        Wrong("a small number inside the logarithm", lambda q, r, b: ((q + r / b).softmax(0) + 1e-12).log(), "The small number hides every probability that is smaller still. Stay in logarithms from beginning to end, and nothing needs hiding."),
        Wrong("clamped exponents", lambda q, r, b: q + (r / b).clamp(max=50) - (q + (r / b).clamp(max=50)).logsumexp(0), "A clamp prevents the overflow by changing the rewards. Only differences of exponents matter, so you may subtract the same number from all."),
        Wrong("the largest subtracted, not the sum", lambda q, r, b: (q + r / b) - (q + r / b).max(), "To subtract the largest exponent is a good first step, but it does not yet make the probabilities sum to 1."),
        Wrong("Z instead of its logarithm", lambda q, r, b: q + r / b - (q + r / b).exp().sum(), "To divide a probability by Z is to subtract something from its logarithm. What?"),
        Wrong("beta log Z is subtracted", lambda q, r, b: q + r / b - b * (q + r / b).logsumexp(0), "Beta log Z is the best value of J. In pi* itself it is Z alone that divides."),
        Wrong("mean for sum in Z", lambda q, r, b: (q + r / b).log_softmax(0) + math.log(len(r)), "The terms of Z(x) contain the weights pi_ref already: their sum is the average, with no division by the number of answers."),
        Wrong("probabilities where log-probabilities belong", lambda q, r, b: (q.exp() + r / b).log_softmax(0), "In the exponent stands log pi_ref: pi_ref e^(r/beta) = e^(log pi_ref + r/beta)."),
        Wrong("log Z is detached", lambda q, r, b: q + r / b - (q + r / b).logsumexp(0).detach(), "The value is right, but log Z(x) depends on the rewards and the reference as well: raise one reward, and the other answers lose."),
        Wrong("single precision", lambda q, r, b: (q + r / b).float().log_softmax(0).double(), "Somewhere the numbers pass through float32 and lose half of their digits."),
        Wrong("the reference itself", lambda q, r, b: q + 0 * r, "The reference is the best policy only where all rewards are equal."),
    ),
)  # fmt: skip


def objective_cases(generator):
    cases = []
    for answers, beta in ((2, 0.7), (2, 2.0), (6, 0.1), (4, 0.05)):
        scores = 1.5 * torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards = 2 * torch.randn(answers, generator=generator, dtype=torch.float64)
        reference = policy(answers, 1.5, generator)
        cases.append((scores.requires_grad_(), reference, rewards, beta))
    return cases


def objective_truth(scores: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """By the chapter's second derivation: J(pi) = beta log Z - beta KL(pi || pi*), term by term."""
    weights = [q.exp() * (r / beta).exp() for q, r in zip(reference, rewards)]
    total = sum(score.exp() for score in scores)
    regret = sum(
        score.exp() / total * (score - total.log() - (weight / sum(weights)).log())
        for score, weight in zip(scores, weights)
    )
    return beta * sum(weights).log() - beta * regret


def objective(scores, reference, rewards, beta):
    policy = scores.log_softmax(0)
    expected_reward = (policy.exp() * rewards).sum()
    return expected_reward - beta * (policy.exp() * (policy - reference)).sum()


OBJECTIVE = Exercise(
    "02.4", "The objective J", "implement", difficulty=2, importance=5, minutes=10,
    truth=objective_truth, cases=objective_cases,
    right=(
        objective,
        lambda s, q, r, b: torch.dot(s.softmax(0), r) - b * torch.nn.functional.kl_div(q, s.log_softmax(0), reduction="sum", log_target=True),
        # The log-ratio as a part of the reward, without a gradient: the same, as grad log pi averages to 0.
        lambda s, q, r, b: (s.softmax(0) * (r - b * (s.log_softmax(0) - q).detach())).sum(),
        lambda s, q, r, b: sum(s.exp()[i] / s.exp().sum() * (r[i] - b * (s[i] - s.logsumexp(0) - q[i])) for i in range(len(s))),
    ),
    wrong=(
        Wrong("beta on the reward", "expected_reward - beta * -> beta * expected_reward - ", "Beta is the price of KL: as it goes to 0, KL no longer matters. In yours the reward no longer matters."),
        Wrong("beta on everything", "expected_reward - beta * (policy.exp() * (policy - reference)).sum() -> beta * (expected_reward - (policy.exp() * (policy - reference)).sum())", "Beta multiplies the KL alone."),
        Wrong("no reward", "return expected_reward - -> return -", "Without the reward the reference is the best policy, and nothing is learned."),
        Wrong("the KL in the other direction", "(policy.exp() * (policy - reference)) -> (reference.exp() * (reference - policy))", "In KL(pi || pi_ref) the average is over the policy's texts, not the reference's."),
        Wrong("the KL averaged under the reference", "(policy.exp() * (policy - -> (reference.exp() * (policy -", "Both expectations in J are over y drawn from the policy."),
        Wrong("the reward averaged under the reference", "(policy.exp() * rewards) -> (reference.exp() * rewards)", "A policy is paid for the texts that it writes itself. If the weights do not depend on the policy, what does its gradient learn of the reward?"),
        Wrong("the plain mean of the rewards", "(policy.exp() * rewards).sum() -> rewards.mean()", "E[r] is the average over answers drawn from the policy: weigh each reward by the answer's probability."),
        Wrong("the plain sum of the rewards", "(policy.exp() * rewards) -> rewards", "E[r] is the average over answers drawn from the policy: weigh each reward by the answer's probability."),
        Wrong("the KL not weighted", "(policy.exp() * (policy - reference)) -> (policy - reference)", "KL is an expectation too: each log-ratio counts as often as the policy writes that answer."),
        Wrong("one value per answer", ".sum() -> ", "These are the right terms. J is one number: what is the expectation made from them?"),
        Wrong("scores taken for log-probabilities", ".log_softmax(0) -> ", "The exponentials of the scores do not sum to 1. What turns scores into log-probabilities?"),
        Wrong("scores in the log-ratio", "(policy - reference) -> (scores - reference)", "The weights are normalised, but the KL compares the scores themselves with the reference. Where do log-probabilities belong?"),
        Wrong("the best J there is", "result = beta * (reference + rewards / beta).logsumexp(0) + 0 * result", "Beta log Z is what the best policy reaches. The task asks for J of the policy that it is given."),
        Wrong("the reference as probabilities", "reference = reference.exp()", "A log-ratio is a difference of two logarithms, and `reference` holds logarithms already."),
        Wrong("absolute log-ratios", "(policy - reference) -> (policy - reference).abs()", "The log-ratio counts with its sign; only its average is never negative."),
        Wrong("no gradient of the KL", "beta * (policy.exp() -> beta * (policy.exp().detach()", "The value is right, but from the KL no gradient comes: with constant weights the gradients of the log-ratios average to exactly 0. Let the weights depend on the policy."),
        Wrong("no gradient of the reward", "(policy.exp() * rewards) -> (policy.exp().detach() * rewards)", "The value is right. But the rewards are constant: it is only through the weights that the policy can earn more."),
    ),
)  # fmt: skip


def beta_truth():
    """Computed, with plain numbers, in many small worlds that must all agree."""

    def optimum(q, r, beta):
        top = max(r)
        weights = [a * math.exp((b - top) / beta) for a, b in zip(q, r)]
        return [w / sum(weights) for w in weights]

    def kl(p, q):
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)

    def expected(p, r):
        return math.fsum(a * b for a, b in zip(p, r))

    def word(before, after):
        if math.isclose(before, after, abs_tol=1e-12):
            return "same"
        return "smaller" if after < before else "larger"

    def limit(p, q, r):
        """The one policy of the four that p is."""
        n = range(len(q))
        named = {
            "reference": q,
            "best": [float(r[i] == max(r)) for i in n],
            "likeliest": [float(q[i] == max(q)) for i in n],
            "uniform": [1 / len(q) for _ in n],
        }
        (name,) = (k for k, v in named.items() if max(abs(a - b) for a, b in zip(p, v)) < 1e-3)
        return name

    def answers(q, r, beta):
        before, dearer = optimum(q, r, beta), optimum(q, r, 2 * beta)
        doubled, raised = [2 * a for a in r], [a + 3 for a in r]
        shifted = optimum(q, raised, beta)
        same_ratio = optimum(q, doubled, 2 * beta)
        return {
            "beta to 0": limit(optimum(q, r, 1e-4), q, r),
            "beta to infinity": limit(optimum(q, r, 1e6), q, r),
            "2 beta: KL": word(kl(before, q), kl(dearer, q)),
            "2 beta: E[r]": word(expected(before, r), expected(dearer, r)),
            "2 r: KL": word(kl(before, q), kl(optimum(q, doubled, beta), q)),
            "2 r and 2 beta: KL": word(kl(before, q), kl(same_ratio, q)),
            "r + 3: KL": word(kl(before, q), kl(shifted, q)),
            "r + 3: E[r]": word(expected(before, r), expected(shifted, raised)),
        }

    dice, found = random.Random(0), []
    for _ in range(20):
        weights = [3.0, 1.0, *(dice.uniform(0.5, 2) for _ in range(2))]  # likeliest is the first,
        rewards = [0.0, 2.0, *(dice.uniform(-2, 1.5) for _ in range(2))]  # best the second
        q = [w / sum(weights) for w in weights]
        found.append(answers(q, rewards, dice.uniform(0.3, 3)))
    assert all(one == found[0] for one in found)
    return found[0]


BETA = Exercise(
    "02.5", "What beta does", "predict", difficulty=2, importance=5, minutes=7, workshop=True,
    truth=beta_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("beta the wrong way round", {"beta to 0": "reference", "beta to infinity": "best"}, "Beta is the price of leaving the reference. Where would you be if leaving cost nothing, and where if it cost a fortune?"),
        Wrong("beta to 0 as a return to the reference", {"beta to 0": "reference"}, "Put beta = 0 into J: which term is left, and which policy makes it largest?"),
        Wrong("beta to 0 as undecided", {"beta to 0": "uniform"}, "As beta goes to 0 the exponents r / beta drift apart, not together. Which answer wins?"),
        Wrong("beta to 0 as the reference's favourite", {"beta to 0": "likeliest"}, "That would be the reference made sharper. What is multiplied by a huge number as beta goes to 0: log pi_ref or r?"),
        Wrong("beta to infinity as a chase for reward", {"beta to infinity": "best"}, "In the exponent stands r / beta. What is e^(r/beta) when beta is huge?"),
        Wrong("a temperature of the whole model", {"beta to infinity": "uniform"}, "A high temperature would make every text equally probable. Here only the tilt e^(r/beta) becomes flat, and it multiplies something."),
        Wrong("beta to infinity as the reference's favourite", {"beta to infinity": "likeliest"}, "KL is 0 where pi = pi_ref in all answers, not where only the favourite is left."),
        Wrong("a larger beta moves further", {"2 beta: KL": "larger"}, "If the price of something doubles, do you buy more of it or less?"),
        Wrong("the KL does not depend on beta", {"2 beta: KL": "same"}, "Beta multiplies the KL in J, but it also changes which policy is best. Look at the tilt e^(r/beta)."),
        Wrong("a larger beta earns more", {"2 beta: E[r]": "larger"}, "Reward is paid for with KL. When KL becomes dearer, how much reward is still worth its price?"),
        Wrong("the reward does not depend on beta", {"2 beta: E[r]": "same"}, "The rewards of the answers stay, but pi* draws other answers when beta changes."),
        Wrong("larger rewards stay closer", {"2 r: KL": "smaller"}, "Twice the reward for the same price of KL: is it worth going further, or less far?"),
        Wrong("the scale of the reward does not count", {"2 r: KL": "same"}, "Only adding a constant changes nothing. Doubling the rewards doubles their differences as well: what does that do to r / beta?"),
        Wrong("both doubled, further", {"2 r and 2 beta: KL": "larger"}, "Rewards and beta enter pi* only together, as r / beta."),
        Wrong("both doubled, closer", {"2 r and 2 beta: KL": "smaller"}, "Rewards and beta enter pi* only together, as r / beta."),
        Wrong("a raise moves the policy", {"r + 3: KL": "larger"}, "Every tilted weight is multiplied by the same e^(3/beta). What does Z(x) do?"),
        Wrong("a raise ties the policy down", {"r + 3: KL": "smaller"}, "Every tilted weight is multiplied by the same e^(3/beta). What does Z(x) do?"),
        Wrong("a raise that is not paid out", {"r + 3: E[r]": "same"}, "The policy does not change, but each of its answers is now paid 3 more."),
        Wrong("a raise that costs", {"r + 3: E[r]": "smaller"}, "The policy does not change, and each of its answers is now paid 3 more."),
    ),
)  # fmt: skip

EXERCISES = (TWO_ANSWERS, KL, OPTIMUM, OBJECTIVE, BETA)
