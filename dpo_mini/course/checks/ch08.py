"""08 A whole run: the learning rate, SFT, memory, and the frontier that a run is judged by."""

import math
import random
from fractions import Fraction
from functools import cache

import torch

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def rate_cases(generator):
    """One step each: the corners of the schedule, and what lies between them."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    warmup, later = draw(3, 5), draw(7, 11)
    steps = warmup + later
    places = (0, 1, warmup - 1, warmup, warmup + 1, warmup + 4, steps - 1)
    cases = [(step, steps, warmup) for step in places]
    long = 4 * draw(20, 30)
    cases += [
        (0, 9, 0), (draw(3, 6), 8, 0),  # no warm-up
        (0, 7, 1), (6, 7, 1),
        (4, 5, 5), (2, 6, 6),  # nothing but warm-up
        (long // 4, long, 10), (long - 3, long, long // 2),
    ]  # fmt: skip
    scale = 1 + torch.rand(len(cases), generator=generator, dtype=torch.float64)
    return [(*case, 1e-3 * s) for case, s in zip(cases, scale.tolist())]


def rate_truth(step, steps, warmup, peak):
    """No formula: climb to the peak in equal parts, then come down in equal parts, as fractions."""
    rates, now = [], Fraction(0)
    for _ in range(warmup):
        now += Fraction(1, warmup)
        rates.append(now)
    now = Fraction(1)
    while len(rates) < steps:
        rates.append(now)
        now -= Fraction(1, steps - warmup)
    return peak * float(rates[step])


def learning_rate(step, steps, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / (steps - warmup))


RATE = Exercise(
    "08.1", "The learning rate of every step", "implement", difficulty=1, importance=3, minutes=7,
    truth=rate_truth, cases=rate_cases,
    right=(
        learning_rate,
        lambda s, n, w, peak: peak * min((s + 1) / max(1, w), (n - s) / max(1, n - w)),
        lambda s, n, w, peak: peak * ([i / w for i in range(1, w + 1)] + [i / (n - w) for i in range(n - w, 0, -1)])[s],
    ),
    wrong=(
        Wrong("the first step has rate 0", "(step + 1) / warmup -> step / warmup", "Step 0 is a step that is taken: at rate 0 its batch would be read for nothing. Which share of the peak does it have?"),
        Wrong("the first step has rate 0, the fall starts late", "(step + 1) / warmup -> step / warmup | (1 - (step - warmup) / (steps - warmup)) -> (steps - 1 - step) / max(1, steps - 1 - warmup)",
              "Both ends are off: write the rates of steps 0, 1, ... for 2 warm-up steps out of 6, and compare them with the example."),
        Wrong("one step ahead after the warm-up", "(step - warmup) / -> (step + 1 - warmup) /", "Your last step has rate 0. What is the rate of the first step after the warm-up?"),
        Wrong("the fall counts from step 0", "(1 - (step - warmup) / (steps - warmup)) -> (1 - step / steps)", "Right after the warm-up the rate jumps in yours. The fall starts at the peak: from which step on is it counted?"),
        Wrong("the fall is spread over all steps", "/ (steps - warmup) -> / steps", "The fall has fewer steps than the run. How many are left after the warm-up?"),
        Wrong("no fall", "(1 - (step - warmup) / (steps - warmup)) -> 1", "A constant rate after the warm-up is a schedule of its own; this one falls to 0."),
        Wrong("a fall by cosine", "(1 - (step - warmup) / (steps - warmup)) -> (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2", "The task asks for equal parts, a straight line."),
        Wrong("no warm-up", "peak * (step + 1) / warmup -> peak", "In the first steps the rate has to climb to the peak."),
        Wrong("no warm-up, the fall over all steps", "result = peak * (1 - step / steps)", "The fall begins only when the warm-up has ended. What happens before?"),
        Wrong("the warm-up is spread over all steps", "(step + 1) / warmup -> (step + 1) / steps", "The peak is to be reached in the last warm-up step, not at the end of the run."),
        Wrong("the warm-up stops short of the peak", "(step + 1) / warmup -> (step + 1) / (warmup + 1)", "Which rate has your last warm-up step? It should have the peak."),
        Wrong("both at once", "result = peak * min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)", "Climb and fall follow one another: the fall has not begun while the rate still climbs."),
        Wrong("the warm-up runs backwards", "(step + 1) / warmup -> (1 - step / warmup)", "In the warm-up the rate rises from a small one."),
        Wrong("the rest of the run upside down", "(1 - (step - warmup) / (steps - warmup)) -> (step - warmup) / (steps - warmup)", "After the warm-up the rate starts at the peak and falls."),
        Wrong("one warm-up step too many", "step < warmup -> step <= warmup | (step + 1) / warmup -> (step + 1) / max(1, warmup)", "Steps are counted from 0. Which is the last of the warm-up steps?"),
        Wrong("steps counted from 1", "if step < warmup: -> step -= 1\n    if step < 0:\n        return 0.0\n    if step < warmup:", "The first step that your function is asked about is step 0."),
        Wrong("whole numbers only", "(step + 1) / warmup -> ((step + 1) // warmup) | (1 - (step - warmup) / (steps - warmup)) -> ((steps - step) // (steps - warmup))", "The operator // drops the fraction, and nearly all of the schedule is fractions."),
        Wrong("divides by 0", "result = peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))", "A run may have no warm-up steps, or nothing else. What do you divide by then?"),
        Wrong("always the peak", "result = peak", "That is an optimizer without a schedule."),
    ),
)  # fmt: skip


def sft_cases(generator):
    def batch(rows, vocabulary, left=0, scale=2.0):
        """`rows` of (prompt, completion) lengths; the first `left` rows are padded on the left."""
        length = max(sum(row) for row in rows) + 1
        shape = len(rows), length
        logits = scale * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)
        ids = torch.randint(vocabulary, shape, generator=generator)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, (prompt, completion) in enumerate(rows):
            start = length - completion if i < left else prompt
            mask[i, start : start + completion] = 1
        for i in range(len(rows)):  # token 0 is a token like any other
            ids[i, mask[i].nonzero()[:1]] = 0
        return logits.requires_grad_(), ids, mask

    extreme, ids, mask = batch([(1, 2), (2, 3)], 3, scale=1.0)
    with torch.no_grad():
        extreme += 2e4 * torch.randn(extreme.shape, generator=generator, dtype=torch.float64).sign()
    return [
        batch([(2, 2)], 3),
        batch([(1, 5), (3, 1)], 4),
        Edge("the last row's prompt fills it", batch([(2, 1), (1, 6), (3, 2), (4, 0)], 6, left=2)),
        Edge("the logits are extreme", (extreme, ids, mask)),
    ]


def by_cross_entropy(logits, ids, mask):
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets)


def sft_truth(logits, ids, mask):
    """Token by token, the largest logit taken out by hand."""
    terms = []
    for i, t in mask.nonzero().tolist():
        before = logits[i, t - 1]
        top = before.max().item()
        terms.append((before - top).exp().sum().log() + top - before[ids[i, t]])
    return sum(terms) / len(terms)


def sft_loss(logits, ids, mask):
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(logps * mask[:, 1:]).sum() / mask[:, 1:].sum()


SFT = Exercise(
    "08.2", "The loss of SFT", "implement", difficulty=3, importance=4, minutes=9,
    truth=sft_truth, cases=sft_cases, tolerance=1e-9,
    right=(
        sft_loss,
        by_cross_entropy,
        lambda z, ids, m: (z[:, :-1].logsumexp(-1) - z[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1))[m[:, 1:].bool()].mean(),
        lambda z, ids, m: sum(-z[i, t - 1].log_softmax(0)[ids[i, t]] for i, t in m.nonzero().tolist()) / int(m.sum()),
    ),
    wrong=(
        Wrong("a mean of the rows' means", "-(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> -((logps * mask[:, 1:]).sum(1) / mask.sum(1).clamp(min=1)).mean()",
              "In yours a token of a short completion weighs more than one of a long completion. How many tokens are there in all, and what is each one's share?"),
        Wrong("a mean of the means of rows with a completion", "-(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> -(((logps * mask[:, 1:]).sum(1) / mask.sum(1).clamp(min=1)).sum() / (mask.sum(1) > 0).sum())",
              "In yours a token of a short completion weighs more than one of a long completion. How many tokens are there in all, and what is each one's share?"),
        Wrong("rows without completion tokens divide 0 by 0", "-(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> -((logps * mask[:, 1:]).sum(1) / mask.sum(1)).mean()", "You divide row by row, and one row has nothing to divide. Is a row what the mean is taken over?"),
        Wrong("the sum", "/ mask[:, 1:].sum() -> ", "A sum grows with the batch, and with it the gradient. The task asks for the loss per token."),
        Wrong("a sum for each row, then the mean", "(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> (logps * mask[:, 1:]).sum(1).mean()", "Whole log-probabilities are what DPO needs. SFT's loss is per token: by what do you have to divide?"),
        Wrong("one loss for each row", "(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> (logps * mask[:, 1:]).sum(1)", "The task asks for one number, the mean over all completion tokens of the batch."),
        Wrong("a mean over all places", "(logps * mask[:, 1:]).sum() / mask[:, 1:].sum() -> (logps * mask[:, 1:]).mean()", "The places that do not count are 0 in your sum and still count in your mean."),
        Wrong("the last token dropped", "mask = mask * (mask.flip(1).cumsum(1).flip(1) > 1)", "The completion's last token is often the one that ends it. What does a model do that has never learned to end?"),
        Wrong("the first token dropped", "mask = mask * (mask.cumsum(1) > 1)", "The completion's first token is predicted too: by the logits at the prompt's last token."),
        Wrong("no shift", "logits[:, :-1] -> logits | ids[:, 1:, None] -> ids[:, :, None] | mask[:, 1:] -> mask", "The logits at a place predict the token at the next place. With which logits is the token at place t compared?"),
        Wrong("shifted the wrong way", "logits[:, :-1] -> logits[:, 1:] | ids[:, 1:, None] -> ids[:, :-1, None] | mask[:, 1:] -> mask[:, :-1]", "The logits at a place predict what comes after them, not what came before."),
        Wrong("logits taken for log-probabilities", ".log_softmax(-1) -> ", "Logits are not normalised: a model could lower this loss by raising all of them."),
        Wrong("a softmax over the wrong dimension", "log_softmax(-1) -> log_softmax(1)", "Between which alternatives does the model choose at a place? Over those the probabilities sum to 1."),
        Wrong("probabilities without a logarithm", "log_softmax(-1) -> softmax(-1)", "The likelihood of a text is a product. What makes a sum of it?"),
        Wrong("exp overflows", "logits[:, :-1].log_softmax(-1) -> (logits[:, :-1].exp() / logits[:, :-1].exp().sum(-1, keepdim=True)).log()", "The exponential of 20,000 is infinite. There is a function that goes from logits to log-probabilities directly."),
        Wrong("the logarithm of a softmax", ".log_softmax(-1) -> .softmax(-1).log()", "A probability can be 0 in float64 while its logarithm is a number. There is a function that goes from logits to log-probabilities directly."),
        Wrong("a small number inside the logarithm", ".log_softmax(-1) -> .softmax(-1).add(1e-8).log()", "The small number caps the loss of the very tokens from which there is most to learn. Stay in logarithms."),
        Wrong("the likeliest token's", "logps.gather(-1, ids[:, 1:, None]).squeeze(-1) -> logps.amax(-1)", "SFT learns the tokens that the text has, not those that the model would have preferred."),
        Wrong("token 0 taken for padding", "result = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), (ids * mask)[:, 1:].flatten(), ignore_index=0)", "Token 0 may stand in a completion. Use the mask to say what does not count, not the ids."),
        Wrong("targets of 0 where nothing counts", "result = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), (ids * mask)[:, 1:].flatten())", "An id of 0 is still a token to be predicted. How does one tell cross_entropy to leave a place out?"),
        Wrong("cross_entropy on all places", "result = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())", "Two things are missing: the shift by one place, and the mask."),
    ),
)  # fmt: skip


GIB = 2**30


def fitting_cases(generator):
    """A hair above and a hair below what a number of pairs needs: each byte must be counted."""

    def case(batch, weights, pairs):
        """Memory for the weights, which take as much as `weights` pairs do, and for `pairs` pairs."""
        length = int(torch.randint(24, 97, (), generator=generator))
        vocabulary = int(torch.randint(8_000, 60_000, (), generator=generator))
        pair = bytes_needed(1, 0, length, vocabulary)
        jitter = 0.98 + 0.04 * torch.rand((), generator=generator).item()
        parameters = int(jitter * weights * pair / 16)
        memory = bytes_needed(0, parameters, length, vocabulary) + pairs * pair
        return memory / GIB, parameters, length, vocabulary, batch

    return [
        case(6, 10, 4.5),  # 3
        Edge("the memory is just full", case(60, 30, 30)),
        case(60, 30, 30.01),
        case(60, 25, 29.99),  # 20
        case(64, 20, 16.005),
        case(64, 12, 15.995),  # 8
        Edge("a prime number", case(37, 30, 30.5)),
        case(24, 20, 0.99),  # not one
        case(24, 16, 1.01),
        case(24, 10, 24.01),
        Edge("more than there are", case(24, 20, 90.5)),
        case(120, 32, 48.5),
        case(120, 20, 39.3),
        case(90, 8, 50.5),
        case(120, 30, 0.3),
        Edge("not even the weights and what belongs to them", case(120, 32, -4.5)),
        case(120, 32, -11.5),
        case(120, 32, -26.5),
        case(120, 1, 4.5),
        case(360, 40, 107.7),
    ]


def bytes_needed(pairs, parameters, length, vocabulary):
    """Number by number: four of each parameter; of each pair three logits of each token."""
    of_weights = sum(parameters for _ in ("weight", "gradient", "mean", "square"))
    places = pairs * length + pairs * length
    of_logits = sum(places * vocabulary for _ in ("logits", "log-softmax", "gradient"))
    return 4 * (of_weights + of_logits)


def fitting_truth(memory, parameters, length, vocabulary, batch):
    """Every size is tried, as an exact fraction."""
    have = Fraction(memory) * GIB
    sizes = [n for n in range(1, batch + 1) if len(range(0, batch, n)) * n == batch]
    return max((n for n in sizes if bytes_needed(n, parameters, length, vocabulary) <= have), default=0)  # fmt: skip


def pairs_at_once(memory, parameters, length, vocabulary, batch):
    room = memory * 2**30 - 4 * 4 * parameters
    pair = 2 * length * vocabulary * 3 * 4
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * pair <= room]
    return max(fitting, default=0)


FITTING = Exercise(
    "08.3", "How many pairs at once?", "design", difficulty=2, importance=3, minutes=9,
    truth=fitting_truth, cases=fitting_cases,
    right=(
        pairs_at_once,
        lambda m, p, t, v, b: next((b // k for k in range(1, b + 1) if b % k == 0 and 16 * p + 24 * (b // k) * t * v <= m * GIB), 0),
        lambda m, p, t, v, b: max(n * (b % n == 0 and n <= (m - 16 * p / GIB) / (24 * t * v / GIB)) for n in range(1, b + 1)),
    ),
    wrong=(
        Wrong("one average of Adam forgotten", "4 * 4 * parameters -> 4 * 3 * parameters", "Adam keeps an average of the gradient and one of its square."),
        Wrong("only the weights", "4 * 4 * parameters -> 4 * parameters", "That is enough to read a text. What else is there for each parameter while it is trained?"),
        Wrong("the weights forgotten", "parameters = 0", "Some of the memory is taken before the first pair is read."),
        Wrong("a second model counted", "4 * 4 * parameters -> 4 * 5 * parameters", "The reference's log-probabilities were computed before the first step: its weights are gone."),
        Wrong("one copy of the logits", "vocabulary * 3 * 4 -> vocabulary * 4", "Beside the logits their log-softmax is kept for the backward pass. And what does that pass produce?"),
        Wrong("two copies of the logits", "vocabulary * 3 * 4 -> vocabulary * 2 * 4", "The backward pass needs room as well: the gradient of the logits is as large as they are."),
        Wrong("numbers, not bytes", "4 * 4 * parameters -> 4 * parameters | vocabulary * 3 * 4 -> vocabulary * 3", "You have counted numbers. How many bytes does one take?"),
        Wrong("the vocabulary forgotten", "vocabulary = 1", "At each token the model returns a logit for every token that might come next."),
        Wrong("the length forgotten", "length = 1", "The model returns logits at each token of a sequence, not one set for all."),
        Wrong("not a divisor of the batch", "batch % n == 0 and  -> ", "That many fit, but the batch has to be cut into equal parts without a rest."),
        Wrong("more than the batch has", "range(1, batch + 1) -> range(1, 10 * batch) | batch % n == 0 and -> (batch % n == 0 or n > batch) and", "No micro-batch can have more pairs than the whole batch."),
        Wrong("rounded up", "n * pair <= room -> (n - 1) * pair <= room", "A pair that fits in part does not fit."),
        Wrong("to the nearest", "n * pair <= room -> n <= round(room / pair)", "A pair that fits in part does not fit."),
        Wrong("strictly fewer than fit", "n * pair <= room -> (n + 1) * pair <= room", "You may use the memory up: which is the largest number that still fits?"),
        Wrong("at least one", "default=0 -> default=1", "Where not even one pair fits, one pair is a crash in the first step. The task asks for 0 there."),
        Wrong("a power of two", "return max(fitting, default=0) -> return 2 ** int(math.log2(min(batch, room // pair))) if room >= pair else 0", "Powers of two are a habit. Which numbers divide a batch of 60 without a rest?"),
        Wrong("the batch halved until it fits", "return max(fitting, default=0) -> while batch * pair > room and batch > 1:\n        batch = -(-batch // 2)\n    return batch if batch * pair <= room else 0",
              "Between a batch and its half there may be no divisor, but below the half there are others: 60 is three times 20."),
        Wrong("the batch halved, rounding down", "return max(fitting, default=0) -> while batch * pair > room and batch > 0:\n        batch = batch // 2\n    return batch",
              "Half of 15 is 7, which does not divide 60 without a rest; and between a batch and its half there may be other divisors."),
        Wrong("the number of micro-batches", "result = batch // result if result else 0", "That is how many micro-batches a step has. How many pairs are in each?"),
        Wrong("the smallest divisor", "max(fitting -> min(fitting", "One pair at a time always works, and leaves most of the memory idle."),
        Wrong("the whole batch", "result = batch", "That is the fastest, if it fits. How many bytes does a pair take, and how many are free?"),
    ),
)  # fmt: skip


def frontier_cases(generator):
    def uniform(n, low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def runs(n, twins=0):
        """`n` on the frontier, and beside each of them points that it beats, in any order."""
        kls = (uniform(n, 1.0, 2.0).cumsum(0)).tolist()
        gains = uniform(n, 0.05, 0.07)
        gains[1::2] += 0.08  # steep after flat: some lie below the line between their neighbours
        rewards = (0.3 + gains.cumsum(0)).tolist()
        points = list(zip(kls, rewards))
        for kl, reward in points[:]:
            points += [
                (kl, reward - 0.03),  # the same KL, less reward
                (kl + 0.5, reward),  # as much reward, more KL
                (kl + 0.2, reward - 0.02), (kl + 0.4, reward - 0.01),  # rising, but below
            ]  # fmt: skip
        points += points[n - twins : n] + points[n + 2 : n + 3]  # two runs at one point
        order = torch.randperm(len(points), generator=generator).tolist()
        return tuple(list(column) for column in zip(*(points[i] for i in order)))

    a, b, c = uniform(3, 1.0, 2.0).cumsum(0).tolist()
    kls, rewards = runs(3)
    start = [0.0, *kls], [0.2, *rewards]  # the reference itself, at KL 0
    logits = [[-4.0, 1.5, -3.0, 0.0, -3.5, 1.5], [c, a, b, a, 3 * c, a]]
    return [
        ([b, a, c, b + 0.1], [0.7, 0.6, 0.8, 0.65]),
        runs(4),
        runs(5, twins=2),
        start,
        ([kl + 5 for kl in logits[0]], [-r for r in logits[1]]),  # rewards below 0
        ([c], [0.5]),
        Edge("two runs differ by a hair", ([b, a, a, b + 1e-12, c, c], [0.7, 0.5 - 1e-12, 0.5, 0.7, 0.9, 0.9 + 1e-12])),
    ]


def frontier_truth(kls, rewards):
    """The definition, every point against every other."""
    points = list(zip(kls, rewards))

    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    free = [i for i, point in enumerate(points) if not any(beats(p, point) for p in points)]
    return sorted(free, key=lambda i: points[i][0])


def scan(order, better):
    """Points in an order; kept where `better` than the best reward so far."""

    def answer(kls, rewards):
        kept, best = [], -math.inf
        for i in sorted(range(len(kls)), key=lambda i: order(kls[i], rewards[i])):
            if better(rewards[i], best):
                kept.append(i)
            best = max(best, rewards[i])
        return kept

    return answer


def running_best(kls, rewards):
    """Sorted, then kept where nothing cheaper is as good; twins are kept together."""
    kept = []
    for i in sorted(range(len(kls)), key=lambda i: (kls[i], -rewards[i])):
        if not kept or rewards[i] > rewards[kept[-1]] or (kls[i], rewards[i]) == (kls[kept[-1]], rewards[kept[-1]]):  # fmt: skip
            kept.append(i)
    return kept


def hull(kls, rewards):
    """Only the corners of the concave envelope."""
    kept = []
    for i in running_best(kls, rewards):
        while len(kept) > 1 and (rewards[kept[-1]] - rewards[kept[-2]]) * (kls[i] - kls[kept[-1]]) < (rewards[i] - rewards[kept[-1]]) * (kls[kept[-1]] - kls[kept[-2]]):  # fmt: skip
            kept.pop()
        kept.append(i)
    return kept


def above_neighbour(kls, rewards):
    order = sorted(range(len(kls)), key=lambda i: (kls[i], -rewards[i]))
    return [i for before, i in zip([None, *order], order) if before is None or rewards[i] > rewards[before]]  # fmt: skip


def by_tensors(kls, rewards):
    k, r = torch.tensor(kls, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    no_worse = (k[:, None] <= k) & (r[:, None] >= r)
    beaten = (no_worse & ~no_worse.T).any(0)
    order = torch.argsort(k, stable=True)
    return order[~beaten[order]].tolist()


def frontier(kls, rewards):
    n = range(len(kls))

    def beats(j, i):
        return kls[j] <= kls[i] and rewards[j] >= rewards[i] and (kls[j] < kls[i] or rewards[j] > rewards[i])

    free = [i for i in n if not any(beats(j, i) for j in n)]
    return sorted(free, key=lambda i: kls[i])


FRONTIER = Exercise(
    "08.4", "Which runs are on the frontier?", "implement", difficulty=2, importance=4, minutes=9,
    truth=frontier_truth, cases=frontier_cases,
    right=(frontier, running_best, by_tensors,),
    wrong=(
        Wrong("sorted by KL alone, then kept while the reward rises", scan(lambda k, r: k, lambda r, best: r > best), "At equal KL your loop may meet the poorer point first and keep it. How must ties in KL be ordered?"),
        Wrong("more KL counted as better", "kls[j] <= kls[i] -> kls[j] >= kls[i] | kls[j] < kls[i] -> kls[j] > kls[i]", "KL is what reward is paid with. Of two runs with the same reward, which one do you want?"),
        Wrong("less reward counted as better", "rewards[j] >= rewards[i] -> rewards[j] <= rewards[i] | rewards[j] > rewards[i] -> rewards[j] < rewards[i]", "A run is better for a higher reward and for a smaller KL, one up and one down."),
        Wrong("beaten only if worse in both", "kls[j] <= kls[i] and rewards[j] >= rewards[i] and (kls[j] < kls[i] or rewards[j] > rewards[i]) -> kls[j] < kls[i] and rewards[j] > rewards[i]",
              "A run with the same reward as another but more KL is beaten too: being worse in one is enough if the other is equal."),
        Wrong("the same reward for more KL is kept", "kls[j] <= kls[i] and rewards[j] >= rewards[i] and (kls[j] < kls[i] or rewards[j] > rewards[i]) -> kls[j] <= kls[i] and rewards[j] > rewards[i]",
              "A run that pays more KL for the same reward is beaten. Does yours tell it from one that has more reward?"),
        Wrong("less reward for the same KL is kept", "kls[j] <= kls[i] and rewards[j] >= rewards[i] and (kls[j] < kls[i] or rewards[j] > rewards[i]) -> kls[j] < kls[i] and rewards[j] >= rewards[i]", "Two runs with the same KL: does the better one beat the other in yours?"),
        Wrong("the same KL in the wrong order", scan(lambda k, r: (k, r), lambda r, best: r > best), "Of two runs with the same KL you look at the worse one first, and it is still ahead of all before it. Which of them has to come first?"),
        Wrong("two equal points beat each other", "kls[j] <= kls[i] and rewards[j] >= rewards[i] and (kls[j] < kls[i] or rewards[j] > rewards[i]) -> j != i and kls[j] <= kls[i] and rewards[j] >= rewards[i]",
              "Two runs at the very same point: is one of them better in anything? Look at your two comparisons, and at what is asked for besides."),
        Wrong("only one of two equal points", scan(lambda k, r: (k, -r), lambda r, best: r > best), "Two runs at the very same point do not beat each other, so both are on the frontier or neither is."),
        Wrong("the largest KL first", "key=lambda i: kls[i] -> key=lambda i: -kls[i]", "These are the right runs. In which order are they asked for?"),
        Wrong("the KLs, not the places", "result = [kls[i] for i in result]", "These are the right runs, but the task asks where in the lists they stand."),
        Wrong("the points, not the places", "result = [(kls[i], rewards[i]) for i in result]", "These are the right runs, but the task asks where in the lists they stand."),
        Wrong("places in the sorted list", "order = sorted(range(len(kls)), key=lambda i: kls[i]); result = [order.index(i) for i in result]", "Your numbers count from the smallest KL on. The place of a run is the one that it has in the lists that you were given."),
        Wrong("compared with the neighbour only", above_neighbour, "A run can be ahead of the one before it and still behind an earlier one. With whom does it have to be compared?"),
        Wrong("only the corners of a curve that bends down", hull, "The frontier of finitely many runs may bend either way. Is there a run that beats the one that you dropped, or only a line between two runs?"),
        Wrong("only the highest reward", "result = [max(range(len(kls)), key=lambda i: rewards[i])]", "That run is on the frontier. But is a run with less reward and far less KL beaten by it?"),
        Wrong("only the smallest KL", "result = [min(range(len(kls)), key=lambda i: kls[i])]", "That run is on the frontier. But is a run with more KL and far more reward beaten by it?"),
        Wrong("only the most reward per nat", "result = [max(range(len(kls)), key=lambda i: rewards[i] / max(kls[i], 1e-9))]", "There is no one exchange rate between reward and nats: that is what beta would be. Which runs would nobody want, at any rate?"),
        Wrong("only the best J", "result = [max(range(len(kls)), key=lambda i: rewards[i] - 0.1 * kls[i])]", "For one price of KL one run is best. The frontier is to serve all prices."),
        Wrong("every run", "result = sorted(range(len(kls)), key=lambda i: kls[i])", "Some runs are beaten: another one has at least as much reward for no more KL."),
        Wrong("the beaten ones", "result = [i for i in sorted(range(len(kls)), key=lambda i: kls[i]) if i not in result]", "These are the others."),
    ),
)  # fmt: skip


@cache
def sweep_truth():
    """Computed: runs of AdamW in small worlds where every text is listed, which must all agree."""

    def policy(scores):
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        return [w / sum(weights) for w in weights]

    def kl(p, q):
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q))

    def expected(p, values):
        return math.fsum(a * v for a, v in zip(p, values))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def positive(p, logits):
        return expected(p, [sigmoid(x) for x in logits])

    def run(beta, start, batches, rate=0.08):
        """DPO on the scores of a softmax: the margin is a difference of scores."""
        scores, mean, square = list(start), [0.0] * len(start), [0.0] * len(start)
        seen = {}
        for step, batch in enumerate(batches, 1):
            slopes, loss = [0.0] * len(scores), 0.0
            for w, l in batch:
                margin = (scores[w] - start[w]) - (scores[l] - start[l])
                loss += math.log1p(math.exp(-beta * margin)) / len(batch)
                pull = beta * sigmoid(-beta * margin) / len(batch)
                slopes[w] -= pull
                slopes[l] += pull
            norm = math.hypot(*slopes)
            for i, slope in enumerate(slopes):
                slope *= min(1.0, 1 / max(norm, 1e-30))
                mean[i] = 0.9 * mean[i] + 0.1 * slope
                square[i] = 0.999 * square[i] + 0.001 * slope * slope
                unbiased = math.sqrt(square[i] / (1 - 0.999**step))
                now = rate * (1 - (step - 1) / len(batches))
                scores[i] -= now * mean[i] / (1 - 0.9**step) / (unbiased + 1e-8)
            if step == 1:
                seen = {"loss": loss, "moved": math.dist(scores, start)}
        return seen | {"policy": policy(scores)}

    def word(before, after):
        if math.isclose(before, after, rel_tol=1e-5):
            return "same"
        return "smaller" if after < before else "larger"

    def optimum(start, rewards, beta):
        return policy([s + r / beta for s, r in zip(start, rewards)])

    def fair(start, rewards, doubled):
        """Where two methods on one frontier look alike: by the first reward, at equal ..."""
        reference, same = policy(start), []
        mine = optimum(start, rewards, 1.0)
        theirs = {"beta": optimum(start, doubled, 1.0)}
        low, high = 1e-2, 1e2  # the second method's beta that gives my KL
        for _ in range(100):
            middle = math.sqrt(low * high)
            further = kl(optimum(start, doubled, middle), reference) > kl(mine, reference)
            low, high = (middle, high) if further else (low, middle)
        theirs["KL"] = optimum(start, doubled, low)
        for name, other in theirs.items():
            if math.isclose(expected(mine, rewards), expected(other, rewards), rel_tol=1e-6):
                same.append(name)
        (name,) = same
        return name

    def answers(dice):
        n = 8
        start = [dice.gauss(0, 0.7) for _ in range(n)]
        rewards = [2 * i / n - 1 + dice.uniform(-0.1, 0.1) for i in range(n)]
        dice.shuffle(rewards)
        rewards = [2.0 * r for r in rewards]
        judge = [0.7 * r + dice.uniform(-0.1, 0.1) for r in rewards]
        pairs = [(w, l) for w in range(n) for l in range(n) if rewards[w] > rewards[l]]
        batches = [dice.sample(pairs, 12) for _ in range(40)]
        low, high = (run(beta, start, batches) for beta in (0.1, 5.0))
        reference, p, q = policy(start), low["policy"], high["policy"]
        per_nat = [
            (positive(each, rewards) - positive(reference, rewards)) / kl(each, reference)
            for each in (p, q)
        ]
        return {
            "first loss": word(low["loss"], high["loss"]),
            "first step": word(low["moved"], high["moved"]),
            "KL": word(kl(p, reference), kl(q, reference)),
            "reward": word(positive(p, rewards), positive(q, rewards)),
            "judge": word(positive(p, judge), positive(q, judge)),
            "gain per nat": word(*per_nat),
            "compare at equal": fair(start, rewards, [2 * r for r in rewards]),
        }

    dice = random.Random(0)
    found = [answers(dice) for _ in range(4)]
    assert all(one == found[0] for one in found)
    return found[0]


SWEEP = Exercise(
    "08.5", "Predict the sweep", "predict", difficulty=3, importance=5, minutes=7,
    truth=sweep_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("a first loss that grows with beta", {"first loss": "larger"}, "Before the first step the policy is the reference. What is every margin then, and beta times that?"),
        Wrong("a first loss that shrinks with beta", {"first loss": "smaller"}, "Before the first step the policy is the reference. What is every margin then, and beta times that?"),
        Wrong("a large beta as a large first step", {"first step": "larger"}, "The first gradient is indeed fifty times as large. What does AdamW do with the size of a gradient?"),
        Wrong("a large beta as a short first step", {"first step": "smaller"}, "At margin 0 beta only scales the gradient: no pair is settled yet. What does AdamW do with the size of a gradient?"),
        Wrong("a large beta as a long leash", {"KL": "larger"}, "Beta is the price of a nat: a pair with a large beta is settled by a small margin, and then lets go."),
        Wrong("the same steps, so the same way", {"KL": "same"}, "The first steps are alike. But when do the pairs let go, at beta 5 and at beta 0.1?"),
        Wrong("a large beta as a weight on the reward", {"reward": "larger"}, "In J beta stands before the KL, not before the reward. What happens to the reward when KL becomes dear?"),
        Wrong("a reward that does not depend on beta", {"reward": "same"}, "Can a policy that stays near the reference write as many positive reviews as one that has moved?"),
        Wrong("a judge who likes it close to the reference", {"judge": "larger"}, "The second judge mostly agrees with the reward. What does it think of a policy that has hardly changed?"),
        Wrong("a judge whom nothing impresses", {"judge": "same"}, "The second judge labelled nothing, but it mostly agrees with the reward: does the reward change?"),
        Wrong("a nat as dear everywhere", {"gain per nat": "same"}, "That would be a frontier that is a straight line. Which shape has it?"),
        Wrong("a frontier that grows steeper", {"gain per nat": "smaller"}, "Which changes does a policy make first that may spend few nats: those that bring much for a nat, or those that bring little?"),
        Wrong("the same beta as the same price", {"compare at equal": "beta"}, "In units of a reward twice as large, the same beta is half the price: the second method would go further and seem to be the better one."),
    ),
)  # fmt: skip

EXERCISES = (RATE, SFT, FITTING, FRONTIER, SWEEP)
