"""03 The partition function cancels: from the optimum back to the reward, and on to the loss."""

import math

import sympy
import torch
from torch import Tensor

from dpo_mini.course.checks.engine import Exercise, Wrong

# --- 03.1 solve the optimum for the reward ---

SYMBOLS = sympy.symbols("pi_star pi_ref beta Z", positive=True)


def reward_truth(pi_star, pi_ref, beta, Z):
    """Solved by sympy, not by hand."""
    r = sympy.Symbol("r", real=True)
    return sympy.solve(sympy.Eq(pi_star, pi_ref * sympy.exp(r / beta) / Z), r)[0]


LOG = sympy.log
REWARD = Exercise(
    id="03.1",
    title="The reward behind a policy",
    kind="derive",
    truth=reward_truth,
    cases=lambda generator: [SYMBOLS],
    wrong=(
        Wrong("log Z(x) is left out", lambda p, q, b, Z: b * LOG(p / q),
              "That is the implicit reward. Multiply the optimum by Z before taking the logarithm: what becomes of it?"),
        Wrong("Z(x) without beta", lambda p, q, b, Z: b * LOG(p / q) + LOG(Z),
              "Beta multiplies the whole logarithm, log Z included: solve log(pi* Z / pi_ref) = r / beta."),
        Wrong("log Z(x) has the wrong sign", lambda p, q, b, Z: b * LOG(p / q) - b * LOG(Z),
              "Z divides in pi* = pi_ref exp(r/beta) / Z; on the other side it multiplies."),
        Wrong("the ratio is upside down", lambda p, q, b, Z: b * LOG(q / p) + b * LOG(Z),
              "Where pi* is above pi_ref the reward must be high: try pi* = 2 pi_ref."),
        Wrong("divided by beta", lambda p, q, b, Z: LOG(p * Z / q) / b,
              "The exponent is r / beta. To free r, multiply by beta."),
        Wrong("beta is missing", lambda p, q, b, Z: LOG(p * Z / q),
              "The exponent is r / beta, not r."),
        Wrong("no logarithm", lambda p, q, b, Z: b * p * Z / q,
              "The reward stands in an exponent; its inverse is the logarithm."),
        Wrong("Z(x) instead of its logarithm", lambda p, q, b, Z: b * LOG(p / q) + b * Z,
              "The logarithm of a product is a sum of logarithms, that of Z too."),
    ),
    others=(
        lambda p, q, b, Z: b * (LOG(p) - LOG(q) + LOG(Z)),
        lambda p, q, b, Z: -b * LOG(q / (p * Z)),
    ),
    tolerance=1e-9,
    difficulty=1,
    importance=5,
    minutes=5,
    workshop=True,
)  # fmt: skip

# --- 03.2 log Z over all answers ---


def log_z_cases(generator):
    cases = []
    for answers, beta in ((2, 1.0), (3, 0.5), (6, 2.0), (5, 0.01)):
        logits = torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards = 3 * torch.randn(answers, generator=generator, dtype=torch.float64)
        rewards[0] = 9.0  # at beta = 0.01 its exponential is beyond float64
        cases.append((logits.log_softmax(0).requires_grad_(), rewards.requires_grad_(), beta))
    return cases


def log_z_truth(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Term by term, the largest taken out by hand."""
    terms = [reference[i] + rewards[i] / beta for i in range(len(rewards))]
    top = max(term.item() for term in terms)
    return top + sum((term - top).exp() for term in terms).log()


LOG_PARTITION = Exercise(
    id="03.2",
    title="log Z(x) over all answers",
    kind="implement",
    truth=log_z_truth,
    cases=log_z_cases,
    wrong=(
        Wrong("the reference is left out", lambda q, r, b: (r / b).logsumexp(0),
              "Z is an average under pi_ref: each term is pi_ref(y) exp(r/beta)."),
        Wrong("rewards multiplied by beta", lambda q, r, b: (q + r * b).logsumexp(0),
              "Small beta means that reward counts more: it must divide."),
        Wrong("the reference's logarithm divided by beta", lambda q, r, b: ((q + r) / b).logsumexp(0),
              "Beta divides the reward alone: pi_ref enters as it is."),
        Wrong("an unweighted average", lambda q, r, b: (r / b).logsumexp(0) - torch.tensor(float(len(r)), dtype=torch.float64).log(),
              "The average that Z stands for is taken under pi_ref: answers that it finds likely count more."),
        Wrong("beta is missing", lambda q, r, b: (q + r).logsumexp(0),
              "The exponent is r / beta."),
        Wrong("Z, not its logarithm", lambda q, r, b: (q + r / b).exp().sum(),
              "The task asks for log Z; Z itself overflows where beta is small."),
        Wrong("exp before log overflows", lambda q, r, b: (q + r / b).exp().sum().log(),
              "At beta = 0.01 the exponents are in the hundreds. Use logsumexp, which takes the largest out first."),
        Wrong("mean for sum", lambda q, r, b: (q + r / b).logsumexp(0) - torch.tensor(float(len(r)), dtype=torch.float64).log(),
              "Z is a sum weighted by pi_ref, which is the average already; do not divide by the number of answers."),
        Wrong("probabilities where log-probabilities belong", lambda q, r, b: (q.exp() + r / b).logsumexp(0),
              "Inside the exponent stands log pi_ref: pi_ref exp(r/beta) = exp(log pi_ref + r/beta)."),
        Wrong("minus the reward", lambda q, r, b: (q - r / b).logsumexp(0),
              "High rewards must make Z larger."),
        Wrong("zero", lambda q, r, b: 0 * (q + r).sum(),
              "Z is 1, and its logarithm 0, only where all rewards are 0."),
        Wrong("multiplied by beta", lambda q, r, b: b * (q + r / b).logsumexp(0),
              "That is beta log Z, the best J; the task asks for log Z alone."),
    ),
    others=(
        lambda q, r, b: torch.logsumexp(torch.stack((q, r / b)).sum(0), dim=-1),
        lambda q, r, b: (q + r / b - (q + r / b).max().detach()).exp().sum().log() + (q + r / b).max().detach(),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=3,
    minutes=5,
)  # fmt: skip

# --- 03.3 the loss ---


def loss_cases(generator):
    def logps(scale, n=5):
        drawn = -80 + scale * torch.randn(4, n, generator=generator, dtype=torch.float64)
        return (drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], drawn[3])

    chosen, rejected, *reference = logps(1.0, 1)
    extreme = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64)
    return [
        (chosen, rejected, *reference, 0.1),
        (*logps(5.0), 0.1),
        (*logps(20.0, 7), 0.7),
        (extreme.requires_grad_(), torch.zeros(3, dtype=torch.float64).requires_grad_(),
         torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 1.0),
    ]  # fmt: skip


def loss_truth(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Bradley-Terry's log-likelihood as log(1 + e^-x), with its gradient written out."""

    class NegativeLogLikelihood(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.abs().neg().exp().log1p() + x.clamp(max=0).neg()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return -grad / (1 + x.clamp(-700, 700).exp())

    ratios = chosen - reference_chosen, rejected - reference_rejected
    return NegativeLogLikelihood.apply(beta * (ratios[0] - ratios[1]))


def logsigmoid(x):
    return torch.nn.functional.logsigmoid(x)


LOSS = Exercise(
    id="03.3",
    title="The DPO loss",
    kind="implement",
    truth=loss_truth,
    cases=loss_cases,
    wrong=(
        Wrong("chosen and rejected swapped", lambda w, l, rw, rl, b: -logsigmoid(b * ((l - rl) - (w - rw))),
              "This rewards the rejected completion. Where the chosen one gained, the loss must be small."),
        Wrong("the sign of the loss", lambda w, l, rw, rl, b: logsigmoid(b * ((w - rw) - (l - rl))),
              "A loss is minimised: it is minus the log-likelihood, and never negative."),
        Wrong("no reference", lambda w, l, rw, rl, b: -logsigmoid(b * (w - l)),
              "The implicit reward is a ratio, log pi - log pi_ref: subtract each completion's own reference."),
        Wrong("beta is missing", lambda w, l, rw, rl, b: -logsigmoid((w - rw) - (l - rl)),
              "The implicit reward is beta times the log-ratio."),
        Wrong("beta outside the logarithm", lambda w, l, rw, rl, b: -b * logsigmoid((w - rw) - (l - rl)),
              "Beta scales the margin inside the sigmoid; outside it would only scale the learning rate."),
        Wrong("divided by beta", lambda w, l, rw, rl, b: -logsigmoid(((w - rw) - (l - rl)) / b),
              "r = beta log(pi/pi_ref) + ...: beta multiplies."),
        Wrong("log(sigmoid(x)) overflows", lambda w, l, rw, rl, b: -torch.log(torch.sigmoid(b * ((w - rw) - (l - rl)))),
              "The sigmoid of a very negative margin is 0 and its logarithm infinite. torch has a function that does both at once."),
        Wrong("the sigmoid without its logarithm", lambda w, l, rw, rl, b: -torch.sigmoid(b * ((w - rw) - (l - rl))),
              "The likelihood of the label is a sigmoid; the loss is minus its logarithm."),
        Wrong("the margin itself", lambda w, l, rw, rl, b: -b * ((w - rw) - (l - rl)),
              "Without the log-sigmoid nothing says when a pair is settled: the loss falls for ever."),
        Wrong("averaged over the batch", lambda w, l, rw, rl, b: -logsigmoid(b * ((w - rw) - (l - rl))).mean(),
              "The task asks for one loss a pair, tensor [batch]; the training loop takes the mean."),
        Wrong("the likelihood is clamped", lambda w, l, rw, rl, b: -torch.log(torch.sigmoid(b * ((w - rw) - (l - rl))).clamp(min=1e-12)),
              "A clamp keeps the loss finite and kills the gradient where it is needed most. There is a function that is exact instead."),
        Wrong("beta on the chosen ratio only", lambda w, l, rw, rl, b: -logsigmoid(b * (w - rw) - (l - rl)),
              "Both implicit rewards are beta times their log-ratio: mind the brackets."),
        Wrong("the reference is added, or each completion has the other's", lambda w, l, rw, rl, b: -logsigmoid(b * ((w + rw) - (l + rl))),
              "log(pi / pi_ref) is a difference of logarithms."),
        Wrong("the policy is detached", lambda w, l, rw, rl, b: -logsigmoid(b * ((w.detach() - rw) - (l.detach() - rl))),
              "Without a gradient nothing is learned: only the reference is constant."),
        Wrong("the rejected one is detached", lambda w, l, rw, rl, b: -logsigmoid(b * ((w - rw) - (l.detach() - rl))),
              "Both completions' log-probabilities carry a gradient."),
        Wrong("half", lambda w, l, rw, rl, b: -0.5 * logsigmoid(b * ((w - rw) - (l - rl))),
              "The loss at margin 0 must be log 2 = 0.693."),
        Wrong("zeros", lambda w, l, rw, rl, b: torch.zeros_like(w) * w,
              "At margin 0 the loss is log 2 = 0.693."),
    ),
    others=(
        lambda w, l, rw, rl, b: torch.nn.functional.softplus(-b * (w - l - rw + rl), threshold=1000),
        lambda w, l, rw, rl, b: torch.logaddexp(torch.zeros_like(w), b * ((l - rl) - (w - rw))),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=5,
    minutes=10,
    workshop=True,
)  # fmt: skip

# --- 03.4 what the loss cannot see ---


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
    id="03.4",
    title="What the loss cannot see",
    kind="predict",
    truth=invisible_truth,
    cases=lambda generator: [()],
    wrong=(
        Wrong("a loss that punishes unlikely texts", lambda: {"both": "larger"},
              "That would be the loss of maximum likelihood on the texts. Add the same number to both log-ratios and take their difference."),
        Wrong("a loss that rewards unlikely texts", lambda: {"both": "smaller"},
              "The two changes enter the margin with opposite signs."),
        Wrong("the chosen one's sign", lambda: {"chosen": "larger"},
              "A larger margin means a label better explained, so a smaller loss."),
        Wrong("the chosen one does not count", lambda: {"chosen": "same"},
              "Its log-ratio is half of the margin."),
        Wrong("the rejected one's sign", lambda: {"rejected": "smaller"},
              "The rejected log-ratio enters the margin with a minus."),
        Wrong("the rejected one does not count", lambda: {"rejected": "same"},
              "Its log-ratio is the other half of the margin."),
        Wrong("the level of the reward counts, upwards", lambda: {"reward + f(x)": "larger"},
              "Bradley-Terry sees only the difference of two rewards at the same prompt."),
        Wrong("the level of the reward counts, downwards", lambda: {"reward + f(x)": "smaller"},
              "Bradley-Terry sees only the difference of two rewards at the same prompt."),
    ),
    difficulty=2,
    importance=4,
    minutes=5,
)  # fmt: skip

EXERCISES = (REWARD, LOG_PARTITION, LOSS, INVISIBLE)
