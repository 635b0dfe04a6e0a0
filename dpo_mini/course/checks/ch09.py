"""09 Evaluate like a researcher: KL, win rates and gains with their intervals, and a diagnosis."""

import json
import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from dpo_mini.course.checks.engine import Exercise, Wrong
from dpo_mini.evaluation import mean_interval, win_rate

# --- 09.1 the sequence KL ---


def policies(shape, scale, generator):
    drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.log_softmax(-1)


def completions(lengths):
    """A mask [samples, positions] from (prompt's, completion's) positions, padded on the right."""
    positions = max(before + inside for before, inside in lengths)
    return torch.tensor(
        [
            [int(before <= t < before + inside) for t in range(positions)]
            for before, inside in lengths
        ]
    )


def kl_cases(generator):
    cases = []
    for lengths, vocabulary in (
        ([(0, 2)], 2),
        ([(1, 3), (2, 1)], 3),
        ([(2, 4), (0, 1), (3, 3), (1, 2)], 5),
    ):
        mask = completions(lengths)
        shape = (*mask.shape, vocabulary)
        cases.append((policies(shape, 1.5, generator), policies(shape, 0.7, generator), mask))
    p, q, mask = cases[-1]
    remote = q.clone()
    remote[..., 0] -= 100.0  # below what a float32 probability can hold
    return [*cases, (policies(p.shape, 1.0, generator), remote.log_softmax(-1), mask)]


def kl_truth(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Plain numbers, term by term: every token that the policy could have written next."""
    per_sample = [
        math.fsum(
            math.exp(mine) * (mine - theirs)
            for mine_here, theirs_here, counts in zip(p, q, m)
            if counts
            for mine, theirs in zip(mine_here, theirs_here)
        )
        for p, q, m in zip(policy.tolist(), reference.tolist(), mask.tolist())
    ]
    return torch.tensor(math.fsum(per_sample) / len(per_sample), dtype=torch.float64)


def at_positions(p, q):
    """The right KL at each position."""
    return (p.exp() * (p - q)).sum(-1)


def wrong_positions(terms):
    """A mistake at each position, rightly summed and averaged."""
    return lambda p, q, m: (terms(p, q) * m).sum(1).mean()


def wrong_total(total):
    """A mistake in the sum and the mean, with the right KL at each position."""
    return lambda p, q, m: total(at_positions(p, q), m)


def of_the_likeliest(p, q):
    best = p.argmax(-1, keepdim=True)
    return (p - q).gather(-1, best).squeeze(-1)


def up_to_the_end(m):
    return m.flip(1).cummax(1).values.flip(1)


def from_the_start_on(m):
    return m.cummax(1).values


def without_last(m):
    """The mask without each completion's last position."""
    return m * (m.flip(1).cumsum(1).flip(1) > 1)


def without_first(m):
    return m * (m.cumsum(1) > 1)


SEQUENCE_KL = Exercise(
    id="09.1",
    title="The sequence KL, exact at each position",
    kind="implement",
    truth=kl_truth,
    cases=kl_cases,
    wrong=(
        Wrong("the other direction", wrong_positions(lambda p, q: (q.exp() * (q - p)).sum(-1)),
              "In KL(pi || pi_ref), whose texts are averaged over, and so whose probabilities are the weights?"),
        Wrong("averaged under the reference", wrong_positions(lambda p, q: (q.exp() * (p - q)).sum(-1)),
              "The log-ratio is right. But the next token is drawn from the policy: whose probabilities weigh it?"),
        Wrong("mean over the tokens of a sample", wrong_total(lambda kl, m: ((kl * m).sum(1) / m.sum(1)).mean()),
              "A text of 64 tokens has gone further from the reference than its first half. What happens to yours if every token has the same KL and the text becomes longer?"),
        Wrong("mean over all tokens of the batch", wrong_total(lambda kl, m: (kl * m).sum() / m.sum()),
              "This is nats per token. The bounds of the theory are about whole completions: what must a sample's number be before the samples are averaged?"),
        Wrong("mean over all positions", wrong_total(lambda kl, m: (kl * m).mean()),
              "The mean divides by the positions too, padding included. Which of the two dimensions is summed, and which is averaged?"),
        Wrong("the mask is ignored", wrong_total(lambda kl, m: kl.sum(1).mean()),
              "The prompt was given, not written by the policy, and padding is no text at all. Which positions does the mask leave?"),
        Wrong("the mask is turned round", wrong_total(lambda kl, m: (kl * (1 - m)).sum(1).mean()),
              "The mask is 1 where a position counts, and 0 on prompt and padding."),
        Wrong("the prompt counts", wrong_total(lambda kl, m: (kl * up_to_the_end(m)).sum(1).mean()),
              "The padding is left out, but the prompt is not. Did the policy write it?"),
        Wrong("the padding counts", wrong_total(lambda kl, m: (kl * from_the_start_on(m)).sum(1).mean()),
              "The prompt is left out, but after a completion's end more positions follow. What is there?"),
        Wrong("the last token is left out", wrong_total(lambda kl, m: (kl * without_last(m)).sum(1).mean()),
              "To stop is a choice as well. Does the mask count the position that decides on the last token?"),
        Wrong("the first token is left out", wrong_total(lambda kl, m: (kl * without_first(m)).sum(1).mean()),
              "Positions and mask are aligned already: another shift by one loses the first token of each completion."),
        Wrong("the mask one position late", wrong_total(lambda kl, m: (kl * m.roll(1, 1)).sum(1).mean()),
              "Positions and mask are aligned already: mask[i, t] belongs to the distributions at [i, t]."),
        Wrong("the mask one position early", wrong_total(lambda kl, m: (kl * m.roll(-1, 1)).sum(1).mean()),
              "Positions and mask are aligned already: mask[i, t] belongs to the distributions at [i, t]."),
        Wrong("summed over the samples", wrong_total(lambda kl, m: (kl * m).sum()),
              "Draw twice as many samples, and yours doubles. What does an expectation over samples do?"),
        Wrong("one value per sample", wrong_total(lambda kl, m: (kl * m).sum(1)),
              "These are the right estimates, one a completion. The task wants one number of them."),
        Wrong("only the likeliest token", wrong_positions(of_the_likeliest),
              "The policy draws every token at times. With all its probabilities at hand, no token needs to be picked out."),
        Wrong("every token weighs the same", wrong_positions(lambda p, q: (p - q).sum(-1)),
              "An expectation weighs each token by how often the policy would draw it."),
        Wrong("mean over the vocabulary", wrong_positions(lambda p, q: (p.exp() * (p - q)).mean(-1)),
              "The weights sum to 1 over the vocabulary, so the weighted sum is the average already."),
        Wrong("the unweighted mean over the vocabulary", wrong_positions(lambda p, q: (p - q).mean(-1)),
              "The plain mean is right over tokens that were drawn from the policy. Here every token is listed once: what makes up for that?"),
        Wrong("log-probabilities as weights", wrong_positions(lambda p, q: (p * (p - q)).sum(-1)),
              "The arguments are logarithms, and weights are probabilities."),
        Wrong("the sign", wrong_positions(lambda p, q: (p.exp() * (q - p)).sum(-1)),
              "A single log-ratio may be negative, but a KL cannot. Which logarithm is subtracted from which?"),
        Wrong("absolute log-ratios", wrong_positions(lambda p, q: (p.exp() * (p - q).abs()).sum(-1)),
              "Where the policy has become less likely to write a token, its log-ratio counts with a minus. The sum is positive without help."),
        Wrong("both directions averaged", wrong_positions(lambda p, q: ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2),
              "That is symmetric; KL(pi || pi_ref) averages over the policy's texts only."),
        Wrong("minus the entropy", wrong_positions(lambda p, q: (p.exp() * p).sum(-1)),
              "The reference is not in it. Where the two policies are equal, KL must be 0; is yours?"),
        Wrong("cross-entropy", wrong_positions(lambda p, q: -(p.exp() * q).sum(-1)),
              "This is how surprising the reference finds the policy's tokens. Where the two are equal, KL must be 0; is yours?"),
        Wrong("difference of probabilities", wrong_positions(lambda p, q: (p.exp() * (p.exp() - q.exp())).sum(-1)),
              "The logarithm of a ratio is a difference of logarithms, and those you have already."),
        Wrong("a small number inside the logarithm", wrong_positions(lambda p, q: (p.exp() * (p.exp() / (q.exp() + 1e-8)).log()).sum(-1)),
              "The small number hides how surprised the reference is, and that is what KL is to say. The logarithms that you were given need no protection."),
        Wrong("bits instead of nats", wrong_positions(lambda p, q: at_positions(p, q) / math.log(2)),
              "The arguments are natural logarithms, so their differences are nats as they stand."),
        Wrong("half", wrong_positions(lambda p, q: at_positions(p, q) / 2),
              "Try one position with (1/2, 1/2) against (1/4, 3/4): the KL is 0.1438."),
        Wrong("double", wrong_positions(lambda p, q: 2 * at_positions(p, q)),
              "Try one position with (1/2, 1/2) against (1/4, 3/4): the KL is 0.1438."),
        Wrong("single precision", lambda p, q, m: (at_positions(p.float(), q.float()) * m).sum(1).mean().double(),
              "Somewhere the numbers pass through float32 and lose half of their digits."),
        Wrong("zero", lambda p, q, m: 0 * (p - q).sum(),
              "KL is 0 only where the two policies are equal."),
    ),
    others=(
        lambda p, q, m: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)[m.bool()].sum() / len(m),
        lambda p, q, m: torch.einsum("stv,stv,st->", p.exp(), p - q, m.double()) / p.shape[0],
        lambda p, q, m: (kl_divergence(Categorical(logits=p), Categorical(logits=q)) * m).sum(1).mean(),
        lambda p, q, m: torch.stack([at_positions(a[c == 1], b[c == 1]).sum() for a, b, c in zip(p, q, m)]).mean(),
    ),
    tolerance=1e-9,
    difficulty=2,
    importance=5,
    minutes=8,
)  # fmt: skip

# --- 09.2 the win rate and Wilson's interval ---

Z = 1.96


def rate_cases(generator):
    def rewards(n, ahead, step=None):
        """Two tensors [n]; rounded to `step` they tie now and then."""
        drawn = torch.randn(2, n, generator=generator, dtype=torch.float64)
        drawn[0] += ahead
        return tuple(drawn if step is None else (drawn / step).round() * step)

    policy, reference = rewards(7, 1.0, 0.5)
    reference[0], reference[1] = policy[0], policy[1]  # two ties
    reference[2:] = policy[2:] - torch.tensor([1, 0.5, 2, 1.5, -1])  # four wins and a loss
    perfect, _ = rewards(20, 0.0)
    return [
        (policy, reference),
        (perfect, perfect - 0.1 - perfect.abs()),
        (perfect[:6] - 3.0, perfect[:6]),  # none won
        rewards(40, 0.8, 1.0),
        rewards(200, -0.3),
    ]


def rate_truth(policy: Tensor, reference: Tensor):
    """Wilson's ends by bisection: the rates that a score test at 95% would not reject."""
    n = len(policy)
    points = [
        Fraction(1, 2) if a == b else Fraction(int(a > b))
        for a, b in zip(policy.tolist(), reference.tolist())
    ]
    share = float(sum(points) / n)

    def end(outside: float) -> float:
        inside = share
        for _ in range(80):
            middle = (inside + outside) / 2
            accepted = (share - middle) ** 2 <= Z**2 * middle * (1 - middle) / n
            inside, outside = (middle, outside) if accepted else (inside, middle)
        return inside

    def reachable(edge: float) -> float:
        return edge if share == edge else end(edge)

    return share, reachable(0.0), reachable(1.0)


def share_of(a, b):
    return float((1 + torch.sign(a - b)).mean() / 2)


def wilson(share, n, z=Z):
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, centre - half, centre + half


def wald(share, n, z=Z):
    half = z * math.sqrt(share * (1 - share) / n)
    return share, share - half, share + half


def clip(estimate):
    return tuple(min(1.0, max(0.0, e)) for e in estimate)


def from_share(interval):
    """A mistake in the interval, of the right share and number."""
    return lambda a, b: interval(share_of(a, b), len(a))


def from_counts(rate):
    """A mistake in what is counted, with Wilson's interval."""
    return lambda a, b: wilson(*rate(a, b))


def agresti_coull(share, n):
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(centre * (1 - centre) / (n + Z * Z))
    return share, centre - half, centre + half


def hoeffding(share, n):
    half = math.sqrt(math.log(2 / 0.05) / (2 * n))
    return share, share - half, share + half


def without_ties(a, b):
    return (a[a != b] > b[a != b]).double().mean().item(), int((a != b).sum())


def wins_and_losses(a, b):
    share, low, high = wilson(share_of(a, b), len(a))
    return 2 * share - 1, 2 * low - 1, 2 * high - 1


def narrow_root(share, n):
    centre, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n)
    return share, (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n)


def undivided(share, n):
    _, low, high = wilson(share, n)
    return share, low * (1 + Z * Z / n), high * (1 + Z * Z / n)


def around_the_share(share, n):
    _, low, high = wilson(share, n)
    return share, share - (high - low) / 2, share + (high - low) / 2


def by_the_mean(share, n):
    _, low, high = wilson(share, n)
    return (low + high) / 2, low, high


def half_width(share, n):
    _, low, high = wilson(share, n)
    return share, (high - low) / 2, (high - low) / 2


def quadratic(share, n):
    """The roots of (1 + z²/n) p² - (2 share + z²/n) p + share²."""
    k = Z * Z / n
    root = math.sqrt(max(0.0, (2 * share + k) ** 2 - 4 * (1 + k) * share * share))
    return share, (2 * share + k - root) / (2 + 2 * k), (2 * share + k + root) / (2 + 2 * k)


WIN_RATE = Exercise(
    id="09.2",
    title="A win rate and Wilson's interval",
    kind="implement",
    truth=rate_truth,
    cases=rate_cases,
    wrong=(
        Wrong("ties are dropped", from_counts(without_ties),
              "Without its ties the rate is about a selection of the prompts. What is a tie worth, if both sides are to get the same?"),
        Wrong("ties are dropped from the rate, not from n", lambda a, b: wilson(without_ties(a, b)[0], len(a)),
              "The rate is about the prompts without ties, the interval about all. What is a tie worth, if both sides are to get the same?"),
        Wrong("a tie is a loss", from_counts(lambda a, b: ((a > b).double().mean().item(), len(a))),
              "Let the reference compete with its own texts: all ties, and its win rate must be one half. Is yours?"),
        Wrong("a tie is a win", from_counts(lambda a, b: ((a >= b).double().mean().item(), len(a))),
              "Let the reference compete with its own texts: all ties, and its win rate must be one half. Is yours?"),
        Wrong("the reference's win rate", from_counts(lambda a, b: (share_of(b, a), len(a))),
              "The policy comes first in the arguments. How often does it win, and not lose?"),
        Wrong("wins minus losses", wins_and_losses,
              "Against itself this gives 0, but the null of a win rate is one half. How many points are a win, a tie and a loss worth?"),
        Wrong("the textbook interval", from_share(wald),
              "It has width 0 for 20 wins of 20, as it puts the observed share into the standard error. Whose standard error stands in Wilson's condition?"),
        Wrong("the textbook interval, clipped", from_share(lambda s, n: clip(wald(s, n))),
              "Clipping hides the ends, but for 20 wins of 20 the width is still 0. Whose standard error stands in Wilson's condition?"),
        Wrong("the mean's interval of 0, 1/2 and 1", lambda a, b: mean_interval((1 + torch.sign(a - b)) / 2),
              "That is the interval of any mean. For 20 wins of 20 its width is 0; Wilson's is not."),
        Wrong("Agresti and Coull's interval", from_share(agresti_coull),
              "You have Wilson's centre, but not his width: that follows exactly from the quadratic equation in p. Solve it without moving the share first."),
        Wrong("Hoeffding's interval", from_share(hoeffding),
              "That bound holds for any distribution and is wider than it needs to be here. Solve Wilson's condition for p."),
        Wrong("the interval's centre as the mean", from_share(by_the_mean),
              "Wilson's interval does not lie symmetrically about the observed rate. The rate to report is the observed one."),
        Wrong("centred at the observed rate", from_share(around_the_share),
              "The width is right. But where is the middle between the two roots of the quadratic equation?"),
        Wrong("not divided by 1 + z²/n", from_share(undivided),
              "The coefficient of p² in the quadratic equation is not 1. What do both roots have to be divided by?"),
        Wrong("a term is missing under the root", from_share(narrow_root),
              "For 20 wins of 20 your root is 0. Multiply out the discriminant again: which term does not contain the share?"),
        Wrong("one standard error", from_share(lambda s, n: wilson(s, n, 1.0)),
              "One standard error either way covers the truth in 68 of 100 experiments. How many make it 95?"),
        Wrong("90% instead of 95%", from_share(lambda s, n: wilson(s, n, 1.645)),
              "With 1.645 five in a hundred miss on each side. How many standard errors leave five in all?"),
        Wrong("99% instead of 95%", from_share(lambda s, n: wilson(s, n, 2.576)),
              "2.576 standard errors cover 99 of 100 experiments; the task asks for 95."),
        Wrong("counts texts, not prompts", lambda a, b: wilson(share_of(a, b), 2 * len(a)),
              "A comparison takes two texts and gives one result. How many results are there?"),
        Wrong("every text against every other", from_counts(lambda a, b: (share_of(a[:, None], b[None, :]), len(a))),
              "Text i of the policy meets text i of the reference, the one for the same prompt, and no other."),
        Wrong("the mean probability of a win", from_counts(lambda a, b: (torch.sigmoid(a - b).mean().item(), len(a))),
              "A narrow win and a clear one count the same. Only the sign of the difference matters."),
        Wrong("half of the width, not the ends", from_share(half_width),
              "The second and third number are the ends of the interval, not its distance from the middle."),
        Wrong("the ends are swapped", from_share(lambda s, n: (s, *wilson(s, n)[:0:-1])),
              "The lower end comes first: mean, low, high."),
        Wrong("low, mean, high", from_share(lambda s, n: (wilson(s, n)[1], s, wilson(s, n)[2])),
              "These are the right numbers in another order: mean, low, high."),
        Wrong("per cent", from_share(lambda s, n: tuple(100 * e for e in wilson(s, n))),
              "A rate lies between 0 and 1."),
        Wrong("the number of wins", lambda a, b: tuple(len(a) * e for e in wilson(share_of(a, b), len(a))),
              "A rate is a share: it does not double when you compare twice as many prompts."),
    ),
    others=(
        win_rate,
        from_share(quadratic),
        lambda a, b: wilson(((a > b).double() + 0.5 * (a == b)).mean().item(), len(a), 1.959964),
    ),
    tolerance=2e-5,
    difficulty=3,
    importance=4,
    minutes=10,
)  # fmt: skip

# --- 09.3 a gain and its paired interval ---


def gain_cases(generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def logits(prompts, samples, common, own, ahead):
        """Both models' logits: what the prompt does to both, to the policy alone, and chance."""
        easy = common * normal(prompts, 1)
        reference = easy + 0.7 * normal(prompts, samples)
        return reference, easy + ahead + own * normal(prompts, 1) + 0.7 * normal(prompts, samples)

    reference, policy = logits(5, 2, 1.0, 2.0, -0.4)
    reference[0], policy[0] = -40.0, 40.0  # certain either way
    return [
        logits(3, 1, 1.0, 0.5, 1.0),
        logits(8, 4, 2.0, 1.0, 0.8),
        (reference, policy),
        logits(30, 3, 0.3, 1.5, -1.0),
    ]


def gain_truth(reference: Tensor, policy: Tensor):
    """The standard error by the jackknife: how the gain changes when a prompt is left out."""

    def p_positive(logit):
        return 1 / (1 + math.exp(-logit))

    gains = [
        math.fsum(map(p_positive, after)) / len(after)
        - math.fsum(map(p_positive, before)) / len(before)
        for before, after in zip(reference.tolist(), policy.tolist())
    ]
    n = len(gains)
    mean = math.fsum(gains) / n
    without = [(math.fsum(gains) - gain) / (n - 1) for gain in gains]
    error = math.sqrt((n - 1) / n * math.fsum((one - mean) ** 2 for one in without))
    return mean, mean - Z * error, mean + Z * error


def interval(values, z=Z, correction=1, root=True):
    """Mean and ends of values [n], with what can go wrong about a standard error."""
    error = values.std(correction=correction)
    half = z * error / (math.sqrt(len(values)) if root else len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def gains(r, p):
    """The right gain of each prompt."""
    return (p.sigmoid() - r.sigmoid()).mean(1)


def of_gains(estimate):
    """A mistake in the interval, of the right gains."""
    return lambda r, p: estimate(gains(r, p))


def unpaired(r, p):
    before, after = (x.sigmoid().mean(1) for x in (r, p))
    mean = after.mean() - before.mean()
    half = Z * ((before.var() + after.var()) / len(before)).sqrt()
    return mean, mean - half, mean + half


def separate(r, p, crossed):
    before, after = (interval(x.sigmoid().mean(1)) for x in (r, p))
    low, high = (before[2], before[1]) if crossed else (before[1], before[2])
    return after[0] - before[0], after[1] - low, after[2] - high


def widths(d):
    mean, low, high = interval(d)
    return mean, (high - low) / 2, (high - low) / 2


def spread_without_error(d):
    return d.mean(), d.mean() - Z * d.std(), d.mean() + Z * d.std()


def variance_for_error(d):
    half = Z * d.var() / len(d)
    return d.mean(), d.mean() - half, d.mean() + half


def from_covariance(r, p):
    both = torch.cov(torch.stack([r.sigmoid().mean(1), p.sigmoid().mean(1)]))
    mean = p.sigmoid().mean() - r.sigmoid().mean()
    half = 1.96 * ((both[0, 0] + both[1, 1] - 2 * both[0, 1]) / len(r)).sqrt()
    return mean.item(), (mean - half).item(), (mean + half).item()


def by_groups(r, p):
    prompts = [i for i, row in enumerate(r) for _ in row]
    return mean_interval((p.sigmoid() - r.sigmoid()).flatten(), prompts)


GAIN = Exercise(
    id="09.3",
    title="A gain and its paired interval",
    kind="implement",
    truth=gain_truth,
    cases=gain_cases,
    wrong=(
        Wrong("logits, not probabilities", lambda r, p: interval((p - r).mean(1)),
              "The reward's logit is not bounded, and a few extreme texts would decide. What turns a logit into P(positive)?"),
        Wrong("the sigmoid of the difference", lambda r, p: interval((p - r).sigmoid().mean(1)),
              "That is Bradley-Terry's probability that the policy's text is preferred. The gain is a difference of two probabilities."),
        Wrong("the sigmoid of the mean logit", lambda r, p: interval(p.mean(1).sigmoid() - r.mean(1).sigmoid()),
              "The sigmoid is curved: the mean of P(positive) is not P(positive) of the mean logit. In which order do you take them?"),
        Wrong("the exponential for the sigmoid", lambda r, p: interval((p.exp() - r.exp()).mean(1)),
              "exp of a logit gives odds, which have no upper limit. A probability lies between 0 and 1."),
        Wrong("the softmax for the sigmoid", lambda r, p: interval((p.softmax(0) - r.softmax(0)).mean(1)),
              "Each text is positive or not by itself; the texts do not share one probability among them."),
        Wrong("the share of positive texts", lambda r, p: interval(((p > 0).double() - (r > 0).double()).mean(1)),
              "Counting texts above one half throws away how sure the reward is. The task asks for the mean P(positive)."),
        Wrong("counts completions, not prompts", lambda r, p: interval((p.sigmoid() - r.sigmoid()).flatten()),
              "Four completions of one prompt are not four independent witnesses. How many independent gains are there?"),
        Wrong("only the first completion", lambda r, p: interval((p.sigmoid() - r.sigmoid())[:, 0]),
              "All completions of a prompt say something about it. What is the gain of a prompt?"),
        Wrong("unpaired", unpaired,
              "The prompts are the same for both models, and what they have in common must drop out. Of what do you take the standard deviation?"),
        Wrong("the two intervals' ends subtracted", lambda r, p: separate(r, p, crossed=False),
              "Two intervals do not subtract end by end: their errors would then cancel as if they were always equal. Take the difference prompt by prompt first."),
        Wrong("the worst case of two intervals", lambda r, p: separate(r, p, crossed=True),
              "Both models unlucky in opposite directions is rare, so this is too wide. Take the difference prompt by prompt first."),
        Wrong("reference minus policy", of_gains(lambda d: interval(-d)),
              "Where the policy's texts are more positive, the gain must be above 0. Which is subtracted from which?"),
        Wrong("divided by n", of_gains(lambda d: interval(d, correction=0)),
              "The deviations are taken from the sample's own mean, and that makes them a little too small. By what does a sample's variance divide?"),
        Wrong("the standard deviation for the standard error", of_gains(spread_without_error),
              "This says how much prompts differ, and more prompts do not make it narrower. How does a mean's error depend on n?"),
        Wrong("n for its square root", of_gains(lambda d: interval(d, root=False)),
              "Four times as many prompts halve the interval; yours becomes four times narrower."),
        Wrong("the variance for the standard deviation", of_gains(variance_for_error),
              "A variance is in squared units. What must be done before it is added to a mean?"),
        Wrong("one standard error", of_gains(lambda d: interval(d, 1.0)),
              "One standard error either way covers the truth in 68 of 100 experiments. How many make it 95?"),
        Wrong("90% instead of 95%", of_gains(lambda d: interval(d, 1.645)),
              "With 1.645 five in a hundred miss on each side. How many standard errors leave five in all?"),
        Wrong("the interval twice as wide", of_gains(lambda d: interval(d, 2 * Z)),
              "1.96 standard errors to either side: the whole width is twice that, not the half."),
        Wrong("the interval half as wide", of_gains(lambda d: interval(d, Z / 2)),
              "1.96 standard errors to either side, not in all."),
        Wrong("half of the width, not the ends", of_gains(widths),
              "The second and third number are the ends of the interval, not its distance from the mean."),
        Wrong("the ends are swapped", of_gains(lambda d: (interval(d)[0], interval(d)[2], interval(d)[1])),
              "The lower end comes first: mean, low, high."),
        Wrong("absolute differences", lambda r, p: interval((p.sigmoid() - r.sigmoid()).abs().mean(1)),
              "Where the policy's text is worse, it must count against it."),
        Wrong("the relative gain", lambda r, p: interval(p.sigmoid().mean(1) / r.sigmoid().mean(1) - 1),
              "From .01 to .02 would then be worth as much as from .5 to 1. The gain is a plain difference."),
        Wrong("clipped to 0 and 1", of_gains(lambda d: clip(interval(d))),
              "A rate lies between 0 and 1, a gain need not: if the policy became worse, the number has to say so."),
        Wrong("the policy's P(positive) alone", lambda r, p: interval(p.sigmoid().mean(1)),
              "A gain compares: with what?"),
        Wrong("zero", lambda r, p: (0.0, 0.0, 0.0),
              "The gain is 0 only where both models' texts are equally positive."),
    ),
    others=(
        from_covariance,
        by_groups,
        lambda r, p: mean_interval(p.sigmoid().mean(1) - r.sigmoid().mean(1)),
    ),
    tolerance=2e-5,
    difficulty=2,
    importance=4,
    minutes=8,
)  # fmt: skip

# --- 09.4 the implicit reward of each token ---


def token_cases(generator):
    def logps(mask):
        shape = (len(mask), mask.shape[1] - 1)
        return -3 * torch.rand(shape, generator=generator, dtype=torch.float64).log().neg()

    cases = []
    for lengths, beta in (
        ([(1, 3)], 0.5),
        ([(2, 4), (1, 2)], 0.1),
        ([(3, 1), (1, 6), (2, 2), (4, 3)], 2.0),
    ):
        mask = completions(lengths)
        policy, reference = logps(mask), logps(mask)
        policy[-1, lengths[-1][0]] = -60.0  # a token that the policy has all but given up
        cases.append((policy.requires_grad_(), reference, mask, beta))
    return cases


def token_truth(policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """What the implicit reward of the text so far gains when a token is added to it."""

    def implicit(i, end):
        """Of the completion of sequence i, cut before token `end`."""
        inside = [t for t in range(1, end) if mask[i, t]]
        mine, theirs = (sum(x[i, t - 1] for t in inside) for x in (policy, reference))
        return beta * (mine - theirs)

    rows = range(len(mask))
    gained = [[implicit(i, t + 1) - implicit(i, t) for t in range(1, mask.shape[1])] for i in rows]
    zero = policy.sum() * 0
    return torch.stack([torch.stack([zero + one for one in row]) for row in gained])


def wrong_mask(counted):
    """The right values, other positions."""
    return lambda p, q, m, b: b * (p - q) * counted(m[:, 1:])


def wrong_reward(reward):
    """From a formula in (policy, reference, beta), rightly masked."""
    return lambda p, q, m, b: reward(p, q, b) * m[:, 1:]


def wrong_split(split):
    """The right token rewards, and their mask, put together otherwise."""
    return lambda p, q, m, b: split(b * (p - q) * m[:, 1:], m[:, 1:])


def all_at_the_end(r, m):
    last = m * (m.flip(1).cumsum(1).flip(1) == 1)
    return last * r.sum(1, keepdim=True)


def about_the_mean(r, m):
    return m * (r - r.sum(1, keepdim=True) / m.sum(1, keepdim=True))


TOKENS = Exercise(
    id="09.4",
    title="The implicit reward of each token",
    kind="implement",
    truth=token_truth,
    cases=token_cases,
    wrong=(
        Wrong("the mask one token late", lambda p, q, m, b: b * (p - q) * m[:, :-1],
              "Entry t - 1 of the log-probabilities belongs to token t, so the two tensors do not begin at the same token. Which end of the mask has to go?"),
        Wrong("the prompt counts", wrong_mask(up_to_the_end),
              "The prompt was given. The reward is about the completion only."),
        Wrong("the padding counts", wrong_mask(from_the_start_on),
              "After the completion's end more positions follow. Are they part of the text?"),
        Wrong("the mask is ignored", wrong_mask(torch.ones_like),
              "Sum your numbers over a row: prompt and padding are in it. What must they be to add nothing?"),
        Wrong("the mask is turned round", wrong_mask(lambda m: 1 - m),
              "The mask is 1 where a token counts, and 0 on prompt and padding."),
        Wrong("the last token is left out", wrong_mask(without_last),
              "To stop is a choice as well: the EOS is part of the completion, and the mask counts it."),
        Wrong("the first token is left out", wrong_mask(without_first),
              "The completion's first token is predicted from the prompt, and it counts like any other. Is the mask shifted twice?"),
        Wrong("beta is missing", wrong_reward(lambda p, q, b: p - q),
              "This is the log-ratio. What makes it a reward, in the unit of the reward?"),
        Wrong("divided by beta", wrong_reward(lambda p, q, b: (p - q) / b),
              "The implicit reward is beta times the log-ratio: a low price means that moving far proves little."),
        Wrong("beta on the policy alone", wrong_reward(lambda p, q, b: b * p - q),
              "Where policy and reference agree, the implicit reward is 0. Is yours?"),
        Wrong("beta on the reference alone", wrong_reward(lambda p, q, b: p - b * q),
              "Where policy and reference agree, the implicit reward is 0. Is yours?"),
        Wrong("no reference", wrong_reward(lambda p, q, b: b * p),
              "A rare name is improbable in every model. What do you compare with, to see what training has changed?"),
        Wrong("the sign", wrong_reward(lambda p, q, b: b * (q - p)),
              "A token that the policy has learned to like must have a reward above 0."),
        Wrong("the reference is added", wrong_reward(lambda p, q, b: b * (p + q)),
              "The logarithm of a ratio is a difference of logarithms."),
        Wrong("the ratio, not its logarithm", wrong_reward(lambda p, q, b: b * (p - q).exp()),
              "Ratios multiply along a text; it is their logarithms that add up to the sequence's."),
        Wrong("difference of probabilities", wrong_reward(lambda p, q, b: b * (p.exp() - q.exp())),
              "Differences of probabilities do not add up to anything along a text. Differences of logarithms do."),
        Wrong("weighted by the probability", wrong_reward(lambda p, q, b: b * p.exp() * (p - q)),
              "The weight belongs into a KL, an average over all tokens. Here the token is known."),
        Wrong("absolute values", wrong_reward(lambda p, q, b: b * (p - q).abs()),
              "A token that the policy has learned to avoid counts with a minus."),
        Wrong("only what was gained", wrong_reward(lambda p, q, b: b * (p - q).clamp(min=0)),
              "A token that the policy has learned to avoid counts with a minus; without it the sum is too large."),
        Wrong("one value per sequence", wrong_split(lambda r, m: r.sum(1)),
              "That is the sequence's implicit reward. The task asks what each token adds to it."),
        Wrong("the reward so far", wrong_split(lambda r, m: r.cumsum(1) * m),
              "This is the reward of the text up to each token. What has the one token added?"),
        Wrong("spread evenly", wrong_split(lambda r, m: m * r.sum(1, keepdim=True) / m.sum(1, keepdim=True)),
              "The sum is right, but every token gets the same. Which token's log-ratio is which?"),
        Wrong("all of it at the last token", wrong_split(all_at_the_end),
              "The sum is right, and RLHF does pay its reward at the end. But the implicit reward is a sum over tokens to begin with: what is each term?"),
        Wrong("divided by the number of tokens", wrong_split(lambda r, m: r / m.sum(1, keepdim=True)),
              "The parts have to give the whole, and the whole is a sum over tokens, not a mean."),
        Wrong("divided by all positions", wrong_split(lambda r, m: r / m.shape[1]),
              "The parts have to give the whole, and the whole is a sum over tokens, not a mean."),
        Wrong("measured from the mean", wrong_split(about_the_mean),
              "Your numbers sum to 0 in every sequence. What should they sum to?"),
        Wrong("not a number outside the completion", wrong_split(lambda r, m: r.masked_fill(m == 0, math.nan)),
              "A sum with a nan in it is nan. Which number adds nothing?"),
        Wrong("a column too many", wrong_split(lambda r, m: torch.nn.functional.pad(r, (1, 0))),
              "The first token has no log-probability, so it has no column here: the shape is that of the log-probabilities."),
        Wrong("the policy is detached", wrong_reward(lambda p, q, b: b * (p.detach() - q)),
              "The values are right. But the gradient is asked for too, so nothing of the policy's may be detached."),
        Wrong("half", wrong_reward(lambda p, q, b: b * (p - q) / 2),
              "Sum your numbers over a row: they must give beta times the log-ratio of the whole completion."),
        Wrong("zeros", wrong_reward(lambda p, q, b: 0 * p),
              "The implicit rewards are 0 only where the policy is its reference."),
    ),
    others=(
        lambda p, q, m, b: torch.where(m[:, 1:].bool(), b * (p - q), 0.0),
        lambda p, q, m, b: torch.stack([b * c[1:] * x - b * c[1:] * y for x, y, c in zip(p, q, m)]),
        lambda p, q, m, b: ((p - q) * b).masked_fill(m[:, 1:] == 0, 0.0),
    ),
    tolerance=1e-6,
    difficulty=2,
    importance=3,
    minutes=6,
)  # fmt: skip

# --- 09.5 the diagnosis ---

HEALTHY, HIGH, LOW, BETA, NOISY, DUPLICATED, SWAPPED, MISSING = DIAGNOSES = (
    "healthy",
    "learning rate too high",
    "learning rate too low",
    "beta too low",
    "noisy labels",
    "duplicated pairs",
    "labels swapped",
    "no reference",
)
ORDER = (3, 6, 1, 4, 0, 7, 5, 2)  # in which the stored runs are shown
STORED = Path("notebooks", "results", "unseen.json")


def stored_runs() -> dict[str, dict]:
    """{"Run 1": a stored run, ...} in the order of the exercise."""
    here, package = Path.cwd(), Path(__file__).resolve()
    for folder in (here, *here.parents, package.parents[3]):
        if (folder / STORED).exists():
            runs = json.loads((folder / STORED).read_text(encoding="utf-8"))["runs"]
            return {f"Run {k}": runs[i] for k, i in enumerate(ORDER, start=1)}
    raise FileNotFoundError(
        f"{STORED} is not there: exercise 09.5 needs it, from the course's repository. "
        "Start Jupyter inside your copy of the repository."
    )


def unseen() -> dict[str, dict[str, list]]:
    """{"Run 1": its log as columns, ...}: the curves, and nothing that would say what was wrong."""
    return {title: run["log"] for title, run in stored_runs().items()}


def diagnosis_truth():
    """What each run was made with, as its stored setting says."""
    return {title: run["setting"]["name"] for title, run in stored_runs().items()}


ABOVE = "A held-out loss above log 2 has several causes."
CONTRASTS = {  # which curve tells two diagnoses apart, whichever of them was right
    (HEALTHY, HIGH): "Read the scales first. Do the log-probabilities move by a few nats or by a hundred, and does the loss end below log 2 or above it?",
    (HEALTHY, LOW): "Accuracy cannot settle it: it asks only for the sign of a margin. Read the scale of the implicit rewards and of the KL: has the policy gone anywhere, and P(positive) with it?",
    (HEALTHY, BETA): "Loss, accuracy and P(positive) cannot settle it. By how many nats do the log-probabilities fall, which KL does that cost, and how large are the implicit rewards beside it?",
    (HEALTHY, NOISY): "Does accuracy leave one half, on the batches and on held-out pairs, and does P(positive) leave the place where it began?",
    (HEALTHY, DUPLICATED): "P(positive) cannot settle it. Do the loss of the batches and the held-out loss stay together, and what becomes of the gradient norm?",
    (HEALTHY, SWAPPED): "The batches carry the labels that were trained on, so their curves cannot settle it. Look at what was measured elsewhere: held-out loss, held-out accuracy, fresh samples.",
    (HEALTHY, MISSING): "What must the very first loss and the first implicit rewards be while the policy still is its reference?",
    (HIGH, LOW): "One scale settles it: does the KL end at tenths of a nat, or near a hundred?",
    (HIGH, BETA): "A KL of dozens of nats has several causes. Divide the fall of the implicit rewards by the fall of the log-probabilities: that is beta. And does the loss end above log 2 or below?",
    (HIGH, NOISY): f"{ABOVE} Has accuracy left one half, and how far have the log-probabilities gone?",
    (HIGH, DUPLICATED): f"{ABOVE} What does the loss of the batches do meanwhile, and the gradient norm?",
    (HIGH, SWAPPED): f"{ABOVE} On which side of one half does held-out accuracy end, and does P(positive) rise or fall?",
    (HIGH, MISSING): "A loss of several nats and log-probabilities that plunge have two causes. Look at the first step, before anything is learned: what are the loss and the implicit rewards there?",
    (LOW, BETA): "A loss that stays near log 2 and small implicit rewards have two causes. KL and log-probabilities know which: has the policy hardly moved, or moved far and been charged little?",
    (LOW, NOISY): "P(positive) that stays where it was has two causes. Is accuracy a coin's, or has the sign of the margin been learned? And does the held-out loss fall or rise?",
    (LOW, DUPLICATED): "How far does the loss of the batches fall: by some hundredths, or to 0? And do the held-out pairs follow?",
    (LOW, SWAPPED): "Look at what was not measured on the batches: on which side of one half does held-out accuracy end, and does P(positive) fall?",
    (LOW, MISSING): "Two scales settle it: is the first loss log 2 or several nats, and does the KL end at tenths or at dozens?",
    (BETA, NOISY): "Is accuracy a coin's, and do P(positive) and the log-probabilities stay where they began?",
    (BETA, DUPLICATED): "Small gradients have two causes: is the norm small from the first step on, or does it begin large and vanish? And does the loss of the batches reach 0?",
    (BETA, SWAPPED): "Does P(positive) rise or fall, and on which side of one half does held-out accuracy end?",
    (BETA, MISSING): "A KL of dozens of nats has several causes. Is the first loss log 2, and at which number do the implicit rewards begin?",
    (NOISY, DUPLICATED): f"{ABOVE} Do the batches themselves learn nothing, or everything?",
    (NOISY, SWAPPED): f"{ABOVE} Does the accuracy of the batches rise or stay a coin's, and does P(positive) fall or stay?",
    (NOISY, MISSING): "Read the scales: where do the loss and the implicit rewards begin, and how large does the KL become?",
    (DUPLICATED, SWAPPED): "A held-out loss that parts from the batches' has several causes. On which side of one half is held-out accuracy, and does P(positive) rise or fall?",
    (DUPLICATED, MISSING): "A held-out loss that parts from the batches' has several causes. Where does the batches' loss begin, and does it reach 0?",
    (SWAPPED, MISSING): f"{ABOVE} Where does the loss of the batches begin, and does P(positive) rise or fall?",
}  # fmt: skip


def mistaken(title: str, right: str, said: str) -> Wrong:
    hint = CONTRASTS.get((right, said)) or CONTRASTS[said, right]
    return Wrong(f"{title} taken for {said!r}", lambda: {title: said}, hint)


DIAGNOSIS = Exercise(
    id="09.5",
    title="Eight runs without their answers",
    kind="diagnose",
    truth=diagnosis_truth,
    cases=lambda generator: [()],
    wrong=tuple(
        mistaken(f"Run {k}", DIAGNOSES[i], said)
        for k, i in enumerate(ORDER, start=1)
        for said in DIAGNOSES
        if said != DIAGNOSES[i]
    ),
    difficulty=4,
    importance=5,
    minutes=13,
    workshop=True,
)

EXERCISES = (SEQUENCE_KL, WIN_RATE, GAIN, TOKENS, DIAGNOSIS)
