"""18 Myth lab: the first step, what a noisy label is worth, and what moves the optimum."""

import functools

import sympy
import torch
from torch import Tensor

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.losses import PairLogps, dpo_loss


def step_cases(generator):
    def case(answers, size, beta, w=0, l=1):
        features = torch.randn(answers, size, generator=generator, dtype=torch.float64)
        offsets = torch.randn(answers, generator=generator, dtype=torch.float64)
        return features, offsets, w, l, beta

    def similar(beta):
        """Both point the same way, the rejected further, and a third has most probability."""
        features = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 0.2]], dtype=torch.float64)
        shift = 0.1 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
        return features + shift, torch.tensor([-1.0, -1.5, 2.0], dtype=torch.float64), 0, 1, beta

    def raised(beta):
        """The same the other way round: the rejected one rises."""
        features, offsets, w, l, _ = similar(beta)
        return features, offsets, l, w, beta

    return [
        case(3, 2, 0.5),
        case(5, 3, 0.1, w=2, l=4),
        Edge("the chosen one falls", similar(0.3)),
        Edge("the rejected one rises", raised(1.0)),
        case(8, 2, 2.0, w=7, l=3),
    ]


def step_truth(features: Tensor, offsets: Tensor, w: int, l: int, beta: float) -> Tensor:
    """Autograd twice: the loss's gradient, then log pi along the step against it."""

    def logps(theta):
        return (offsets + features @ theta).log_softmax(0)

    theta = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    p, start = logps(theta), logps(theta.detach())
    loss = dpo_loss(PairLogps(p[w], p[l], start[w], start[l]), beta)
    (slope,) = torch.autograd.grad(loss, theta)
    _, change = torch.autograd.functional.jvp(logps, theta.detach(), -slope)
    return change[[w, l]]


def first_step(features, offsets, w, l, beta):
    expected = offsets.softmax(0) @ features
    g_w, g_l = features[w] - expected, features[l] - expected
    step = beta / 2 * (g_w - g_l)
    return torch.stack([g_w @ step, g_l @ step])


def by_products(features, offsets, w, l, beta):
    g = features - (offsets.softmax(0)[:, None] * features).sum(0)
    inner = g @ g.T
    return beta / 2 * (inner[w, w] - inner[w, l]), beta / 2 * (inner[l, w] - inner[l, l])


STEP = Exercise(
    "18.1", "A step that lowers the chosen", "implement", difficulty=3, importance=4, minutes=10,
    truth=step_truth, cases=step_cases,
    right=(
        first_step,
        by_products,
        lambda f, o, w, l, b: torch.stack([(f[k] - o.softmax(0) @ f) @ (f[w] - f[l]) for k in (w, l)]) * b / 2,
    ),
    wrong=(
        Wrong("the expected features are forgotten", "expected = offsets.softmax(0) @ features -> expected = 0", "The softmax's normaliser depends on theta as well: raise every completion and none has gained. What must be taken off the features?"),
        Wrong("a plain mean of the features", "offsets.softmax(0) @ features -> features.mean(0)", "Completions are not equally likely. With which weights does the derivative of log-sum-exp average the features?"),
        Wrong("weights that are not normalised", "offsets.softmax(0) -> offsets.exp()", "The weights of an expectation sum to 1: what turns offsets into probabilities?"),
        Wrong("the sigmoid at the start is forgotten", "beta / 2 -> beta", "The gradient's weight is beta times sigma(-beta Delta). The policy is still the reference: what is Delta, and what is sigma of it?"),
        Wrong("beta is forgotten", "beta / 2 -> 1 / 2", "The gradient of -log sigma(beta Delta) has a factor beta in front of everything."),
        Wrong("uphill", "(g_w - g_l) -> (g_l - g_w)", "Gradient descent goes against the gradient of the loss. After one step the margin must be larger."),
        Wrong("only the chosen one pulls", "beta / 2 * (g_w - g_l) -> beta / 2 * g_w", "This is supervised fine-tuning on the chosen one. What does the rejected one do to theta?"),
        Wrong("only the rejected one pushes", "beta / 2 * (g_w - g_l) -> -beta / 2 * g_l", "The chosen one is in the gradient as well, with the other sign."),
        Wrong("two changes of equal size", "g_l @ step -> -(g_w @ step)", "That is the claim to be refuted. Each log-probability changes by its own gradient times the step."),
        Wrong("each changes by its own pull alone", "torch.stack([g_w @ step, g_l @ step]) -> beta / 2 * torch.stack([g_w @ g_w, -(g_l @ g_l)])", "Parameters are shared: the push on one completion moves the other too. Which inner product is missing?"),
        Wrong("the rejected one first", "[g_w @ step, g_l @ step] -> [g_l @ step, g_w @ step]", "The first value is the chosen one's change."),
        Wrong("the change of the margin", "torch.stack([g_w @ step, g_l @ step]) -> torch.stack([(g_w - g_l) @ step, (g_w - g_l) @ step])", "The margin is sure to grow; the question is about each of the two log-probabilities."),
    ),
)  # fmt: skip


def worth_cases(generator):
    """P and eps as expressions in positive symbols: P between 0 and 1, eps between 0 and 1/2."""
    a, b = sympy.symbols("a b", positive=True)
    return [(a / (1 + a), 1 / (2 * (1 + b)))]


@functools.cache
def worth_solved():
    """Fisher's information of a yes-no answer about z, differentiated by sympy, noisy over clean."""
    z, P, eps = sympy.symbols("z P eps", positive=True)
    right = 1 / (1 + sympy.exp(-z))

    def information(chance):
        return sympy.diff(chance, z) ** 2 / (chance * (1 - chance))

    ratio = information((1 - eps) * right + eps * (1 - right)) / information(right)
    return sympy.Lambda((P, eps), sympy.simplify(ratio.subs(z, sympy.log(P / (1 - P)))))


def worth_truth(P, eps):
    return worth_solved()(P, eps)


def worth(P, eps):
    q = (1 - eps) * P + eps * (1 - P)
    return (1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q))


WORTH = Exercise(
    "18.2", "What a noisy label is worth", "derive", difficulty=4, importance=3, minutes=12,
    truth=worth_truth, cases=worth_cases,
    right=(
        worth,
        lambda P, e: ((1 - 2 * e) * P * (1 - P)) ** 2 / ((P + e - 2 * e * P) * (1 - P - e + 2 * e * P)) / (P * (1 - P)),
        lambda P, e: (1 - 2 * e) ** 2 * P * (1 - P) / ((1 - 2 * e) ** 2 * P * (1 - P) + e * (1 - e)),
    ),
    wrong=(
        Wrong("an even pair is taken for every pair", "return (1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q)) -> return (1 - 2 * eps) ** 2", "This is right where P is one half. For a clear pair, a turned label is a surprise that the clean ones would almost never give: how large is q (1 - q) there?"),
        Wrong("the slope is not squared", "(1 - 2 * eps) ** 2 -> (1 - 2 * eps)", "Information is the slope of the chance squared, over its variance. By which factor does noise change the slope?"),
        Wrong("the share of right labels", "return (1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q)) -> return 1 - eps", "That is how many labels are right. But the wrong ones do not only say nothing: they speak against."),
        Wrong("right labels minus wrong ones", "return (1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q)) -> return 1 - 2 * eps", "That is the factor of the slope. Information goes with its square, and with the variance."),
        Wrong("the noise's variance is forgotten", "/ (q * (1 - q)) -> ", "Each information has the variance of its own answers below."),
        Wrong("upside down", "return (1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q)) -> return (q * (1 - q)) / ((1 - 2 * eps) ** 2 * P * (1 - P))", "This is how many noisy labels are worth one clean one. The task asks for the other way round."),
        Wrong("only the chance changes", "(1 - 2 * eps) ** 2 * P * (1 - P) / (q * (1 - q)) -> q * (1 - q) / (P * (1 - P))", "This is right for clean labels of a pair with chance q. Noise also makes the chance less steep in the margin."),
        Wrong("labels are replaced by coins, not turned", "eps * (1 - P) -> eps / 2 | (1 - 2 * eps) -> (1 - eps)", "A coin turns a label only half of the time. Here a share eps is turned."),
        Wrong("turned with chance eps twice", "q = (1 - eps) * P + eps * (1 - P) -> q = (1 - 2 * eps) * P + 2 * eps * (1 - P)", "What is the chance of the label w, if w wins with chance P, and a label is turned with chance eps?"),
    ),
)  # fmt: skip


def moves_truth() -> dict[str, str]:
    """Each change made in a small world, and the loss minimised again."""
    generator = torch.Generator().manual_seed(18)
    reference, other = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    rarely = torch.ones(5, 5, dtype=torch.float64)
    rarely[0] = rarely[:, 0] = 0.01

    def end(beta=0.5, scale=1.0, r=rewards, ref=reference, start=reference, shown=None, eps=0.0):
        free = start.clone().requires_grad_()
        labels = exact.preferences(r)
        labels = (1 - eps) * labels + eps * labels.T

        def loss():
            p = free.log_softmax(0)
            scaled = lambda pairs: scale * dpo_loss(pairs, beta)  # noqa: E731
            return exact.population_loss(scaled, p, ref, labels, shown)

        exact.minimise(loss, [free])
        return free.detach().log_softmax(0)

    ends = {
        "loss x 10": end(scale=10.0),
        "beta x 10": end(beta=5.0),
        "reward + 3": end(r=rewards + 3),
        "reward x 10": end(r=10 * rewards),
        "both x 10": end(r=10 * rewards, beta=5.0),
        "rare": end(shown=rarely),
        "turned": end(eps=0.2),
        "reference": end(ref=other, start=other),
        "start": end(start=other),
    }
    before = end()
    far = {name: exact.total_variation(p, before).item() for name, p in ends.items()}
    return {name: "moves" if tv > 1e-3 else "stays" for name, tv in far.items()}


MOVES = Exercise(
    "18.3", "What moves the optimum?", "predict", difficulty=2, importance=5, minutes=8,
    truth=moves_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a factor before the loss counts", {"loss x 10": "moves"}, "Where a function is smallest, ten times the function is smallest too."),
        Wrong("beta is only a factor", {"beta x 10": "stays"}, "Beta stands inside the sigmoid: at the optimum the log-ratios differ by the reward's difference over beta."),
        Wrong("the level of the reward counts", {"reward + 3": "moves"}, "Labels come from differences of rewards at the same prompt. What happens to those?"),
        Wrong("the scale of the reward does not count", {"reward x 10": "stays"}, "Ten times the differences are far surer labels. What do these say about the log-ratios?"),
        Wrong("reward and beta do not cancel", {"both x 10": "moves"}, "The optimum is pi_ref exp(r / beta) / Z. What happens to r / beta?"),
        Wrong("rare pairs count less at the optimum", {"rare": "moves"}, "The labels are endless and Bradley-Terry's, so one policy fits all pairs at once: weights matter only where pairs disagree."),
        Wrong("even noise cancels out", {"turned": "stays"}, "Turned labels look like people who are less sure. Which reward would make such people?"),
        Wrong("the reference cancels", {"reference": "stays"}, "Only Z cancels. The log-ratios are fixed by the rewards, so the policy follows its reference."),
        Wrong("the start counts", {"start": "moves"}, "The loss reads the policy and the reference. If it has one minimum, where does a run that begins elsewhere end?"),
    ),
)  # fmt: skip

EXERCISES = (STEP, WORTH, MOVES)
