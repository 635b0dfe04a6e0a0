"""10 RLHF, the long way round: REINFORCE, rewards of tokens, their advantages, the clip, a log."""

import math
from functools import cache

import torch

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def reinforce_cases(generator):
    def case(prompts, samples, beta):
        shape = prompts, samples
        scores, logps, gaps = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        level = 4 * torch.randn(prompts, 1, generator=generator, dtype=torch.float64) + 3
        logps = -7 + 1.5 * logps
        return (2 * scores + level, logps.requires_grad_(), (logps + gaps - 1).detach(), beta)

    return [case(1, 2, 0.5), case(2, 3, 0.1), case(4, 5, 1.3), case(3, 2, 0.05)]


def reinforce_truth(scores, logps, reference_logps, beta):
    """Sample by sample, each baseline summed from the others' returns."""
    terms = []
    for i, row in enumerate(scores.tolist()):
        ratios = (logps[i] - reference_logps[i]).tolist()
        returns = [score - beta * ratio for score, ratio in zip(row, ratios)]
        for j, mine in enumerate(returns):
            others = returns[:j] + returns[j + 1 :]
            terms.append((math.fsum(others) / len(others) - mine) * logps[i, j])
    return sum(terms) / len(terms)


def reinforce_by_masks(s, p, q, b):
    n = s.shape[1]
    others = (1 - torch.eye(n, dtype=s.dtype)) / (n - 1)
    with torch.no_grad():
        returns = s + b * (q - p)
        advantages = returns - returns @ others
    return torch.einsum("ij,ij->", advantages, p).neg() / p.numel()


def reinforce_by_pairs(s, p, q, b):
    """No baseline at all: over pairs of samples, differences of returns times those of log pi."""
    returns, n = (s - b * (p - q)).detach(), s.shape[1]
    products = (returns[:, :, None] - returns[:, None]) * (p[:, :, None] - p[:, None])
    return -products.sum() / (2 * (n - 1) * p.numel())


def reinforce_loss(scores, logps, reference_logps, beta):
    returns = scores - beta * (logps.detach() - reference_logps)
    others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return -((returns - others) * logps).mean()


REINFORCE = Exercise(
    "10.1", "REINFORCE, each the other's baseline", "implement", difficulty=3, importance=4, minutes=9,
    truth=reinforce_truth, cases=reinforce_cases,
    right=(reinforce_loss, reinforce_by_masks, reinforce_by_pairs,),
    wrong=(
        Wrong("the return is not detached", "logps.detach() -> logps", "The return is a number that was earned, log pi inside it too: in REINFORCE the gradient passes only through the log-probability that it weighs."),
        Wrong("only the baseline is detached", "logps.detach() -> logps | returns - others -> returns - others.detach()", "The penalty in a sample's own return contains log pi as well. Which parts of the product are constants?"),
        Wrong("no baseline", "returns - others -> returns", "The mean of the gradient is right, but its scatter is large wherever all rewards of a prompt are high: what did the prompt's other samples earn?"),
        Wrong("the sample is in its own baseline", "(returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1) -> returns.mean(1, keepdim=True)", "A baseline that contains the sample's own return takes a part of it away: leave it out of the mean."),
        Wrong("n and n - 1 exchanged", "returns - others -> (returns - others) * ((returns.shape[1] - 1) / returns.shape[1]) ** 2", "To leave the sample out makes its advantage larger than its distance to the mean of all, not smaller."),
        Wrong("the sum of the others", "/ (returns.shape[1] - 1) -> ", "With more samples this baseline grows without end; it should be what one other sample earns on average."),
        Wrong("one baseline for all prompts", "(returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1) -> (returns.sum() - returns) / (returns.numel() - 1)", "Some prompts are easier than others: compare a sample with those of its own prompt."),
        Wrong("the mean of the whole batch", "(returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1) -> returns.mean()", "Some prompts are easier than others: compare a sample with those of its own prompt, itself left out."),
        Wrong("compared across prompts", "(returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1) -> returns.mean(0, keepdim=True)", "Which dimension holds the samples of one prompt?"),
        Wrong("divided by the standard deviation", "returns - others -> (returns - others) / returns.std(1, keepdim=True)", "Other methods do that; it is another estimate. Here the advantage keeps the unit of the reward."),
        Wrong("beta on the score as well", "scores - beta * (logps.detach() - reference_logps) -> beta * (scores - (logps.detach() - reference_logps))", "Only the log-ratio is multiplied by beta: mind the brackets."),
        Wrong("the penalty has no baseline", "(returns.sum(1, keepdim=True) - returns) -> (scores.sum(1, keepdim=True) - scores)", "Also unbiased, but not the task: the baseline is the mean of whole returns, penalty included."),
        Wrong("the mean return itself", "result = -(scores - beta * (logps - reference_logps)).mean()", "Its gradient knows nothing of the reward, which does not depend on log pi once the completion is there."),
        Wrong("a sum for the mean", ".mean() -> .sum()", "The step must not grow with the number of completions: take the mean over all of them."),
        Wrong("the samples of a prompt are added up", ".mean() -> .sum(1).mean()", "The mean is over all completions, not over prompts."),
        Wrong("probabilities where log-probabilities belong", "* logps) -> * logps.exp())", "The gradient of an expectation is E[R grad log pi]: the samples bring the factor pi themselves."),
    ),
)  # fmt: skip


def spans(rows, width):
    """A mask [rows, width] of ones from `start`, `length` long."""
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (start, length) in enumerate(rows):
        mask[i, start : start + length] = 1
    return mask


def token_cases(generator):
    def case(rows, width, beta):
        mask = spans(rows, width)
        drawn = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
        logps = -3 + drawn[0]
        reference = logps + 0.8 * drawn[1] - 0.3
        scores = 2 + torch.randn(len(rows), generator=generator, dtype=torch.float64)
        return logps, reference, mask, scores, beta

    return [
        case([(1, 2)], 4, 0.5),
        Edge("the first row is cut off at the limit: no padding", case([(2, 4), (1, 3)], 6, 0.1)),
        Edge("one token; padding on the left", case([(0, 1), (3, 2), (5, 4), (4, 5)], 9, 1.7)),
        Edge("rows end at different places", case([(1, 3), (1, 1), (2, 2)], 4, 0.05)),
    ]


def token_truth(logps, reference_logps, mask, scores, beta):
    """A token at a time, from behind: the first one met gets the score."""
    rewards = torch.zeros_like(logps)
    for i, score in enumerate(scores.tolist()):
        waiting = score
        for t in reversed(range(mask.shape[1])):
            if mask[i, t] == 1:
                rewards[i, t] = waiting - beta * (logps[i, t] - reference_logps[i, t]).item()
                waiting = 0.0
    return rewards


def tokens_by_index(p, q, m, s, b):
    rewards = torch.where(m.bool(), b * (q - p), 0.0)
    last = (m.cumsum(1) * m).argmax(1)
    rewards[torch.arange(len(s)), last] += s
    return rewards


def tokens_by_difference(p, q, m, s, b):
    after = torch.nn.functional.pad(m, (0, 1))[:, 1:]
    return m * ((1 - after) * s.unsqueeze(1) - b * p + b * q)


def rewards_of_tokens(logps, reference_logps, mask, scores, beta):
    rewards = -beta * (logps - reference_logps) * mask
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


TOKENS = Exercise(
    "10.2", "The reward of each token", "implement", difficulty=2, importance=4, minutes=8,
    truth=token_truth, cases=token_cases,
    right=(rewards_of_tokens, tokens_by_index, tokens_by_difference,),
    wrong=(
        Wrong("the score at every token", "rewards[torch.arange(len(scores)), last] += scores -> rewards += scores[:, None] * mask", "A completion is scored once, when it is complete: a longer one must not earn more for that. At which token is that?"),
        Wrong("the score spread over the tokens", "rewards[torch.arange(len(scores)), last] += scores -> rewards += mask * (scores / mask.sum(1))[:, None]", "The sum is right. But the reward model has read nothing before the last token, so nothing is earned there."),
        Wrong("the score in the last column", "last = (torch.arange(mask.shape[1]) * mask).argmax(1) -> last = -1", "Rows end at different places: in a shorter one the last column is padding."),
        Wrong("the score at the first token", "last = (torch.arange(mask.shape[1]) * mask).argmax(1) -> last = mask.argmax(1)", "argmax finds the first 1 of a row. The score comes with the last."),
        Wrong("the prompt is forgotten when the end is sought", "last = (torch.arange(mask.shape[1]) * mask).argmax(1) -> last = mask.sum(1) - 1", "The number of completion tokens is the place of the last one only where the completion begins in column 0."),
        Wrong("one token late", "rewards[torch.arange(len(scores)), last] += scores -> for i, t in enumerate((last + 1).tolist()):\n        rewards[i, t : t + 1] += scores[i]", "That column is padding, or outside the row. Is your place counted from 1?"),
        Wrong("one token early", "rewards[torch.arange(len(scores)), last] += scores -> for i, t in enumerate((last - 1).tolist()):\n        rewards[i, t : t + 1] += scores[i]", "The last completion token is the one that ends it, an EOS where there is one: it gets the score."),
        Wrong("the last token pays no penalty", "+= scores -> = scores", "The score is added to the penalty of the last token; it does not replace it. Add up a row: what should come out?"),
        Wrong("the whole penalty at the end", "rewards[torch -> penalty = rewards.sum(1); rewards = 0 * rewards; rewards[torch | += scores -> += scores + penalty",
              "The sum is right. But it is known for each token what it cost, so each should pay at once: that is what makes credit easier to assign."),
        Wrong("beta on the score as well", "+= scores -> += beta * scores", "Beta is the price of the KL; the score counts as it is."),
        Wrong("padding pays", "reference_logps) * mask -> reference_logps) * mask.cumsum(1).clamp(max=1)", "What stands after the completion was never sampled. What does the mask say there?"),
        Wrong("everything pays", "reference_logps) * mask -> reference_logps)", "Only completion tokens are actions; the mask says which they are."),
        Wrong("the ratio, not its logarithm", "(logps - reference_logps) -> (logps - reference_logps).exp()", "The arguments are logarithms already, and the KL is the mean of a difference of logarithms."),
        Wrong("the distance, whatever its sign", "(logps - reference_logps) -> (logps - reference_logps).abs()", "A token's log-ratio may be negative; then it is refunded. Only so do the tokens add up to the completion's log-ratio."),
        Wrong("the penalty per token of the row", "reference_logps) * mask -> reference_logps) * mask / mask.sum(1, keepdim=True)", "The completion's log-ratio is the sum over its tokens, not their mean."),
        Wrong("one number for each completion", "result = result.sum(1)", "That is the return of the whole completion. Here each token is an action with its own reward: a tensor like logps."),
    ),
)  # fmt: skip


def gae_cases(generator):
    def case(rows, width, gamma, lam):
        mask = spans(rows, width)
        rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
        return rewards, 2 * values + 1, mask, gamma, lam

    return [
        case([(1, 3)], 5, 0.9, 0.7),
        Edge("no padding", case([(0, 4), (2, 2)], 4, 1.0, 0.95)),
        case([(3, 5), (1, 1), (2, 3)], 9, 0.95, 1.0),
        case([(1, 4), (2, 2)], 7, 0.8, 0.0),
        case([(2, 6), (0, 3), (1, 5), (4, 1)], 9, 0.6, 0.5),
    ]


def gae_truth(rewards, values, mask, gamma, lam):
    """Without TD errors: the mixture of n-step advantages, n = 1, 2, ..., with weights
    (1 - lambda) lambda^(n - 1) and all that is left of the weight on the longest.
    """
    advantages = torch.zeros_like(rewards)
    for i, row in enumerate(mask.tolist()):
        places = [t for t, m in enumerate(row) if m]
        r, v = ([x[i, t].item() for t in places] for x in (rewards, values))
        for k, t in enumerate(places):
            left = len(places) - k
            steps = []
            for n in range(1, left + 1):
                earned = math.fsum(gamma**j * r[k + j] for j in range(n))
                steps.append(earned + (gamma**n * v[k + n] if n < left else 0.0) - v[k])
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
            advantages[i, t] = math.fsum(w * a for w, a in zip(weights, steps))
    return advantages


def forwards(rewards, values, mask, gamma, lam):
    """The recursion from the first token to the last."""
    found = advantages(rewards, values, mask, gamma, 0.0)  # the TD errors
    for t in range(1, rewards.shape[1]):
        found[:, t] += gamma * lam * found[:, t - 1] * mask[:, t]
    return found


def gae_by_sums(rewards, values, mask, gamma, lam):
    """The sum of discounted TD errors, as one product with a triangular matrix."""
    m, n = mask.to(rewards), rewards.shape[1]
    v = values * m
    errors = (rewards + gamma * torch.nn.functional.pad(v, (0, 1))[:, 1:] - v) * m
    ahead = (torch.arange(n)[:, None] - torch.arange(n)[None]).to(rewards)
    powers = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0), 0.0)
    return errors @ powers * m


def gae_row_by_row(rewards, values, mask, gamma, lam):
    found = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        following = advantage = 0.0
        for t in mask[i].nonzero().flatten().flip(0).tolist():
            advantage = rewards[i, t] - values[i, t] + gamma * (following + lam * advantage)
            found[i, t], following = advantage, values[i, t]
    return found


def advantages(rewards, values, mask, gamma, lam):
    values = values * mask
    found = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        found[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], found[:, t]
    return found


GAE = Exercise(
    "10.3", "Generalised advantage estimation", "implement", difficulty=3, importance=3, minutes=9,
    truth=gae_truth, cases=gae_cases,
    right=(advantages, gae_by_sums, gae_row_by_row,),
    wrong=(
        Wrong("padding has a value", "values = values * mask -> pass", "After the last token nothing more can be earned: the value there is 0, whatever number stands in the tensor."),
        Wrong("the advantage of padding leaks in", "values = values * mask -> raw, values = values, values * mask | - values[:, t] -> - raw[:, t] | (delta + gamma * lam * next_advantage) * mask[:, t] -> delta + gamma * lam * next_advantage | return found -> return found * mask",
              "The sum of TD errors ends with the completion. What does your recursion hold when it arrives at the last token?"),
        Wrong("padding leaks in twice", "values = values * mask -> pass | (delta + gamma * lam * next_advantage) * mask[:, t] -> delta + gamma * lam * next_advantage | return found -> return found * mask",
              "Both the value and the advantage after the last token are 0. To multiply by the mask at the very end is too late."),
        Wrong("the last token follows itself", "next_value = next_advantage = -> inside = next_value = next_advantage = | gamma * next_value -> gamma * (next_value + (1 - inside) * values[:, t]) | next_value, next_advantage = values[:, t], found[:, t] -> next_value, next_advantage, inside = values[:, t], found[:, t], mask[:, t]",
              "After the last token comes nothing, not the same token again: V is 0 there."),
        Wrong("the value that follows is missing", "+ gamma * next_value -> ", "A TD error compares V_t with what one step brings: its reward and the value of where it leads."),
        Wrong("the value itself is missing", "next_value - values[:, t] -> next_value", "An advantage is how much better it went than expected. Where is what was expected?"),
        Wrong("both values are missing", "rewards[:, t] + gamma * next_value - values[:, t] -> rewards[:, t]", "That is a discounted sum of rewards. The value model's expectations are to be compared with them."),
        Wrong("the signs of the values", "rewards[:, t] + gamma * next_value - values[:, t] -> rewards[:, t] - gamma * next_value + values[:, t]", "What follows is a gain, what was expected is subtracted."),
        Wrong("gamma is missing in the TD error", "gamma * next_value -> next_value", "What follows is one step away, so it is discounted by gamma."),
        Wrong("gamma on the expected value as well", "gamma * next_value - values[:, t] -> gamma * (next_value - values[:, t])", "V_t is the expectation at this token itself: only what lies ahead is discounted."),
        Wrong("gamma is missing in the sum", "gamma * lam -> lam", "A TD error one token ahead is discounted twice over: by gamma and by lambda."),
        Wrong("neither gamma nor lambda in the sum", "gamma * lam * -> ", "TD errors further ahead count less: with which weights?"),
        Wrong("the TD errors alone", "lam = 0", "That is lambda = 0: one step, and all trust in the value model."),
        Wrong("lambda in the TD error as well", "gamma * next_value -> gamma * lam * next_value", "Lambda weighs TD errors against one another; a TD error itself knows only gamma."),
        Wrong("from the first token to the last", forwards, "An action is judged by what comes after it, not by what came before. In which direction must the loop run?"),
        Wrong("the rewards come one token late", "rewards = torch.nn.functional.pad(rewards * mask, (0, 1))[:, 1:]", "Entry t of the rewards belongs to the token of entry t of the values: nothing is to be shifted."),
        Wrong("multiplied by 1 - lambda", "result = (1 - lam) * result", "The weights 1 - lambda are those of the n-step advantages. Written with TD errors they are gone."),
        Wrong("returns for advantages", "result = result + values * mask", "That is what the value model is trained towards: advantage plus value."),
        Wrong("whitened", "inside = result[mask.bool()]; result = (result - inside.mean()) / (inside.var(unbiased=False) + 1e-8).sqrt() * mask", "Whitening comes afterwards, and only for the policy: the value model needs advantages in the unit of the reward."),
        Wrong("the prompt has advantages", "values = values * mask -> rewards, values, mask = rewards * mask, values * mask, torch.ones_like(mask)", "Prompt tokens are no actions of the policy: their entries must be 0."),
    ),
)  # fmt: skip


TOKENS_OF_A_MINIBATCH = {
    "a": (1.0, 1.0), "b": (1.1, -1.0), "c": (1.5, 1.0),
    "d": (1.5, -1.0), "e": (0.5, 1.0), "f": (0.5, -1.0),
}  # fmt: skip


def clip_truth():
    """Computed: the loss a little to the right and to the left, and the step downhill."""

    def loss(logp, advantage, clip=0.2):
        ratio = math.exp(logp)
        return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)

    def way(ratio, advantage, h=1e-6):
        at = math.log(ratio)
        slope = (loss(at + h, advantage) - loss(at - h, advantage)) / (2 * h)
        return "none" if abs(slope) < 1e-9 else "down" if slope > 0 else "up"

    return {name: way(*token) for name, token in TOKENS_OF_A_MINIBATCH.items()}


CLIP = Exercise(
    "10.4", "Where the clip stops the gradient", "predict", difficulty=3, importance=4, minutes=5,
    truth=clip_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a: nothing to gain at ratio 1", {"a": "none"}, "At ratio 1 the loss is minus the advantage, but what happens to it when the ratio grows a little? The derivative of the ratio by log pi is the ratio."),
        Wrong("a: the sign of the advantage", {"a": "down"}, "This token did better than expected: it should become more likely."),
        Wrong("b: clipped inside the interval", {"b": "none"}, "The clip begins at 1.2; at 1.1 both expressions in the minimum are the same, and neither is flat."),
        Wrong("b: the sign of the advantage", {"b": "up"}, "This token did worse than expected: it should become less likely."),
        Wrong("c: the clip is ignored", {"c": "up"}, "Compute both expressions: 1.5 and 1.2. Which is the smaller, and does it change when the ratio does?"),
        Wrong("c: the clip pulls back", {"c": "down"}, "A clipped expression is constant. Can a constant pull?"),
        Wrong("d: clipped on both sides", {"d": "none"}, "Compute both expressions: -1.5 and -1.2. The minimum takes the smaller, and that is not the clipped one."),
        Wrong("d: the sign of the advantage", {"d": "up"}, "This token did worse than expected and has become more likely all the same. Which way should it go?"),
        Wrong("e: clipped on both sides", {"e": "none"}, "Compute both expressions: 0.5 and 0.8. The minimum takes the smaller, and that is not the clipped one."),
        Wrong("e: the sign of the advantage", {"e": "down"}, "This token did better than expected and has become less likely all the same. Which way should it go?"),
        Wrong("f: the clip is ignored", {"f": "down"}, "Compute both expressions: -0.5 and -0.8. Which is the smaller, and does it change when the ratio does?"),
        Wrong("f: the clip pulls back", {"f": "up"}, "A clipped expression is constant. Can a constant pull?"),
    ),
)  # fmt: skip


# What six runs printed, as in the task: score, KL, objective and true reward of seven steps.
SHOWN = (1, 5, 10, 20, 40, 81, 200)
LOGS = {
    "A": (
        (0.000, 0.000, 0.000, 0.000),
        (0.143, 0.008, 0.077, 0.142),
        (0.156, 0.010, 0.078, 0.155),
        (0.157, 0.010, 0.078, 0.156),
        (0.157, 0.010, 0.078, 0.156),
        (0.157, 0.010, 0.078, 0.156),
        (0.157, 0.010, 0.078, 0.156),
    ),
    "B": (
        (0.000, 0.000, 0.000, 0.000),
        (0.111, 0.012, 0.106, -0.117),
        (0.263, 0.064, 0.237, -0.273),
        (0.597, 0.310, 0.474, -0.611),
        (1.249, 1.207, 0.766, -1.279),
        (1.873, 2.476, 0.883, -1.981),
        (2.034, 2.859, 0.890, -2.215),
    ),
    "C": (
        (0.000, 0.000, 0.000, 0.000),
        (0.399, 0.078, 0.387, 0.395),
        (1.037, 0.512, 1.009, 1.010),
        (3.007, 3.933, 2.969, 2.459),
        (5.692, 12.799, 0.887, 2.007),
        (2.184, 1.806, 0.437, 2.053),
        (2.239, 1.909, 0.864, 2.113),
    ),
    "D": (
        (0.000, 0.000, 0.000, 0.000),
        (0.389, 0.074, 0.360, 0.385),
        (0.896, 0.374, 0.747, 0.878),
        (1.805, 1.405, 1.242, 1.700),
        (2.777, 3.075, 1.547, 2.415),
        (3.218, 3.929, 1.647, 2.690),
        (3.388, 4.259, 1.684, 2.815),
    ),
    "E": (
        (0.000, 0.000, 0.000, 0.000),
        (0.416, 0.086, 0.416, 0.411),
        (1.110, 0.592, 1.110, 1.078),
        (3.203, 4.448, 3.203, 2.531),
        (6.738, 17.926, 6.738, 0.819),
        (8.149, 26.480, 8.149, -1.447),
        (8.599, 30.075, 8.599, -2.320),
    ),
    "F": (
        (0.000, 0.000, 0.000, 0.000),
        (-0.308, 1.739, -1.004, -0.307),
        (5.905, 13.528, 0.494, 1.899),
        (5.916, 13.597, 0.477, 1.880),
        (5.916, 13.599, 0.476, 1.880),
        (-0.303, 1.626, -0.954, -0.302),
        (5.916, 13.599, 0.476, 1.880),
    ),
}  # fmt: skip
KNOBS = (
    "nothing", "no KL penalty", "beta too large", "learning rate too large",
    "learning rate too small", "controller winds up", "stale reward model",
)  # fmt: skip
WORDS = 20  # of a text; each is praise, filler or neither
START = (0.2, 0.1, 0.7)  # the reference's probabilities of the three
PRAISE, FILLER = 0.5, -0.4  # reward of a word


@cache
def knob_run(knob):
    """Climb the learned reward less beta KL by its exact gradient, with one knob turned wrong.

    Every word of a text is drawn by itself, so score, KL and gradient are closed forms.
    """
    beta = {"no KL penalty": 0.0, "beta too large": 8.0}.get(knob, 0.4)
    rate = {"learning rate too large": 1.0, "learning rate too small": 2e-4}.get(knob, 0.02)
    learned = (-0.1, 0.5, 0.0) if knob == "stale reward model" else (PRAISE, FILLER, 0.0)
    logits, rows = [math.log(p) for p in START], []
    for step in range(1, max(SHOWN) + 1):
        top = max(logits)
        total = math.fsum(math.exp(z - top) for z in logits)
        logps = [z - top - math.log(total) for z in logits]
        p = [math.exp(x) for x in logps]
        ratios = [x - math.log(q) for x, q in zip(logps, START)]
        kl = WORDS * math.fsum(a * b for a, b in zip(p, ratios))
        score = WORDS * math.fsum((a - q) * r for a, q, r in zip(p, START, learned))
        if step in SHOWN:
            rows.append((score, kl, score - beta * kl, true_reward(p) - true_reward(START)))
        gains = [r - beta * b for r, b in zip(learned, ratios)]
        mean = math.fsum(a * g for a, g in zip(p, gains))
        logits = [z + rate * WORDS * a * (g - mean) for z, a, g in zip(logits, p, gains)]
        if knob == "controller winds up":
            beta *= 1 + max(-0.2, min(0.2, kl / 3 - 1))
    return tuple(rows)


def true_reward(p):
    """Of a policy: as the learned one, less a price for every text with more than 8 words of praise."""
    too_much = math.fsum(
        math.comb(WORDS, n) * p[0] ** n * (1 - p[0]) ** (WORDS - n) * 0.08 * (n - 8) ** 2
        for n in range(9, WORDS + 1)
    )
    return WORDS * (PRAISE * p[0] + FILLER * p[1]) - too_much


def knob_truth():
    """Each knob is turned and the run made again; the log that it gives bears its name."""

    def distance(knob, seen):
        return sum(abs(a - b) for x, y in zip(knob_run(knob), seen) for a, b in zip(x, y))

    return {run: min(KNOBS, key=lambda k: distance(k, seen)) for run, seen in LOGS.items()}


KNOB = Exercise(
    "10.5", "Which knob was it?", "diagnose", difficulty=3, importance=4, minutes=8,
    truth=knob_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("A: a small step", {"A": "learning rate too small"}, "It hardly moves, that is right. But a slow run would still be on its way at step 200; this one has arrived. What does one nat cost here?"),
        Wrong("A: sound, as nothing breaks", {"A": "nothing"}, "Nothing breaks because nothing happens: compare its score with the other runs'. What does one nat cost here?"),
        Wrong("B: sound, as score and objective rise", {"B": "nothing"}, "Score, KL and objective are all as they should be. Only one column is not made by the run itself: which way does it go, and from which step on?"),
        Wrong("B: the policy went too far", {"B": "no KL penalty"}, "Its KL is smaller than that of the sound run, and the true reward falls from the first steps on. Where, then, does the reward model err?"),
        Wrong("C: a price of 0", {"C": "no KL penalty"}, "Early on a nat costs almost nothing, that is right. Compute the price at steps 5, 20 and 81 as well."),
        Wrong("C: steps that are too large", {"C": "learning rate too large"}, "It overshoots and comes back. But with the wrong step size the price of a nat would stay as it was: compute it at several steps."),
        Wrong("C: sound, as it settles", {"C": "nothing"}, "Look at the KL on the way: it should not pass four times the target. What happened to the price of a nat before?"),
        Wrong("C: a high price", {"C": "beta too large"}, "At step 81 a nat does cost more than twice the plan. What did it cost at step 20?"),
        Wrong("D: a high price", {"D": "beta too large"}, "Compute the price of a nat from score, objective and KL: it is what was planned."),
        Wrong("D: the true reward lags behind", {"D": "stale reward model"}, "Some difference between score and true reward is normal where a policy leaves the data. Here both rise to the end: a run with a wrong reward model looks worse."),
        Wrong("E: the reward model is to blame", {"E": "stale reward model"}, "Up to 4 nats its score and the true reward rise together, as in the sound run: the reward model is right where it was trained. Why was the policy free to leave?"),
        Wrong("E: steps that are too large", {"E": "learning rate too large"}, "Its score rises step by step and never turns back. Compare score and objective in each row."),
        Wrong("E: a controller that lost its grip", {"E": "controller winds up"}, "A controller would make nats dear again once the KL is above its target. What does one cost here at the end?"),
        Wrong("F: a price of 0", {"F": "no KL penalty"}, "A nat costs what was planned: compute it. But look at the objective, which the run is meant to raise."),
        Wrong("F: a controller", {"F": "controller winds up"}, "It swings, that is right. But the price of a nat is the same in every row: compute it."),
        Wrong("F: the reward model is to blame", {"F": "stale reward model"}, "With a wrong reward model the run would still raise its own objective. Does this one?"),
    ),
)  # fmt: skip

EXERCISES = (REINFORCE, TOKENS, GAE, CLIP, KNOB)
