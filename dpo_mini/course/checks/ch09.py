"""09 Evaluate like a researcher: KL, win rates and gains with their intervals, and a diagnosis."""

import json
import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


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


def sequence_kl(policy, reference, mask):
    at_each_position = (policy.exp() * (policy - reference)).sum(-1)
    return (at_each_position * mask).sum(1).mean()


SEQUENCE_KL = Exercise(
    "09.1", "The sequence KL, exact at each position", "implement", difficulty=2, importance=5, minutes=8,
    truth=kl_truth, cases=kl_cases, tolerance=1e-9,
    right=(
        sequence_kl,
        lambda p, q, m: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)[m.bool()].sum() / len(m),
        lambda p, q, m: torch.einsum("stv,stv,st->", p.exp(), p - q, m.double()) / p.shape[0],
        lambda p, q, m: (kl_divergence(Categorical(logits=p), Categorical(logits=q)) * m).sum(1).mean(),
        lambda p, q, m: torch.stack([(a[c == 1].exp() * (a[c == 1] - b[c == 1])).sum() for a, b, c in zip(p, q, m)]).mean(),
    ),
    wrong=(
        Wrong("averaged under the reference", "policy.exp() -> reference.exp()", "The log-ratio is right. But the next token is drawn from the policy: whose probabilities weigh it?"),
        Wrong("mean over the tokens of a sample", "(at_each_position * mask).sum(1).mean() -> ((at_each_position * mask).sum(1) / mask.sum(1)).mean()",
              "A text of 64 tokens has gone further from the reference than its first half. What happens to yours if every token has the same KL and the text becomes longer?"),
        Wrong("mean over all tokens of the batch", "(at_each_position * mask).sum(1).mean() -> (at_each_position * mask).sum() / mask.sum()", "This is nats per token. The bounds of the theory are about whole completions: what must a sample's number be before the samples are averaged?"),
        Wrong("mean over all positions", ".sum(1).mean() -> .mean()", "The mean divides by the positions too, padding included. Which of the two dimensions is summed, and which is averaged?"),
        Wrong("the last token is left out", "mask = mask * (mask.flip(1).cumsum(1).flip(1) > 1)", "To stop is a choice as well. Does the mask count the position that decides on the last token?"),
        Wrong("the first token is left out", "mask = mask * (mask.cumsum(1) > 1)", "Positions and mask are aligned already: another shift by one loses the first token of each completion."),
        Wrong("one value per sample", ".mean() -> ", "These are the right estimates, one a completion. The task wants one number of them."),
        Wrong("only the likeliest token", "(policy.exp() * (policy - reference)).sum(-1) -> (policy - reference).gather(-1, policy.argmax(-1, keepdim=True)).squeeze(-1)", "The policy draws every token at times. With all its probabilities at hand, no token needs to be picked out."),
        Wrong("every token weighs the same", "(policy.exp() * (policy - reference)) -> (policy - reference)", "An expectation weighs each token by how often the policy would draw it."),
        Wrong("mean over the vocabulary", ".sum(-1) -> .mean(-1)", "The weights sum to 1 over the vocabulary, so the weighted sum is the average already."),
        Wrong("the unweighted mean over the vocabulary", "(policy.exp() * (policy - reference)).sum(-1) -> (policy - reference).mean(-1)", "The plain mean is right over tokens that were drawn from the policy. Here every token is listed once: what makes up for that?"),
        Wrong("log-probabilities as weights", "policy.exp() -> policy", "The arguments are logarithms, and weights are probabilities."),
        Wrong("absolute log-ratios", "(policy - reference) -> (policy - reference).abs()", "Where the policy has become less likely to write a token, its log-ratio counts with a minus. The sum is positive without help."),
        Wrong("both directions averaged", "policy.exp() * -> (policy.exp() - reference.exp()) / 2 *", "That is symmetric; KL(pi || pi_ref) averages over the policy's texts only."),
        Wrong("cross-entropy", "policy.exp() * (policy - reference) -> -policy.exp() * reference", "This is how surprising the reference finds the policy's tokens. Where the two are equal, KL must be 0; is yours?"),
        Wrong("difference of probabilities", "(policy - reference) -> (policy.exp() - reference.exp())", "The logarithm of a ratio is a difference of logarithms, and those you have already."),
        Wrong("a small number inside the logarithm", "(policy - reference) -> (policy.exp() / (reference.exp() + 1e-8)).log()", "The small number hides how surprised the reference is, and that is what KL is to say. The logarithms that you were given need no protection."),
    ),
)  # fmt: skip


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
        Edge("rewards are nearly equal, but not quite", (perfect + 1e-9, perfect)),
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


def by_roots(a, b, z=Z):
    """The roots of (1 + z²/n) p² - (2 share + z²/n) p + share²."""
    share, k = float(((a > b).double() + 0.5 * (a == b)).mean()), z * z / len(a)
    root = math.sqrt(max(0.0, (2 * share + k) ** 2 - 4 * (1 + k) * share * share))
    return share, (2 * share + k - root) / (2 + 2 * k), (2 * share + k + root) / (2 + 2 * k)


def win_rate(policy, reference):
    n = len(policy)
    share = ((1 + torch.sign(policy - reference)) / 2).mean().item()
    k = 1.96**2 / n
    middle = (share + k / 2) / (1 + k)
    half_width = math.sqrt(k * share * (1 - share) + k * k / 4) / (1 + k)
    return share, middle - half_width, middle + half_width


WIN_RATE = Exercise(
    "09.2", "A win rate and Wilson's interval", "implement", difficulty=3, importance=4, minutes=10,
    truth=rate_truth, cases=rate_cases, tolerance=2e-5,
    right=(win_rate, by_roots, lambda policy, reference: by_roots(policy, reference, 1.959964),),
    wrong=(
        Wrong("ties are dropped", "policy, reference = policy[policy != reference], reference[policy != reference]", "Without its ties the rate is about a selection of the prompts. What is a tie worth, if both sides are to get the same?"),
        Wrong("ties are dropped from the rate, not from n", "torch.sign(policy - reference)) -> torch.sign(policy - reference)[policy != reference])", "The rate is about the prompts without ties, the interval about all. What is a tie worth, if both sides are to get the same?"),
        Wrong("a tie is a loss", "((1 + torch.sign(policy - reference)) / 2) -> (policy > reference).double()", "Let the reference compete with its own texts: all ties, and its win rate must be one half. Is yours?"),
        Wrong("a tie is a win", "((1 + torch.sign(policy - reference)) / 2) -> (policy >= reference).double()", "Let the reference compete with its own texts: all ties, and its win rate must be one half. Is yours?"),
        Wrong("wins minus losses", "result = tuple(2 * x - 1 for x in result)", "Against itself this gives 0, but the null of a win rate is one half. How many points are a win, a tie and a loss worth?"),
        Wrong("the textbook interval", "return share, middle - half_width, middle + half_width -> half_width = 1.96 * math.sqrt(share * (1 - share) / n); return share, share - half_width, share + half_width",
              "It has width 0 for 20 wins of 20, as it puts the observed share into the standard error. Whose standard error stands in Wilson's condition?"),
        Wrong("the textbook interval, clipped", "return share, middle - half_width, middle + half_width -> half_width = 1.96 * math.sqrt(share * (1 - share) / n); return share, max(0.0, share - half_width), min(1.0, share + half_width)",
              "Clipping hides the ends, but for 20 wins of 20 the width is still 0. Whose standard error stands in Wilson's condition?"),
        Wrong("the mean's interval of 0, 1/2 and 1", "return share, middle - half_width, middle + half_width -> half_width = 1.96 * ((1 + torch.sign(policy - reference)) / 2).std().item() / math.sqrt(n); return share, share - half_width, share + half_width",
              "That is the interval of any mean. For 20 wins of 20 its width is 0; Wilson's is not."),
        Wrong("Agresti and Coull's interval", "math.sqrt(k * share * (1 - share) + k * k / 4) / (1 + k) -> 1.96 * math.sqrt(middle * (1 - middle) / (n + 1.96**2))",
              "You have Wilson's centre, but not his width: that follows exactly from the quadratic equation in p. Solve it without moving the share first."),
        Wrong("Hoeffding's interval", "return share, middle - half_width, middle + half_width -> half_width = math.sqrt(math.log(40) / (2 * n)); return share, share - half_width, share + half_width",
              "That bound holds for any distribution and is wider than it needs to be here. Solve Wilson's condition for p."),
        Wrong("the interval's centre as the mean", "return share, -> return middle,", "Wilson's interval does not lie symmetrically about the observed rate. The rate to report is the observed one."),
        Wrong("centred at the observed rate", "middle - half_width, middle + half_width -> share - half_width, share + half_width", "The width is right. But where is the middle between the two roots of the quadratic equation?"),
        Wrong("not divided by 1 + z²/n", "/ (1 + k) -> ", "The coefficient of p² in the quadratic equation is not 1. What do both roots have to be divided by?"),
        Wrong("a term is missing under the root", "+ k * k / 4 -> ", "For 20 wins of 20 your root is 0. Multiply out the discriminant again: which term does not contain the share?"),
        Wrong("one standard error", "1.96 -> 1.0", "One standard error either way covers the truth in 68 of 100 experiments. How many make it 95?"),
        Wrong("90% instead of 95%", "1.96 -> 1.645", "With 1.645 five in a hundred miss on each side. How many standard errors leave five in all?"),
        Wrong("99% instead of 95%", "1.96 -> 2.576", "2.576 standard errors cover 99 of 100 experiments; the task asks for 95."),
        Wrong("counts texts, not prompts", "n = len(policy) -> n = 2 * len(policy)", "A comparison takes two texts and gives one result. How many results are there?"),
        Wrong("every text against every other", "policy - reference -> policy[:, None] - reference", "Text i of the policy meets text i of the reference, the one for the same prompt, and no other."),
        Wrong("the mean probability of a win", "((1 + torch.sign(policy - reference)) / 2) -> torch.sigmoid(policy - reference)", "A narrow win and a clear one count the same. Only the sign of the difference matters."),
        Wrong("half of the width, not the ends", "middle - half_width, middle + half_width -> half_width, half_width", "The second and third number are the ends of the interval, not its distance from the middle."),
    ),
)  # fmt: skip


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


def from_covariance(r, p):
    both = torch.cov(torch.stack([r.sigmoid().mean(1), p.sigmoid().mean(1)]))
    mean = p.sigmoid().mean() - r.sigmoid().mean()
    half = 1.96 * ((both[0, 0] + both[1, 1] - 2 * both[0, 1]) / len(r)).sqrt()
    return mean.item(), (mean - half).item(), (mean + half).item()


def gain(reference, policy):
    gains = (policy.sigmoid() - reference.sigmoid()).mean(1)
    mean = gains.mean().item()
    error = gains.std().item() / math.sqrt(len(gains))
    return mean, mean - 1.96 * error, mean + 1.96 * error


GAIN = Exercise(
    "09.3", "A gain and its paired interval", "implement", difficulty=2, importance=4, minutes=8,
    truth=gain_truth, cases=gain_cases, tolerance=2e-5,
    right=(
        gain,
        from_covariance,
        lambda r, p: (lambda d: (d.mean(), d.mean() - 1.96 * (d.var() / len(d)).sqrt(), d.mean() + 1.96 * (d.var() / len(d)).sqrt()))(p.sigmoid().mean(1) - r.sigmoid().mean(1)),
    ),
    wrong=(
        Wrong("logits, not probabilities", ".sigmoid() -> ", "The reward's logit is not bounded, and a few extreme texts would decide. What turns a logit into P(positive)?"),
        Wrong("the sigmoid of the difference", "(policy.sigmoid() - reference.sigmoid()) -> (policy - reference).sigmoid()", "That is Bradley-Terry's probability that the policy's text is preferred. The gain is a difference of two probabilities."),
        Wrong("the sigmoid of the mean logit", "(policy.sigmoid() - reference.sigmoid()).mean(1) -> policy.mean(1).sigmoid() - reference.mean(1).sigmoid()", "The sigmoid is curved: the mean of P(positive) is not P(positive) of the mean logit. In which order do you take them?"),
        Wrong("the exponential for the sigmoid", ".sigmoid() -> .exp()", "exp of a logit gives odds, which have no upper limit. A probability lies between 0 and 1."),
        Wrong("the softmax for the sigmoid", ".sigmoid() -> .softmax(0)", "Each text is positive or not by itself; the texts do not share one probability among them."),
        Wrong("the share of positive texts", "(policy.sigmoid() - reference.sigmoid()) -> ((policy > 0).double() - (reference > 0).double())", "Counting texts above one half throws away how sure the reward is. The task asks for the mean P(positive)."),
        Wrong("counts completions, not prompts", ".mean(1) -> .flatten()", "Four completions of one prompt are not four independent witnesses. How many independent gains are there?"),
        Wrong("only the first completion", ".mean(1) -> [:, 0]", "All completions of a prompt say something about it. What is the gain of a prompt?"),
        Wrong("unpaired", "gains.std().item() / math.sqrt(len(gains)) -> math.sqrt((policy.sigmoid().mean(1).var() + reference.sigmoid().mean(1).var()) / len(gains))",
              "The prompts are the same for both models, and what they have in common must drop out. Of what do you take the standard deviation?"),
        Wrong("the two intervals' ends subtracted", "gains.std() -> (policy.sigmoid().mean(1).std() - reference.sigmoid().mean(1).std())", "Two intervals do not subtract end by end: their errors would then cancel as if they were always equal. Take the difference prompt by prompt first."),
        Wrong("the worst case of two intervals", "gains.std() -> (policy.sigmoid().mean(1).std() + reference.sigmoid().mean(1).std())", "Both models unlucky in opposite directions is rare, so this is too wide. Take the difference prompt by prompt first."),
        Wrong("divided by n", "gains.std() -> gains.std(correction=0)", "The deviations are taken from the sample's own mean, and that makes them a little too small. By what does a sample's variance divide?"),
        Wrong("the standard deviation for the standard error", "/ math.sqrt(len(gains)) -> ", "This says how much prompts differ, and more prompts do not make it narrower. How does a mean's error depend on n?"),
        Wrong("n for its square root", "math.sqrt(len(gains)) -> len(gains)", "Four times as many prompts halve the interval; yours becomes four times narrower."),
        Wrong("the variance for the standard deviation", "gains.std().item() / math.sqrt(len(gains)) -> gains.var().item() / len(gains)", "A variance is in squared units. What must be done before it is added to a mean?"),
        Wrong("one standard error", "1.96 -> 1.0", "One standard error either way covers the truth in 68 of 100 experiments. How many make it 95?"),
        Wrong("90% instead of 95%", "1.96 -> 1.645", "With 1.645 five in a hundred miss on each side. How many standard errors leave five in all?"),
        Wrong("the interval twice as wide", "1.96 -> 3.92", "1.96 standard errors to either side: the whole width is twice that, not the half."),
        Wrong("the interval half as wide", "1.96 -> 0.98", "1.96 standard errors to either side, not in all."),
        Wrong("half of the width, not the ends", "mean - 1.96 * error, mean + 1.96 * error -> 1.96 * error, 1.96 * error", "The second and third number are the ends of the interval, not its distance from the mean."),
        Wrong("absolute differences", ").mean(1) -> ).abs().mean(1)", "Where the policy's text is worse, it must count against it."),
        Wrong("the relative gain", "(policy.sigmoid() - reference.sigmoid()).mean(1) -> policy.sigmoid().mean(1) / reference.sigmoid().mean(1) - 1", "From .01 to .02 would then be worth as much as from .5 to 1. The gain is a plain difference."),
        Wrong("the policy's P(positive) alone", " - reference.sigmoid() -> ", "A gain compares: with what?"),
    ),
)  # fmt: skip


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


def token_rewards(policy, reference, mask, beta):
    return beta * (policy - reference) * mask[:, 1:]


TOKENS = Exercise(
    "09.4", "The implicit reward of each token", "implement", difficulty=2, importance=3, minutes=6,
    truth=token_truth, cases=token_cases,
    right=(
        token_rewards,
        lambda p, q, m, b: torch.where(m[:, 1:].bool(), b * (p - q), 0.0),
        lambda p, q, m, b: torch.stack([b * c[1:] * x - b * c[1:] * y for x, y, c in zip(p, q, m)]),
        lambda p, q, m, b: ((p - q) * b).masked_fill(m[:, 1:] == 0, 0.0),
    ),
    wrong=(
        Wrong("the last token is left out", "mask = mask * (mask.flip(1).cumsum(1).flip(1) > 1)", "To stop is a choice as well: the EOS is part of the completion, and the mask counts it."),
        Wrong("the first token is left out", "mask = mask * (mask.cumsum(1) > 1)", "The completion's first token is predicted from the prompt, and it counts like any other. Is the mask shifted twice?"),
        Wrong("beta on the policy alone", "beta * (policy - reference) -> (beta * policy - reference)", "Where policy and reference agree, the implicit reward is 0. Is yours?"),
        Wrong("beta on the reference alone", "beta * (policy - reference) -> (policy - beta * reference)", "Where policy and reference agree, the implicit reward is 0. Is yours?"),
        Wrong("the ratio, not its logarithm", "(policy - reference) -> (policy - reference).exp()", "Ratios multiply along a text; it is their logarithms that add up to the sequence's."),
        Wrong("difference of probabilities", "(policy - reference) -> (policy.exp() - reference.exp())", "Differences of probabilities do not add up to anything along a text. Differences of logarithms do."),
        Wrong("weighted by the probability", "beta * -> beta * policy.exp() *", "The weight belongs into a KL, an average over all tokens. Here the token is known."),
        Wrong("one value per sequence", "result = result.sum(1)", "That is the sequence's implicit reward. The task asks what each token adds to it."),
        Wrong("the reward so far", "result = result.cumsum(1) * mask[:, 1:]", "This is the reward of the text up to each token. What has the one token added?"),
        Wrong("spread evenly", "result = mask[:, 1:] * result.sum(1, keepdim=True) / mask[:, 1:].sum(1, keepdim=True)", "The sum is right, but every token gets the same. Which token's log-ratio is which?"),
        Wrong("all of it at the last token", "result = mask[:, 1:] * (mask[:, 1:].flip(1).cumsum(1).flip(1) == 1) * result.sum(1, keepdim=True)", "The sum is right, and RLHF does pay its reward at the end. But the implicit reward is a sum over tokens to begin with: what is each term?"),
        Wrong("divided by the number of tokens", "result = result / mask[:, 1:].sum(1, keepdim=True)", "The parts have to give the whole, and the whole is a sum over tokens, not a mean."),
        Wrong("divided by all positions", "result = result / result.shape[1]", "The parts have to give the whole, and the whole is a sum over tokens, not a mean."),
        Wrong("measured from the mean", "result = mask[:, 1:] * (result - result.sum(1, keepdim=True) / mask[:, 1:].sum(1, keepdim=True))", "Your numbers sum to 0 in every sequence. What should they sum to?"),
        Wrong("not a number outside the completion", "result = result.masked_fill(mask[:, 1:] == 0, math.nan)", "A sum with a nan in it is nan. Which number adds nothing?"),
        Wrong("a column too many", "result = torch.nn.functional.pad(result, (1, 0))", "The first token has no log-probability, so it has no column here: the shape is that of the log-probabilities."),
    ),
)  # fmt: skip


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
    "09.5", "Eight runs without their answers", "diagnose", difficulty=4, importance=5, minutes=13,
    truth=diagnosis_truth, cases=lambda generator: [()],
    wrong=tuple(
        mistaken(f"Run {k}", DIAGNOSES[i], said)
        for k, i in enumerate(ORDER, start=1)
        for said in DIAGNOSES
        if said != DIAGNOSES[i]
    ),
)  # fmt: skip

EXERCISES = (SEQUENCE_KL, WIN_RATE, GAIN, TOKENS, DIAGNOSIS)
