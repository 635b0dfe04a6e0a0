"""04 The gradient and beta: what pulls, how hard, what beta decides, and how both may fall."""

import functools
import math
import statistics
from fractions import Fraction

import sympy
import torch

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.losses import dpo_loss

BETA, DELTA = sympy.Symbol("beta", positive=True), sympy.Symbol("Delta", real=True)


def slope_truth(beta, Delta):
    """Differentiated by sympy, not by hand."""
    d = sympy.Dummy(real=True)
    return sympy.diff(sympy.log(1 + sympy.exp(-beta * d)), d).subs(d, Delta)


def sigma(z):
    return 1 / (1 + sympy.exp(-z))


def slope(beta, Delta):
    return -beta / (1 + sympy.exp(beta * Delta))


SLOPE = Exercise(
    "04.1", "The slope of the loss", "derive", difficulty=1, importance=4, minutes=5,
    truth=slope_truth, cases=lambda generator: [(BETA, DELTA)],
    right=(
        slope,
        lambda b, d: -b / (1 + sympy.exp(b * d)),
        lambda b, d: b * (sigma(b * d) - 1),
        lambda b, d: -b * (1 - sympy.tanh(b * d / 2)) / 2,
    ),
    wrong=(
        Wrong("beta is missing inside the sigmoid", "beta * Delta -> Delta", "The chain rule multiplies by an inner derivative, but the argument of the sigmoid stays what it was."),
        Wrong("the weight grows with the margin", "Delta = -Delta", "A pair that is ranked rightly by far should hardly pull at all: try a large Delta."),
        Wrong("the logarithm is forgotten", lambda b, d: -b * sigma(b * d) * sigma(-b * d), "That is the slope of -sigma. The logarithm outside it divides by its argument."),
        Wrong("only its value at the start", "Delta = 0 * Delta", "That holds where Delta is 0. What becomes of the pull as the margin grows?"),
        Wrong("divided by beta", lambda b, d: -sigma(-b * d) / b, "The inner function is beta Delta; how fast does it grow when Delta does?"),
        Wrong("the second derivative", lambda b, d: b**2 * sigma(b * d) * sigma(-b * d), "You differentiated once too often: that is how fast the pull fades."),
        Wrong("the loss itself", lambda b, d: -sympy.log(sigma(b * d)), "That is the loss; the task asks for its derivative by Delta."),
        Wrong("no sigmoid", "1 + sympy.exp(beta * Delta) -> sympy.exp(beta * Delta)", "That is close for large margins only. At Delta = 0 the slope should be half of -beta."),
    ),
)  # fmt: skip


def gradient_cases(generator):
    def logps(n, scale):
        drawn = -80 + scale * torch.randn(4, n, generator=generator, dtype=torch.float64)
        return tuple(drawn)

    zero = torch.zeros(4, dtype=torch.float64)
    extreme = torch.tensor([1e4, -1e4, 3.0, 0.0], dtype=torch.float64)
    return [
        (*logps(1, 2.0), 0.5),
        (*logps(4, 10.0), 0.1),
        (*logps(7, 4.0), 0.7),
        Edge("the numbers are extreme", (extreme, zero, zero, zero, 2.0)),
    ]


def gradient_truth(chosen, rejected, reference_chosen, reference_rejected, beta):
    """By autograd, of Bradley-Terry's log-likelihood as a log-softmax of the two rewards."""
    chosen, rejected = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
    with torch.enable_grad():
        rewards = torch.stack((chosen - reference_chosen, rejected - reference_rejected))
        loss = -(beta * rewards).log_softmax(0)[0].mean()
        return torch.autograd.grad(loss, (chosen, rejected))


def dpo_gradient(chosen, rejected, reference_chosen, reference_rejected, beta):
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    size = beta * torch.sigmoid(-beta * margin) / len(chosen)
    return -size, size


GRADIENT = Exercise(
    "04.2", "The gradient by hand", "implement", difficulty=3, importance=4, minutes=10,
    truth=gradient_truth, cases=gradient_cases, tolerance=1e-10,
    right=(
        dpo_gradient,
        lambda w, l, rw, rl, b: (lambda p: (b * (p - 1) / p.numel(), b * (1 - p) / p.numel()))(torch.sigmoid(b * (w - l - rw + rl))),
        lambda w, l, rw, rl, b: (lambda s: (-s, s))(b / w.shape[0] / (1 + (b * ((w - rw) - (l - rl))).exp())),
        lambda w, l, rw, rl, b: (lambda p: (b / len(w) * (p[0] - 1), b / len(w) * p[1]))(torch.stack((b * (w - rw), b * (l - rl))).softmax(0)),
    ),
    wrong=(
        Wrong("beta is missing in the weight", "-beta * margin -> -margin", "The weight compares rewards, not log-ratios."),
        Wrong("divided by beta in the weight", "-beta * margin -> -margin / beta", "The implicit reward is beta times the log-ratio: a small beta makes rewards small."),
        Wrong("no weight", "torch.sigmoid(-beta * margin) -> torch.ones_like(margin)", "Then every pair pulls equally for ever. What tells a settled pair from one that is ranked wrongly?"),
        Wrong("the weight at the start, for ever", "torch.sigmoid(-beta * margin) -> torch.full_like(margin, 0.5)", "One half is right where policy and reference agree. The policy has moved since."),
        Wrong("the logarithm is forgotten", "torch.sigmoid(-beta * margin) -> torch.sigmoid(beta * margin) * torch.sigmoid(-beta * margin)", "That is the slope of -sigma, which vanishes for pairs that are badly wrong, too. The loss is its logarithm."),
        Wrong("one average weight for all pairs", "return -size, size -> size = size.mean().expand_as(margin); return -size, size", "Pair i's log-probability enters only loss i: its entry has its own weight, whatever the other pairs do."),
        Wrong("the weight of the average margin", "torch.sigmoid(-beta * margin) -> torch.sigmoid(-beta * margin.mean()).expand_as(margin)", "The mean is taken of the losses, not of the margins: each pair keeps its own weight."),
        Wrong("the loss as weight", "torch.sigmoid(-beta * margin) -> torch.nn.functional.softplus(-beta * margin, threshold=1000)", "A gradient contains the slope of the log-sigmoid, not its value. However wrong a pair is, its weight stays below 1."),
        Wrong("exponentials overflow", "torch.sigmoid(-beta * margin) -> (-beta * margin).exp() / (1 + (-beta * margin).exp())", "The exponential of ten thousand is infinite, and infinity over infinity is not a number. torch has a function for this."),
    ),
)  # fmt: skip


def metrics_cases(generator):
    def drawn(n, ties=0):
        """In eighths of a nat (and beta a power of 2), so that a tie is exact in any order."""
        eighths = torch.randint(-200, 200, (4, n), generator=generator).double() / 8
        policy, reference = eighths[:2] - 60, eighths[2:] - 60
        ratio = policy[0, :ties] - reference[0, :ties]
        policy[1, :ties] = reference[1, :ties] + ratio
        order = torch.randperm(n, generator=generator)
        return tuple(torch.cat((policy, reference))[:, order])

    start = drawn(3)[:2]
    wide = torch.tensor([0.0, -1e4, 5.0, 0.0, 0.0], dtype=torch.float64)  # one pair far off
    far, tied = drawn(5, ties=1), drawn(4, ties=3)
    return [
        (*drawn(1), 0.5),
        (*start, *start, 0.125),  # before the first step: all pairs tie
        (*drawn(6, ties=3), 0.125),
        (far[0] + wide, *far[1:], 0.25),
        (*drawn(8, ties=1), 2.0),
        Edge("two rewards are nearly equal, but not quite", (tied[0] + 2.0**-30, *tied[1:], 0.5)),
    ]


def metrics_truth(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Pair by pair in exact fractions."""
    four = (chosen, rejected, reference_chosen, reference_rejected)
    pairs = [tuple(map(Fraction, row)) for row in zip(*(t.tolist() for t in four))]
    rewards = [(Fraction(beta) * (w - rw), Fraction(beta) * (l - rl)) for w, l, rw, rl in pairs]
    points = [Fraction(2 if w > l else 1 if w == l else 0, 2) for w, l in rewards]
    columns = ([r[0] for r in rewards], [r[1] for r in rewards], [a - b for a, b in rewards])
    return tuple(float(sum(column) / len(pairs)) for column in (*columns, points))


def metrics(chosen, rejected, reference_chosen, reference_rejected, beta):
    reward_chosen = beta * (chosen - reference_chosen)
    reward_rejected = beta * (rejected - reference_rejected)
    margins = reward_chosen - reward_rejected
    accuracies = (1 + torch.sign(margins)) / 2
    return tuple(x.mean().item() for x in (reward_chosen, reward_rejected, margins, accuracies))


METRICS = Exercise(
    "04.3", "What a run logs", "implement", difficulty=2, importance=4, minutes=10,
    truth=metrics_truth, cases=metrics_cases,
    right=(
        metrics,
        lambda w, l, rw, rl, b: (
            (lambda m: (b * (w - rw).mean(), b * (l - rl).mean(), b * m.mean(), 0.5 * (m > 0).double().mean() + 0.5 * (m >= 0).double().mean()))((w - l) - (rw - rl))
        ),
        lambda w, l, rw, rl, b: tuple(
            (b * x).mean().item() for x in (w - rw, l - rl, w - rw - l + rl)
        ) + (torch.heaviside(w - rw - l + rl, torch.tensor(0.5, dtype=w.dtype)).mean().item(),),
    ),
    wrong=(
        Wrong("ties count as wrong", "(1 + torch.sign(margins)) / 2 -> (margins > 0).double()", "Before the first step every pair ties, and an accuracy of 0 would look like a disaster. What would a coin score?"),
        Wrong("ties count as right", "(1 + torch.sign(margins)) / 2 -> (margins >= 0).double()", "Before the first step every pair ties, and nothing has been learned that could deserve an accuracy of 1."),
        Wrong("accuracy without the reference", "torch.sign(margins) -> torch.sign(chosen - rejected)", "Which text is more likely is another question, and mostly one of length. Accuracy compares implicit rewards."),
        Wrong("accuracy of the average pair", "torch.sign(margins) -> torch.sign(margins.mean())", "One pair with a huge margin would decide for all. Score each pair, then take the mean."),
        Wrong("a probability for the accuracy", "(1 + torch.sign(margins)) / 2 -> torch.sigmoid(margins)", "The sigmoid is the policy's confidence. Accuracy counts only who is ahead, by however little."),
        Wrong("the chosen reward alone decides", "torch.sign(margins) -> torch.sign(reward_chosen)", "The level of a reward means nothing: only the two rewards of one pair can be compared."),
        Wrong("the margin without the reference", "margins, accuracies -> beta * (chosen - rejected), accuracies", "The margin must be the difference of the two rewards beside it."),
        Wrong("the margin without its sign", "margins, accuracies -> margins.abs(), accuracies", "A pair that is ranked wrongly has a negative margin and must pull the average down."),
        Wrong("ratios without a logarithm", "(chosen - reference_chosen) -> (chosen - reference_chosen).exp() | (rejected - reference_rejected) -> (rejected - reference_rejected).exp()",
              "The reward is beta times the logarithm of the ratio, and differences of log-probabilities are logarithms already."),
        Wrong("the last pair alone", "x.mean() -> x[-1]", "Every pair of the batch counts: take the mean over all of them."),
    ),
)  # fmt: skip


@functools.cache
def beta_truth():
    """Computed: gradients by differences, optima by minimising the loss itself over all policies."""
    low, high = 0.5, 2.0

    def loss(margin, beta):
        return math.log1p(math.exp(-beta * margin))

    def slope(margin, beta, by=1e-5):
        return (loss(margin + by, beta) - loss(margin - by, beta)) / (2 * by)

    def weight(margin, beta):  # the policy's chance, as a judge, of choosing the wrong one
        right, wrong = math.exp(beta * margin / 2), math.exp(-beta * margin / 2)
        return wrong / (right + wrong)

    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    labels = exact.preferences(torch.tensor([0.2, 1.1, -0.5], dtype=torch.float64))

    def optimum(beta, scale=1.0):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        exact.minimise(
            lambda: (
                scale
                * exact.population_loss(
                    lambda pairs: dpo_loss(pairs, beta), logits.log_softmax(-1), reference, labels
                )
            ),
            [logits],
        )
        policy = logits.detach().log_softmax(-1)
        ratios = policy - reference
        return exact.kl(policy, reference).item(), beta * (ratios[1] - ratios[0]).item()

    def word(before, after):
        if math.isclose(before, after, rel_tol=1e-4):
            return "same"
        return "larger" if after > before else "smaller"

    at_low, at_high = optimum(low), optimum(high)
    return {
        "gradient at the start": word(abs(slope(0, low)), abs(slope(0, high))),
        "weight at the start": word(weight(0, low), weight(0, high)),
        "weight, wrong pair": word(weight(-10, low), weight(-10, high)),
        "weight, right pair": word(weight(10, low), weight(10, high)),
        "KL of the optimum": word(at_low[0], at_high[0]),
        "reward margin of the optimum": word(at_low[1], at_high[1]),
        "KL, loss times 10": word(at_low[0], optimum(low, 10.0)[0]),
    }


WHICH_WAY = Exercise(
    "04.4", "Which way beta turns", "predict", difficulty=3, importance=5, minutes=6, workshop=True,
    truth=beta_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a large beta taken for a long leash", {"KL of the optimum": "larger"}, "In the objective beta is the price of a nat of KL. What does one do with what becomes dearer?"),
        Wrong("beta taken for a mere learning rate", {"KL of the optimum": "same"}, "A scale in front of the loss cannot move the optimum, but beta also stands inside the sigmoid."),
        Wrong("the loss's scale taken for beta", {"KL, loss times 10": "smaller"}, "Where a function is smallest, ten times the function is smallest too."),
        Wrong("a larger loss taken for a longer way", {"KL, loss times 10": "larger"}, "Where a function is smallest, ten times the function is smallest too."),
        Wrong("beta in front forgotten", {"gradient at the start": "same"}, "That is so for the weight. What else stands in the gradient, in front of it?"),
        Wrong("a large beta taken for a weak gradient", {"gradient at the start": "smaller"}, "At the start the weight does not depend on beta; look at the factor in front of it."),
        Wrong("the start's weight mixed up with its gradient", {"weight at the start": "larger"}, "At the start the margin is 0. What is beta times 0, and the sigmoid of that?"),
        Wrong("a large beta taken for a light weight", {"weight at the start": "smaller"}, "At the start the margin is 0. What is beta times 0, and the sigmoid of that?"),
        Wrong("gentler on wrong pairs", {"weight, wrong pair": "smaller"}, "Put the margin -10 into sigma(-beta Delta): does a larger beta bring it nearer to 1 or to 1/2?"),
        Wrong("wrong pairs beyond beta's reach", {"weight, wrong pair": "same"}, "Put the margin -10 into sigma(-beta Delta) with beta 0.05, then with 0.5."),
        Wrong("harder on right pairs", {"weight, right pair": "larger"}, "Which beta is satisfied with a small margin and then lets go?"),
        Wrong("right pairs beyond beta's reach", {"weight, right pair": "same"}, "Put the margin 10 into sigma(-beta Delta) with beta 0.05, then with 0.5."),
        Wrong("beta multiplied, margin forgotten", {"reward margin of the optimum": "larger"}, "Beta grows, but the log-ratios of the optimum shrink. By how much: what is pi* for a reward r?"),
        Wrong("the margin shrinks, beta forgotten", {"reward margin of the optimum": "smaller"}, "The margin in nats shrinks, but a reward multiplies it by beta. Which rewards explain the labels best?"),
    ),
)  # fmt: skip


def run_log(generator, steps, window, quiet, end, begin=(0.0, 0.0), spread=0.0, drift=0.0):
    """A run whose log-ratios are `begin`, and in the window `end` on average, each (chosen,
    rejected); `spread` is how much the window's first steps exceed its last one, and `drift` how
    much the reference's log-probabilities rise over the run, because later batches are easier.
    """
    scale = 1 + torch.rand(1, generator=generator, dtype=torch.float64).item() / 4
    columns = []
    for before, after in zip(begin, end):
        ratios = torch.full((steps,), before, dtype=torch.float64)
        tilt = torch.ones(window, dtype=torch.float64)
        tilt[-1] = 1 - window
        ratios[-window:] = after + spread * tilt / window
        level = -70 + 10 * torch.rand(1, generator=generator, dtype=torch.float64)
        noise = torch.rand(steps, generator=generator, dtype=torch.float64) / 4
        columns.append((scale * ratios, level + noise + drift * torch.linspace(0, 1, steps)))
    (chosen, of_chosen), (rejected, of_rejected) = columns
    return (of_chosen + chosen, of_rejected + rejected, of_chosen, of_rejected, window, scale * quiet)  # fmt: skip


def reading_cases(generator):
    def run(*arguments, **settings):
        return run_log(generator, *arguments, **settings)

    start = run(3, 2, 1.0, (0.0, 0.0))
    return [
        Edge("both fall, the rejected one further", run(2, 1, 0.5, (-2.0, -8.0))),
        Edge("as one hopes", run(3, 1, 0.2, (2.0, -3.0))),
        Edge("against the labels", run(4, 2, 0.5, (-3.0, 2.0))),
        Edge("against the labels while both fall", run(4, 1, 0.5, (-6.0, -2.0))),
        Edge("against the labels while both rise", run(4, 2, 0.5, (1.0, 4.0))),
        Edge("both rise, the chosen one further", run(5, 2, 0.3, (5.0, 2.0))),
        Edge("both fall alike", run(5, 3, 0.5, (-5.0, -5.1))),
        Edge("a margin within the noise", run(5, 3, 1.0, (0.6, -0.2))),
        Edge("the same margin beyond it", run(5, 3, 0.4, (0.6, -0.2))),
        Edge("the chosen one slips within the noise", run(6, 4, 0.5, (-0.2, -4.0))),
        Edge("the chosen one holds", run(6, 3, 0.5, (0.2, -4.0))),
        Edge("rose first, then fell", run(8, 3, 0.5, (-2.0, -4.0), begin=(8.0, -4.0))),
        Edge("fell first, then recovered", run(8, 3, 0.5, (2.0, -4.0), begin=(-6.0, -9.0))),
        Edge("the last step alone is low", run(8, 5, 0.5, (0.5, -2.0), spread=4.0)),
        Edge("the last step alone is high", run(8, 5, 0.5, (-1.5, -4.0), spread=-5.0)),
        Edge("one step far down outweighs four", run(8, 5, 0.5, (-1.5, -4.0), spread=10.0)),
        Edge("the first step of the window saves it", run(6, 2, 0.5, (1.0, -2.0), spread=8.0)),
        Edge("the window is the whole run", run(3, 3, 0.5, (-1.0, -3.0), spread=1.0)),
        Edge("later batches are easier", run(7, 2, 0.5, (-3.0, -6.0), drift=40.0)),
        Edge("later batches are harder", run(7, 2, 0.5, (3.0, -1.0), drift=-40.0)),
        Edge("before the first step", (start[2], start[3], start[2], start[3], 2, 0.0)),
        Edge("only the rejected one has moved", (start[2], start[3] - 1, start[2], start[3], 2, 0.0)),
    ]


def reading_truth(chosen, rejected, reference_chosen, reference_rejected, window, quiet):
    """Step by step in Python; the two movements index a table."""

    def moved(policy, reference):
        pairs = list(zip(policy.tolist(), reference.tolist()))[len(policy) - window :]
        return statistics.fmean(p - q for p, q in pairs)

    def sense(x):
        return "+" if x > quiet else "-" if x < -quiet else "0"

    up = moved(chosen, reference_chosen)
    margin = sense(up - moved(rejected, reference_rejected))
    table = {"++": "healthy", "+0": "healthy", "+-": "displacement", "0": "flat", "-": "wrong way"}
    return table[margin + sense(up)] if margin == "+" else table[margin]


def diagnosis(chosen, rejected, reference_chosen, reference_rejected, window, quiet):
    c = (chosen - reference_chosen)[-window:].mean().item()
    l = (rejected - reference_rejected)[-window:].mean().item()
    if c - l < -quiet:
        return "wrong way"
    if c - l <= quiet:
        return "flat"
    if c < -quiet:
        return "displacement"
    return "healthy"


READING = Exercise(
    "04.5", "Read a run", "diagnose", difficulty=3, importance=5, minutes=10,
    truth=reading_truth, cases=reading_cases,
    right=(
        diagnosis,
        lambda w, l, rw, rl, n, q: (lambda c, m: "wrong way" if m < -q else "flat" if m <= q else "displacement" if c < -q else "healthy")(
            (w[-n:].mean() - rw[-n:].mean()).item(), (w - rw - l + rl)[-n:].mean().item()),
        lambda w, l, rw, rl, n, q: (lambda c, r: "healthy" if c - r > q and c >= -q else "displacement" if c - r > q else "wrong way" if r - c > q else "flat")(
            sum((w - rw).tolist()[len(w) - n:]) / n, sum((l - rl).tolist()[len(w) - n:]) / n),
    ),
    wrong=(
        Wrong("only the margin is read", "\"displacement\" -> \"healthy\"", "The margin grows as well when both fall: the loss cannot tell the two apart, so look at the chosen one itself."),
        Wrong("raw log-probabilities against the run's start", "reference_chosen, reference_rejected = chosen[:window].mean(), rejected[:window].mean()", "Every batch has other texts, some easier than others. What does each step have to be compared with?"),
        Wrong("measured from the run's first step", "c = (chosen - reference_chosen)[-window:] -> c = ((chosen - reference_chosen)[-window:] - (chosen - reference_chosen)[0]) | l = (rejected - reference_rejected)[-window:] -> l = ((rejected - reference_rejected)[-window:] - (rejected - reference_rejected)[0])",
              "Zero is where the policy equals the reference, and a log may begin later than that."),
        Wrong("the last step alone", "window = 1", "One batch is a noisy witness: the task takes the mean over the window."),
        Wrong("the whole run", "window = len(chosen)", "The task asks where the run has come to; its early steps must not blur that."),
        Wrong("the first steps for the last", "[-window:] -> [:window]", "Which end of the tensor does your slice take?"),
        Wrong("the sum over the window", ".mean() -> .sum()", "The longer the window, the larger a sum becomes, but quiet is a change in nats of one step's average pair."),
        Wrong("the median for the mean", ".mean() -> .median()", "The task says mean: one step far off counts in it, as it should here."),
        Wrong("displacement is asked before the margin", "return \"wrong way\" -> return \"displacement\" if c < -quiet else \"wrong way\" | return \"flat\" -> return \"displacement\" if c < -quiet else \"flat\"",
              "Displacement means that the margin grew all the same. Where it shrank or stood still, that is the finding: mind the order of the rules."),
        Wrong("both falling is displacement, whatever the margin did", "return \"wrong way\" -> return \"displacement\" if max(c, l) < -quiet else \"wrong way\" | return \"flat\" -> return \"displacement\" if max(c, l) < -quiet else \"flat\"",
              "Displacement means that the margin grew all the same. Which rule comes first when both fell alike?"),
        Wrong("healthy only where the two part in opposite directions", "return \"healthy\" -> return \"healthy\" if c > 0 > l else \"displacement\"", "Displacement is about the chosen one only. Where it rose, or slipped within the noise, is there anything to complain of?"),
        Wrong("the rejected one decides", "if c < -quiet -> if l < -quiet", "A falling rejected completion is what one wants. Which of the two must not fall?"),
        Wrong("flat by the chosen one", "if c - l < -quiet -> if abs(c) > quiet and c < l | if c - l <= quiet -> if abs(c) <= quiet", "A run learns where the margin grows, even if the chosen one stands still. What does flat refer to?"),
        Wrong("quiet is ignored", "quiet = 0", "Batches are noisy: changes up to quiet count as none, in the margin and in the chosen one."),
        Wrong("quiet is ignored for the margin", "c - l < -quiet -> c <= l | c - l <= quiet -> False", "A margin within the noise, of either sign, says nothing yet: which name has the task for that?"),
        Wrong("quiet is ignored for the chosen one", "if c < -quiet -> if c < 0", "A slip within the noise is no fall: the same bound holds for the chosen one as for the margin."),
        Wrong("always healthy", "result = \"healthy\"", "Take the example by hand: which way did the chosen one move?"),
    ),
)  # fmt: skip

EXERCISES = (SLOPE, GRADIENT, METRICS, WHICH_WAY, READING)
