"""05 An exact world: the chain rule, the sequence KL from samples, noisy labels, and coverage."""

import decimal
import functools
import itertools
import math

import sympy
import torch
from torch import Tensor

from dpo_mini import exact
from dpo_mini.course.checks.engine import Edge, Exercise, Wrong
from dpo_mini.losses import dpo_loss


def text_cases(generator):
    def table(vocabulary, max_length, scale=1.5):
        """A row for each beginning without an end, those of full length included."""
        words = range(1, vocabulary)
        begins = [b for n in range(max_length + 1) for b in itertools.product(words, repeat=n)]
        draw = scale * torch.randn(len(begins), vocabulary, generator=generator).double()
        return {b: row.requires_grad_() for b, row in zip(begins, draw.unbind())}

    def unlikely(text, steps, by):
        rows = table(3, 3)
        for t in steps:
            moved = rows[text[:t]].detach().clone()
            moved[text[t]] -= by
            rows[text[:t]] = moved.requires_grad_()
        return rows, text

    def raised(text, by):
        rows = table(3, 2)
        return {b: (row.detach() + by).requires_grad_() for b, row in rows.items()}, text

    return [
        (table(3, 2), (1, 0)),
        Edge("cut by the limit", (table(3, 3), (2, 1, 2))),
        (table(3, 3), (1, 2, 0)),
        (table(2, 4), (1, 1, 1, 0)),
        Edge("the end at once", (table(4, 2), (0,))),
        Edge("a product of probabilities underflows", unlikely((2, 1, 0), (0, 1, 2), 300.0)),
        Edge("one probability underflows", unlikely((2, 1, 0), (1,), 1000.0)),
        Edge("exponentials overflow", raised((1, 2), 900.0)),
    ]


def text_truth(table: dict, text: tuple) -> Tensor:
    """The product of all probabilities, 60 digits exact, and the gradient by hand: 1 - p."""
    with decimal.localcontext(decimal.Context(prec=60)):
        product, slope = decimal.Decimal(1), 0.0
        for t, token in enumerate(text):
            row = table[text[:t]]
            weights = [decimal.Decimal(z).exp() for z in row.tolist()]
            product *= weights[token] / sum(weights)
            chances = row.new_tensor([float(w / sum(weights)) for w in weights])
            direction = -chances
            direction[token] += 1
            slope = slope + (direction * (row - row.detach())).sum()
        return slope + float(product.ln())


def text_logp(table, text):
    steps = [table[text[:t]].log_softmax(-1)[text[t]] for t in range(len(text))]
    return torch.stack(steps).sum()


TEXT = Exercise(
    "05.1", "The log-probability of a text", "implement", difficulty=2, importance=4, minutes=8,
    truth=text_truth, cases=text_cases, tolerance=1e-9,
    right=(
        text_logp,
        lambda q, y: torch.stack([q[y[:t]] for t in range(len(y))]).log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum(),
        lambda q, y: -torch.nn.functional.cross_entropy(torch.stack([q[y[:t]] for t in range(len(y))]), torch.tensor(y), reduction="sum"),
        lambda q, y: sum(q[y[:t]][y[t]] - q[y[:t]].logsumexp(-1) for t in range(len(y))),
    ),
    wrong=(
        Wrong("the end is not counted", "in range(len(text))] -> in range(len(text)) if text[t] != 0] | torch.stack(steps).sum() -> sum(steps, 0 * table[()].sum())",
              "To stop is a choice as well: without its probability, a text and all its continuations would each claim the same mass, and the sum over all texts would exceed 1."),
        Wrong("a cut text pays for an end that it does not have", "torch.stack(steps).sum() -> torch.stack(steps).sum() + (table[text].log_softmax(-1)[0] if text[-1] else 0)", "A text that the limit cuts was never asked whether it wants to end: only tokens that stand in it count."),
        Wrong("logits that are not normalised", ".log_softmax(-1) -> ", "A logit says how likely a token is only beside the others of its row: what turns a row into log-probabilities?"),
        Wrong("only the last token", "torch.stack(steps).sum() -> steps[-1]", "All the tokens before it had to be drawn too; the chain rule has one factor for each."),
        Wrong("only the first token", "torch.stack(steps).sum() -> steps[0]", "This is the chance to begin like the text; it still has to go on like it."),
        Wrong("the beginning includes the token itself", "text[:t] -> text[: t + 1]", "A token is drawn from the row of what stands before it; nothing comes after an end, so no row is there."),
        Wrong("the beginning is one token short", "text[:t] -> text[: max(t - 1, 0)]", "The second token already sees the first: which slice of the text stands before token t?"),
        Wrong("only the token before is seen", "text[:t] -> text[max(t - 1, 0) : t]", "This is a bigram model. A row of this table belongs to a whole beginning, not to its last token."),
        Wrong("always the first row", "text[:t] -> ()", "Each token would be drawn as if nothing stood before it. The row changes with the beginning."),
        Wrong("the softmax runs over beginnings", "table[text[:t]].log_softmax(-1)[text[t]] -> torch.stack(list(table.values())).log_softmax(0)[list(table).index(text[:t]), text[t]]", "What must sum to 1: the chances of all next tokens after one beginning, or of one token after all beginnings?"),
        Wrong("the likeliest token instead of the text's", "log_softmax(-1)[text[t]] -> log_softmax(-1).max()", "This is what greedy decoding would have said; we ask about the token that stands in the text."),
        Wrong("the product of probabilities underflows", ".log_softmax(-1) -> .softmax(-1) | .sum() -> .prod().log()", "Three tokens of probability e^-300 are already below the smallest float64. Take logarithms before you combine them."),
        Wrong("log(softmax) underflows", ".log_softmax(-1)[text[t]] -> .softmax(-1)[text[t]].log()", "A probability of e^-1000 is 0 in float64 and its logarithm infinite. torch has one function that does both steps at once."),
        Wrong("the exponential of the logits overflows", "table[text[:t]].log_softmax(-1)[text[t]] -> table[text[:t]][text[t]] - table[text[:t]].exp().sum().log()", "Only differences of logits matter, but e^900 is beyond float64. torch.logsumexp takes the largest out first."),
        Wrong("the last token is not counted", "range(len(text)) -> range(len(text) - 1) | torch.stack(steps).sum() -> sum(steps, 0 * table[()].sum())", "A text of n tokens has n factors, the last token's included; check where your loop ends."),
        Wrong("a sigmoid for the softmax", "table[text[:t]].log_softmax(-1)[text[t]] -> torch.nn.functional.logsigmoid(table[text[:t]][text[t]])", "Next tokens compete with each other: their chances must sum to 1, which the sigmoid does not see to."),
        Wrong("the normaliser is detached", "table[text[:t]].log_softmax(-1)[text[t]] -> table[text[:t]][text[t]] - table[text[:t]].logsumexp(-1).detach()", "To raise one token is to lower the others: the gradient has to pass through the normaliser as well."),
    ),
)  # fmt: skip


def kl_cases(generator):
    def case(layout, policy_level=1.5, reference_level=2.5, signs=()):
        """`layout`: for each sample the lengths of prompt and completion; the rest is padding.

        `signs`: for each sample, those of its tokens' log-ratios, repeated; "" leaves them to chance.
        """
        length = max(prompt + completion for prompt, completion in layout) + 1
        shape = len(layout), length
        policy, reference, elsewhere, other = -torch.rand(
            4, *shape, generator=generator, dtype=torch.float64
        )
        policy, reference = policy * policy_level, reference * reference_level
        for row, of_row in enumerate(signs):
            for t in range(length if of_row else 0):
                sign = 1 if of_row[t % len(of_row)] == "+" else -1
                policy[row, t] -= 1.5
                reference[row, t] = policy[row, t] - sign * (0.2 - other[row, t])
        mask = torch.zeros(shape, dtype=torch.long)
        for row, (prompt, completion) in zip(mask, layout):
            row[prompt : prompt + completion] = 1
        policy = torch.where(mask.bool(), policy, 4 * elsewhere)
        return policy, torch.where(mask.bool(), reference, 4 * other), mask

    return [
        case([(1, 2)]),
        case([(2, 3), (1, 1), (3, 5)]),
        case([(1, 4), (2, 6), (4, 1), (1, 2), (3, 3)], 2.0, 2.0, ("+", "-", "", "", "+-")),
        Edge("an estimate is below 0", case([(2, 5), (1, 3)], 3.0, signs=("-", "-"))),
        Edge("far from the reference", case([(1, 30), (3, 12), (2, 1), (4, 7)], 0.5, 60.0)),
    ]


def kl_truth(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Token by token in plain Python."""
    logratios = []
    for p, q, m in zip(policy.tolist(), reference.tolist(), mask.tolist()):
        of_text, of_reference = (math.fsum(x for x, on in zip(row, m) if on) for row in (p, q))
        logratios.append(of_text - of_reference)
    return torch.tensor(math.fsum(logratios) / len(logratios), dtype=torch.float64)


def sampled_kl(policy, reference, mask):
    logratios = ((policy - reference) * mask).sum(1)
    return logratios.mean()


SAMPLED_KL = Exercise(
    "05.2", "The sequence KL from samples", "implement", difficulty=2, importance=5, minutes=8,
    truth=kl_truth, cases=kl_cases,
    right=(
        sampled_kl,
        lambda p, q, m: torch.where(m.bool(), p - q, 0.0).sum() / len(p),
        lambda p, q, m: torch.stack([a[on].sum() - b[on].sum() for a, b, on in zip(p, q, m.bool())]).mean(),
        lambda p, q, m: torch.einsum("nt,nt->n", p, m.double()).mean() - torch.einsum("nt,nt->n", q, m.double()).mean(),
    ),
    wrong=(
        Wrong("mean over all tokens", "return logratios.mean() -> return logratios.sum() / mask.sum()", "That is a KL per token, and it depends on the lengths. A policy's KL is that of whole texts: what does the chain rule do within one text?"),
        Wrong("mean over each completion's tokens", ".sum(1) -> .sum(1) / mask.sum(1)", "log pi(y) is a sum over the tokens of y, never a mean; only the samples are averaged."),
        Wrong("divided by n - 1", "logratios.mean() -> logratios.sum() / (len(policy) - 1)", "n - 1 belongs to the variance; the plain mean of n samples is unbiased already."),
        Wrong("the mean of the whole table", "((policy - reference) * mask).sum(1) -> ((policy - reference) * mask)", "That divides by the number of places, padding included, so that a longer table means a smaller KL. Only the samples are averaged."),
        Wrong("sum over samples, mean over places", ".sum(1) -> .sum(0)", "Which dimension holds the tokens of one text? That one is summed, the other averaged."),
        Wrong("the last token is not counted", "mask = mask * (mask.flip(1).cumsum(1).flip(1) > 1)", "The token that ends a completion was drawn as well, and policy and reference may disagree on it."),
        Wrong("the absolute value of each token", "(policy - reference) -> (policy - reference).abs()", "Single terms may be negative; only their expectation cannot. With absolute values the estimate would be too large on average."),
        Wrong("the absolute value of each completion", "logratios.mean() -> logratios.abs().mean()", "A sample may count below 0; take the signs away and the estimate is too large on average."),
        Wrong("negative samples cut off at 0", "logratios.mean() -> logratios.clamp(min=0).mean()", "The KL is never negative, but samples of it are. Raising those to 0 makes the average too large."),
        Wrong("another unbiased estimate, token by token", "(policy - reference) -> ((reference - policy).exp() - 1 + policy - reference)", "This is unbiased too, since each added ratio has mean 1, and never negative. The task asks for the plain one, the mean log-ratio."),
        Wrong("the ratio without its logarithm", "logratios.mean() -> logratios.exp().mean()", "Inside the expectation stands a difference of logarithms: no exponential is needed."),
        Wrong("each token weighted by its probability again", "(policy - reference) -> policy.exp() * (policy - reference)", "In a sum over all texts each has the weight pi(y). Samples from pi come that often by themselves."),
        Wrong("each text weighted by its probability again", "logratios.mean() -> ((policy * mask).sum(1).exp() * logratios).sum()", "This is right where every text is listed once. Samples from pi come as often as pi says: what is left is a plain mean."),
        Wrong("each text weighted by its share of the samples' probabilities", "logratios.mean() -> ((policy * mask).sum(1).softmax(0) * logratios).sum()", "Samples from pi come as often as pi says, so each already counts as it should: what is left is a plain mean."),
        Wrong("half the square", "logratios.mean() -> (logratios**2 / 2).mean()", "This is near the KL where the two models almost agree, and biased elsewhere. The KL is the expectation of the log-ratio itself."),
        Wrong("another unbiased estimate", "logratios.mean() -> (logratios + (-logratios).exp() - 1).mean()", "This is unbiased too, since the added ratio has mean 1, and it is never negative. The task asks for the plain one, the mean log-ratio."),
    ),
)  # fmt: skip


def stop_cases(generator):
    """P and eps as expressions in positive symbols, so that they stay between 0 and 1."""
    a, b, beta = sympy.symbols("a b beta", positive=True)
    return [(a / (1 + a), 1 / (1 + b), beta)]


@functools.cache
def stop_solved():
    """The loss differentiated and solved by sympy, for the odds e^(beta Delta)."""
    P, eps, odds = sympy.symbols("P eps odds", positive=True)
    right, wrong = sympy.log(1 + 1 / odds), sympy.log(1 + odds)
    w_wins = (1 - eps) * right + eps * wrong
    l_wins = (1 - eps) * wrong + eps * right
    slope = sympy.together(sympy.diff(P * w_wins + (1 - P) * l_wins, odds))
    (at,) = sympy.solve(sympy.numer(slope), odds)
    return sympy.Lambda((P, eps), at)


def stop_truth(P, eps, beta):
    return sympy.log(stop_solved()(P, eps)) / beta


def mixed(P, eps):
    return (1 - eps) * P + eps * (1 - P)


def logit(p):
    return sympy.log(p / (1 - p))


def stopping_margin(P, eps, beta):
    q = (1 - eps) * P + eps * (1 - P)
    return sympy.log(q / (1 - q)) / beta


STOP = Exercise(
    "05.3", "Where cDPO stops", "derive", difficulty=3, importance=3, minutes=10,
    truth=stop_truth, cases=stop_cases,
    right=(
        stopping_margin,
        lambda P, e, b: (sympy.log(mixed(P, e)) - sympy.log(e * P + (1 - e) * (1 - P))) / b,
        lambda P, e, b: 2 * sympy.atanh((1 - 2 * e) * (2 * P - 1)) / b,
        lambda P, e, b: -sympy.log(1 / mixed(P, e) - 1) / b,
    ),
    wrong=(
        Wrong("the two stopping points are averaged", lambda P, eps, beta: (2 * P - 1) * sympy.log((1 - eps) / eps) / beta, "The margin that minimises an average of losses is not the average of the margins that minimise each. Average the losses first."),
        Wrong("P is taken for 1", "P = 1", "That is where cDPO stops on a pair that everybody answers alike. Here the other answer comes too, with chance 1 - P: average both losses."),
        Wrong("eps is taken for 0", "eps = 0 * eps", "That is where plain DPO stops. Each label adds both losses, with weights 1 - eps and eps."),
        Wrong("two logits added", lambda P, e, b: (logit(P) + logit(1 - e)) / b, "Two sources of doubt make the margin smaller; here each certainty adds to it. Mix the probabilities first, then take the logarithm of their odds."),
        Wrong("two logits, one taken away", lambda P, e, b: (logit(P) - logit(1 - e)) / b, "Put P = 1/2 in: whatever eps is, neither answer is preferred, so Delta must be 0."),
        Wrong("a flip that makes a label right is forgotten", "(1 - eps) * P + eps * (1 - P) -> (1 - eps) * P", "L(w, l) is met in two ways: y_w won and counts with 1 - eps, or y_l won and counts with eps."),
        Wrong("only the upper half of the odds is mixed", lambda P, e, b: sympy.log(mixed(P, e) / (1 - P)) / b, "Both odds are mixed: the one below the fraction line has eps in it too."),
        Wrong("no logarithm", "sympy.log(q / (1 - q)) -> q / (1 - q)", "The sigmoid of beta Delta is a probability; the inverse of the sigmoid is the logarithm of the odds."),
        Wrong("the logarithm of the probability", "q / (1 - q) -> q", "The inverse of the sigmoid takes the odds p / (1 - p), not p: at p = 1/2 it must be 0."),
        Wrong("the probability itself", lambda P, e, b: mixed(P, e), "This is what sigma(beta Delta) must be at the minimum. Solve it for Delta."),
        Wrong("un-mixed, as rDPO does", lambda P, e, b: logit((P - e) / (1 - 2 * e)) / b, "rDPO takes the flips out again. cDPO mixes them in, and so makes the preference milder."),
        Wrong("eps counted twice", lambda P, e, b: logit(mixed(mixed(P, e), e)) / b, "That is cDPO on labels flipped once more; P is already the chance of the labels that it gets."),
    ),
)  # fmt: skip


def robust_cases(generator):
    def margins(scale, n):
        drawn = scale * torch.randn(n, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    extreme = torch.tensor([0.0, 3e4, -3e4, 5.0], dtype=torch.float64)
    return [
        (margins(2.0, 1), 1.0, 0.2),
        (margins(8.0, 5), 0.3, 0.1),
        Edge("no flips: DPO", (margins(20.0, 4), 0.1, 0.0)),
        (margins(3.0, 6), 0.7, 0.45),
        Edge("the margins are extreme", (extreme.requires_grad_(), 0.5, 0.25)),
    ]


def robust_truth(margins: Tensor, beta: float, eps: float) -> Tensor:
    """The two conditions, for a label and for its reverse, as linear equations, solved."""
    zero = torch.zeros_like(margins)
    clean = torch.stack(
        [torch.logaddexp(zero, -beta * margins), torch.logaddexp(zero, beta * margins)]
    )
    flips = torch.tensor([[1 - eps, eps], [eps, 1 - eps]], dtype=margins.dtype)
    return torch.linalg.solve(flips, clean)[0]


def dpo(x):
    return -torch.nn.functional.logsigmoid(x)


def robust_loss(margins, beta, eps):
    as_labelled = -torch.nn.functional.logsigmoid(beta * margins)
    reversed_ = -torch.nn.functional.logsigmoid(-beta * margins)
    return ((1 - eps) * as_labelled - eps * reversed_) / (1 - 2 * eps)


ROBUST = Exercise(
    "05.4", "A loss that undoes the flips", "implement", difficulty=3, importance=3, minutes=6,
    truth=robust_truth, cases=robust_cases,
    right=(
        robust_loss,
        lambda d, b, e: dpo(b * d) - b * d * (e / (1 - 2 * e)),
        lambda d, b, e: torch.nn.functional.softplus(-b * d, threshold=500) * ((1 - e) / (1 - 2 * e)) - torch.nn.functional.softplus(b * d, threshold=500) * (e / (1 - 2 * e)),
    ),
    wrong=(
        Wrong("cDPO: mixed, not un-mixed", "- eps * reversed_) / (1 - 2 * eps) -> + eps * reversed_)", "Flipped labels have mixed the two losses once; this mixes them a second time. Your loss has to do the reverse."),
        Wrong("plain DPO", "eps = 0", "Averaged over the flips, DPO's loss becomes cDPO's, not the clean one: something has to be taken away."),
        Wrong("not divided by 1 - 2 eps", "/ (1 - 2 * eps) -> ", "Average it over the flip: how much of the clean L(w, l) is left? That factor has to go."),
        Wrong("divided by 1 - eps", "/ (1 - 2 * eps) -> / (1 - eps)", "Average it over the flip, and collect the terms with L(w, l): (1 - eps)^2 - eps^2 is which factor?"),
        Wrong("divided by 1 + 2 eps", "(1 - 2 * eps) -> (1 + 2 * eps)", "Flips weaken the signal, so undoing them has to strengthen it: the divisor is below 1."),
        Wrong("multiplied by 1 - 2 eps", "/ (1 - 2 * eps) -> * (1 - 2 * eps)", "Flips weaken the signal, so undoing them has to strengthen it."),
        Wrong("divided, but still mixed", "- eps * reversed_ -> + eps * reversed_", "The reversed loss is what the flips have added; take it away."),
        Wrong("the weights are swapped", "(1 - eps) * as_labelled - eps * -> eps * as_labelled - (1 - eps) *", "Without flips, eps = 0, the loss of the label as it stands must be left."),
        Wrong("the order of the pair is swapped", "margins = -margins", "Most labels are right: where eps is 0 this must be DPO's loss."),
        Wrong("beta outside the logarithm", "(beta * margins) -> (margins) | (-beta * margins) -> (-margins) | return -> return beta *", "Beta scales the margin inside the sigmoid, not the loss."),
        Wrong("log(sigmoid(x)) overflows", "torch.nn.functional.logsigmoid(beta * margins) -> torch.sigmoid(beta * margins).log() | torch.nn.functional.logsigmoid(-beta * margins) -> torch.sigmoid(-beta * margins).log()",
              "Far from 0 the sigmoid rounds to 0 or 1. torch has a function for its logarithm that stays finite."),
        Wrong("the margin corrected instead of the loss", "result = -torch.nn.functional.logsigmoid(beta * margins / (1 - 2 * eps))", "The average over flips is taken of the loss, and the loss is not linear in the margin: combine losses."),
        Wrong("the noisy label is modelled", "result = -((1 - 2 * eps) * torch.sigmoid(beta * margins) + eps).log()", "This is the likelihood of a flipped label, another honest remedy; but averaged over flips it is not the clean loss. Combine L(w, l) and L(l, w) linearly."),
        Wrong("the reversed loss is taken for minus the loss", "result = -torch.nn.functional.logsigmoid(beta * margins) / (1 - 2 * eps)", "L(l, w) is the loss at minus the margin; that is not minus the loss."),
        Wrong("only the reversed loss is divided", "((1 - eps) * as_labelled - eps * reversed_) -> (1 - eps) * as_labelled - eps * reversed_", "Without brackets the division binds only the last term."),
        Wrong("the reversed loss is detached", "- eps * reversed_ -> - eps * reversed_.detach()", "Both losses depend on the policy: the gradient has to be right on average, not the value alone."),
    ),
)  # fmt: skip


@functools.cache
def coverage_truth():
    """Computed: which quantities stay the same along all directions in which the loss is flat."""
    names = "ABCDEF"
    reference = torch.linspace(-1, 1, 6, dtype=torch.float64).cos().log_softmax(0)
    rewards = torch.tensor([0.3, -0.4, 0.9, 0.1, -0.7, 0.5], dtype=torch.float64)
    best = exact.optimal_policy(reference, rewards, 0.5)  # where the loss has a minimum

    def curvature(pair):
        """The Hessian of one pair's expected loss by the six logits."""
        shown = torch.zeros(6, 6, dtype=torch.float64)
        shown[names.index(pair[0]), names.index(pair[1])] = 1.0

        def loss(logits):
            policy = logits.log_softmax(0)
            return exact.population_loss(
                lambda pairs: dpo_loss(pairs, 0.5),
                policy,
                reference,
                exact.preferences(rewards),
                shown,
            )

        return torch.autograd.functional.hessian(loss, best)

    of_pair = {a + b: curvature(a + b) for a, b in itertools.combinations(names, 2)}

    def flat(pairs):
        """The directions in which the loss of these pairs does not change: tensor [6, any]."""
        values, vectors = torch.linalg.eigh(sum(of_pair[pair] for pair in pairs))
        return vectors[:, values.abs() < 1e-9]

    def word(quantity, pairs):
        slope = torch.autograd.functional.jacobian(lambda z: quantity(*z.softmax(0)), best)
        return "fixed" if (slope @ flat(pairs)).abs().max() < 1e-9 else "free"

    shown = ("AB", "BC", "DE")
    others = [pair for pair in of_pair if pair not in shown]
    more = next(
        n
        for n in range(len(others) + 1)
        if any(flat(shown + extra).shape[1] == 1 for extra in itertools.combinations(others, n))
    )
    return {
        "A/B": word(lambda a, b, c, d, e, f: a / b, shown),
        "A/C": word(lambda a, b, c, d, e, f: a / c, shown),
        "C/D": word(lambda a, b, c, d, e, f: c / d, shown),
        "D/E": word(lambda a, b, c, d, e, f: d / e, shown),
        "E/F": word(lambda a, b, c, d, e, f: e / f, shown),
        "A": word(lambda a, b, c, d, e, f: a, shown),
        "A/(A+B+C)": word(lambda a, b, c, d, e, f: a / (a + b + c), shown),
        "more pairs": str(more),
    }


COVERAGE = Exercise(
    "05.5", "What the pairs leave open", "predict", difficulty=3, importance=4, minutes=7,
    truth=coverage_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("only what was compared directly is fixed", {"A/C": "free"}, "A/C is A/B times B/C: what do the pairs say about each of the two?"),
        Wrong("compared answers stay open", {"A/B": "free"}, "Endless Bradley-Terry answers to A against B reveal the difference of their rewards, and with it the ratio of their probabilities."),
        Wrong("a pair apart from the others does not count", {"D/E": "free"}, "A ratio needs nothing but its own pair: halve both D and E, and look at D/E."),
        Wrong("ratios across groups are fixed", {"C/D": "fixed"}, "Multiply D and E by the same number and take what that costs from A, B and C, in proportion. Which pair notices?"),
        Wrong("an answer in no pair keeps its place", {"E/F": "fixed"}, "The loss has no term with F in it: no derivative holds it anywhere, not even at the reference."),
        Wrong("the probability of a compared answer is fixed", {"A": "fixed"}, "Pairs see ratios only. Give F more, and take it from all others in proportion: does any ratio of compared answers change?"),
        Wrong("shares within a group stay open", {"A/(A+B+C)": "free"}, "Divide by A above and below: only ratios within the group are left."),
        Wrong("one more pair", {"more pairs": "1"}, "Draw the answers as points and the pairs as lines. How many separate pieces are there, F included, and how many does one line join?"),
        Wrong("a pair for each group", {"more pairs": "3"}, "A line between two pieces makes one of them. How many lines turn all pieces into one?"),
        Wrong("all pairs are needed", {"more pairs": "12"}, "Ratios multiply: A/C follows from A/B and B/C. A path between two answers is enough."),
        Wrong("no more pairs are needed", {"more pairs": "0"}, "F is in no pair at all; what could fix its probability?"),
    ),
)  # fmt: skip

EXERCISES = (TEXT, SAMPLED_KL, STOP, ROBUST, COVERAGE)
