"""03 The partition function cancels: from the optimum back to the reward, and on to the loss."""

import math

import sympy
import torch
from torch import Tensor

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong

SYMBOLS = sympy.symbols("pi_star pi_ref beta Z", positive=True)


def reward_truth(pi_star, pi_ref, beta, Z):
    """Solved by sympy, not by hand."""
    r = sympy.Symbol("r", real=True)
    return sympy.solve(sympy.Eq(pi_star, pi_ref * sympy.exp(r / beta) / Z), r)[0]


LOG = sympy.log
def reward(pi_star, pi_ref, beta, Z):
    return beta * sympy.log(pi_star / pi_ref) + beta * sympy.log(Z)


REWARD = Exercise(
    "03.1", "The reward behind a policy", "derive", difficulty=1, importance=5, minutes=5, workshop=True,
    truth=reward_truth, cases=lambda generator: [SYMBOLS],
    right=(
        reward,
        lambda p, q, b, Z: b * (LOG(p) - LOG(q) + LOG(Z)),
        lambda p, q, b, Z: -b * LOG(q / (p * Z)),
    ),
    wrong=(
        Wrong("log Z(x) is left out", "Z = 1", "That is the implicit reward. Multiply the optimum by Z before taking the logarithm: what becomes of it?"),
        Wrong("Z(x) without beta", "beta * sympy.log(Z) -> sympy.log(Z)", "Beta multiplies the whole logarithm, log Z included: solve log(pi* Z / pi_ref) = r / beta."),
        Wrong("log Z(x) has the wrong sign", "Z = 1 / Z", "Z divides in pi* = pi_ref exp(r/beta) / Z; on the other side it multiplies."),
        Wrong("no logarithm", lambda p, q, b, Z: b * p * Z / q, "The reward stands in an exponent; its inverse is the logarithm."),
        Wrong("Z(x) instead of its logarithm", "sympy.log(Z) -> Z", "The logarithm of a product is a sum of logarithms, that of Z too."),
    ),
)  # fmt: skip


def log_z_cases(generator):
    cases = []
    for answers, beta in ((2, 1.0), (3, 0.5), (6, 2.0), (5, 0.01)):
        logits = torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards = 3 * torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards[0] = 9.0  # at beta = 0.01 its exponential is beyond float64
        cases.append((logits.log_softmax(0).requires_grad_(), rewards.requires_grad_(), beta))
    return [*cases[:-1], Edge("beta is small", cases[-1])]


def log_z_truth(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Term by term, the largest taken out by hand."""
    terms = [reference[i] + rewards[i] / beta for i in range(len(rewards))]
    top = max(term.item() for term in terms)
    return top + sum((term - top).exp() for term in terms).log()


def log_partition(reference, rewards, beta):
    return (reference + rewards / beta).logsumexp(0)


LOG_PARTITION = Exercise(
    "03.2", "log Z(x) over all answers", "implement", difficulty=2, importance=3, minutes=5,
    truth=log_z_truth, cases=log_z_cases,
    right=(
        log_partition,
        lambda q, r, b: torch.logsumexp(torch.stack((q, r / b)).sum(0), dim=-1),
        lambda q, r, b: (q + r / b - (q + r / b).max().detach()).exp().sum().log() + (q + r / b).max().detach(),
    ),
    wrong=(
        Wrong("the reference's logarithm divided by beta", lambda q, r, b: ((q + r) / b).logsumexp(0), "Beta divides the reward alone: pi_ref enters as it is."),
        Wrong("an unweighted average", lambda q, r, b: (r / b).logsumexp(0) - torch.tensor(float(len(r)), dtype=torch.float64).log(), "The average that Z stands for is taken under pi_ref: answers that it finds likely count more."),
        Wrong("Z, not its logarithm", lambda q, r, b: (q + r / b).exp().sum(), "The task asks for log Z; Z itself overflows where beta is small."),
        Wrong("exp before log overflows", lambda q, r, b: (q + r / b).exp().sum().log(), "At beta = 0.01 the exponents are in the hundreds. Use logsumexp, which takes the largest out first."),
        Wrong("mean for sum", lambda q, r, b: (q + r / b).logsumexp(0) - torch.tensor(float(len(r)), dtype=torch.float64).log(), "Z is a sum weighted by pi_ref, which is the average already; do not divide by the number of answers."),
        Wrong("probabilities where log-probabilities belong", lambda q, r, b: (q.exp() + r / b).logsumexp(0), "Inside the exponent stands log pi_ref: pi_ref exp(r/beta) = exp(log pi_ref + r/beta)."),
        Wrong("the average of the exponents", lambda q, r, b: (q.exp() * r / b).sum(), "The logarithm of an average is not the average of the logarithms: take the exponential first, then the average."),
        Wrong("minus the reward", "rewards = -rewards", "High rewards must make Z larger."),
    ),
)  # fmt: skip


def loss_cases(generator):
    def logps(scale, n=5):
        drawn = -80 + scale * torch.randn(4, n, generator=generator, dtype=torch.float64)
        return (drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], drawn[3])

    chosen, rejected, *reference = logps(1.0, 1)
    extreme, zero = torch.tensor([1e4, -1e4, 0.0]).double(), torch.zeros(3).double()
    return [
        (chosen, rejected, *reference, 0.1),
        (*logps(5.0), 0.1),
        Edge("margins are large", (*logps(20.0, 7), 0.7)),
        Edge("the numbers are extreme", (extreme.requires_grad_(), zero.clone().requires_grad_(), zero, zero, 1.0)),
    ]  # fmt: skip


def loss_truth(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Bradley-Terry's log-likelihood as log(1 + e^-x), of two logarithms."""
    ratios = chosen - reference_chosen, rejected - reference_rejected
    return torch.logaddexp(torch.zeros_like(chosen), beta * (ratios[1] - ratios[0]))


def logsigmoid(x):
    return torch.nn.functional.logsigmoid(x)


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)


LOSS = Exercise(
    "03.3", "The DPO loss", "implement", difficulty=2, importance=5, minutes=10, workshop=True,
    truth=loss_truth, cases=loss_cases,
    right=(
        dpo_loss,
        lambda w, l, rw, rl, b: torch.nn.functional.softplus(-b * (w - l - rw + rl), threshold=1000),
    ),
    wrong=(
        Wrong("beta outside the logarithm", "-torch.nn.functional.logsigmoid(beta * margin) -> -beta * torch.nn.functional.logsigmoid(margin)", "Beta scales the margin inside the sigmoid; outside it would only scale the learning rate."),
        Wrong("log(sigmoid(x)) overflows", "torch.nn.functional.logsigmoid(beta * margin) -> torch.sigmoid(beta * margin).log()", "The sigmoid of a very negative margin is 0 and its logarithm infinite. torch has a function that does both at once."),
        Wrong("the sigmoid without its logarithm", "torch.nn.functional.logsigmoid(beta * margin) -> torch.nn.functional.sigmoid(beta * margin)", "The likelihood of the label is a sigmoid; the loss is minus its logarithm."),
        Wrong("the margin itself", "torch.nn.functional.logsigmoid(beta * margin) -> (beta * margin)", "Without the log-sigmoid nothing says when a pair is settled: the loss falls for ever."),
        Wrong("the likelihood is clamped", "torch.nn.functional.logsigmoid(beta * margin) -> torch.sigmoid(beta * margin).clamp(min=1e-12).log()", "A clamp keeps the loss finite and kills the gradient where it is needed most. There is a function that is exact instead."),
        Wrong("beta on the chosen ratio only", "beta * margin -> beta * (chosen - reference_chosen) - (rejected - reference_rejected)", "Both implicit rewards are beta times their log-ratio: mind the brackets."),
    ),
)  # fmt: skip


def invisible_truth():
    """Computed: each change is made, and the loss before and after is compared."""

    def loss(chosen, rejected, labels_shift=0.0):
        reference_chosen, reference_rejected, beta = -81.0, -77.0, 0.3
        reward_w, reward_l = 1.5 + labels_shift, 0.4 + labels_shift
        p = 1 / (1 + math.exp(reward_l - reward_w))  # the label's probability
        margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        return p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin))

    def word(after):
        change = after - loss(-80.0, -78.0)
        return "same" if abs(change) < 1e-12 else "smaller" if change < 0 else "larger"

    return {
        "both": word(loss(-85.0, -83.0)),
        "chosen": word(loss(-79.9, -78.0)),
        "rejected": word(loss(-80.0, -77.9)),
        "reward + f(x)": word(loss(-80.0, -78.0, 5.0)),
    }


INVISIBLE = Exercise(
    "03.4", "What the loss cannot see", "predict", difficulty=2, importance=4, minutes=5,
    truth=invisible_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a loss that punishes unlikely texts", {"both": "larger"}, "That would be the loss of maximum likelihood on the texts. Add the same number to both log-ratios and take their difference."),
        Wrong("a loss that rewards unlikely texts", {"both": "smaller"}, "The two changes enter the margin with opposite signs."),
        Wrong("the chosen one's sign", {"chosen": "larger"}, "A larger margin means a label better explained, so a smaller loss."),
        Wrong("the chosen one does not count", {"chosen": "same"}, "Its log-ratio is half of the margin."),
        Wrong("the rejected one's sign", {"rejected": "smaller"}, "The rejected log-ratio enters the margin with a minus."),
        Wrong("the rejected one does not count", {"rejected": "same"}, "Its log-ratio is the other half of the margin."),
        Wrong("the level of the reward counts, upwards", {"reward + f(x)": "larger"}, "Bradley-Terry sees only the difference of two rewards at the same prompt."),
        Wrong("the level of the reward counts, downwards", {"reward + f(x)": "smaller"}, "Bradley-Terry sees only the difference of two rewards at the same prompt."),
    ),
)  # fmt: skip

EXERCISES = (REWARD, LOG_PARTITION, LOSS, INVISIBLE)
