"""08 A whole run: the learning rate, SFT, memory, and the frontier that a run is judged by."""

import math
import random
from fractions import Fraction
from functools import cache

import torch

from dpo_mini.course.checks.engine import Exercise, Wrong

# --- 08.1 the learning rate ---


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


def schedule(up=None, down=None):
    """An answer from its two branches; each is a function of (step, steps, warmup)."""
    up = up or (lambda step, steps, warmup: (step + 1) / warmup)
    down = down or (lambda step, steps, warmup: 1 - (step - warmup) / (steps - warmup))

    def rate(step, steps, warmup, peak):
        return peak * (up if step < warmup else down)(step, steps, warmup)

    return rate


def whole_steps(step, steps, warmup, peak):
    return peak * ((step + 1) // warmup if step < warmup else (steps - step) // (steps - warmup))


def no_branch(step, steps, warmup, peak):
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


RATE = Exercise(
    id="08.1",
    title="The learning rate of every step",
    kind="implement",
    truth=rate_truth,
    cases=rate_cases,
    wrong=(
        Wrong("the first step has rate 0", schedule(up=lambda s, n, w: s / w),
              "Step 0 is a step that is taken: at rate 0 its batch would be read for nothing. Which share of the peak does it have?"),
        Wrong("the first step has rate 0, the fall starts late", schedule(lambda s, n, w: s / w, lambda s, n, w: (n - 1 - s) / max(1, n - 1 - w)),
              "Both ends are off: write the rates of steps 0, 1, ... for 2 warm-up steps out of 6, and compare them with the example."),
        Wrong("the last step has rate 0", schedule(down=lambda s, n, w: (n - 1 - s) / max(1, n - 1 - w)),
              "The last step is taken too. It is the step after it, which never comes, that would have rate 0."),
        Wrong("one step ahead after the warm-up", schedule(down=lambda s, n, w: 1 - (s + 1 - w) / (n - w)),
              "Your last step has rate 0. What is the rate of the first step after the warm-up?"),
        Wrong("the fall counts from step 0", schedule(down=lambda s, n, w: 1 - s / n),
              "Right after the warm-up the rate jumps in yours. The fall starts at the peak: from which step on is it counted?"),
        Wrong("the fall is spread over all steps", schedule(down=lambda s, n, w: 1 - (s - w) / n),
              "The fall has fewer steps than the run. How many are left after the warm-up?"),
        Wrong("no fall", schedule(down=lambda s, n, w: 1.0),
              "A constant rate after the warm-up is a schedule of its own; this one falls to 0."),
        Wrong("a fall by cosine", schedule(down=lambda s, n, w: (1 + math.cos(math.pi * (s - w) / (n - w))) / 2),
              "The task asks for equal parts, a straight line."),
        Wrong("no warm-up", schedule(up=lambda s, n, w: 1.0),
              "In the first steps the rate has to climb to the peak."),
        Wrong("no warm-up, the fall over all steps", lambda s, n, w, peak: peak * (1 - s / n),
              "The fall begins only when the warm-up has ended. What happens before?"),
        Wrong("the warm-up is spread over all steps", schedule(up=lambda s, n, w: (s + 1) / n),
              "The peak is to be reached in the last warm-up step, not at the end of the run."),
        Wrong("the warm-up stops short of the peak", schedule(up=lambda s, n, w: (s + 1) / (w + 1)),
              "Which rate has your last warm-up step? It should have the peak."),
        Wrong("both at once", lambda s, n, w, peak: peak * min(1.0, (s + 1) / max(1, w)) * (1 - s / n),
              "Climb and fall follow one another: the fall has not begun while the rate still climbs."),
        Wrong("the warm-up runs backwards", schedule(up=lambda s, n, w: 1 - s / w),
              "In the warm-up the rate rises from a small one."),
        Wrong("the rest of the run upside down", schedule(down=lambda s, n, w: (s - w) / (n - w)),
              "After the warm-up the rate starts at the peak and falls."),
        Wrong("one warm-up step too many", lambda s, n, w, peak: peak * ((s + 1) / max(1, w) if s <= w else (n - s) / (n - w)),
              "Steps are counted from 0. Which is the last of the warm-up steps?"),
        Wrong("steps counted from 1", lambda s, n, w, peak: schedule()(s - 1, n, w, peak) if s else 0.0,
              "The first step that your function is asked about is step 0."),
        Wrong("the peak is left out", lambda s, n, w, peak: schedule()(s, n, w, 1.0),
              "That is the share of the peak."),
        Wrong("whole numbers only", whole_steps,
              "The operator // drops the fraction, and nearly all of the schedule is fractions."),
        Wrong("divides by 0", no_branch,
              "A run may have no warm-up steps, or nothing else. What do you divide by then?"),
        Wrong("always the peak", lambda s, n, w, peak: peak,
              "That is an optimizer without a schedule."),
        Wrong("zero", lambda s, n, w, peak: 0.0,
              "At rate 0 nothing is learned."),
    ),
    others=(
        lambda s, n, w, peak: peak * min((s + 1) / max(1, w), (n - s) / max(1, n - w)),
        lambda s, n, w, peak: peak * ([i / w for i in range(1, w + 1)] + [i / (n - w) for i in range(n - w, 0, -1)])[s],
    ),
    tolerance=1e-12,
    difficulty=1,
    importance=3,
    minutes=7,
)  # fmt: skip

# --- 08.2 the loss of SFT ---


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
        batch([(2, 1), (1, 6), (3, 2), (4, 0)], 6, left=2),  # the last row's prompt fills it
        (extreme, ids, mask),
    ]


class TokenByToken(torch.autograd.Function):
    """Python numbers: log-probabilities by the chain rule, the gradient softmax - one, written out."""

    @staticmethod
    def forward(ctx, logits, ids, mask):
        scores, terms = logits.tolist(), []
        slopes = [[[0.0] * len(place) for place in row] for row in scores]
        places = [(i, t) for i, row in enumerate(mask.tolist()) for t, m in enumerate(row) if m]
        for i, t in places:
            before, token = scores[i][t - 1], int(ids[i, t])
            top = max(before)
            total = math.fsum(math.exp(s - top) for s in before)
            terms.append(math.log(total) + top - before[token])
            for v, s in enumerate(before):
                slopes[i][t - 1][v] = (math.exp(s - top) / total - (v == token)) / len(places)
        ctx.save_for_backward(logits.new_tensor(slopes))
        return logits.new_tensor(math.fsum(terms) / len(terms))

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def taken(logits, ids):
    """log pi of every token but the first, [batch, length - 1]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def sft(reduce, logps=taken, of_mask=lambda mask: mask[:, 1:]):
    """An answer from a reduction of (log-probabilities, mask)."""
    return lambda logits, ids, mask: reduce(logps(logits, ids), of_mask(mask))


def mean_of_all(logps, mask):
    return -(logps * mask).sum() / mask.sum()


def by_row(logps, mask):
    return (logps * mask).sum(1)


def from_completion_on(mask):
    return (mask.cumsum(1) > 0).long()[:, 1:]


def up_to_completion_end(mask):
    return (mask.flip(1).cumsum(1).flip(1) > 0).long()[:, 1:]


def without_last(mask):
    rest = mask[:, 1:]
    return rest * (rest.flip(1).cumsum(1).flip(1) > 1)


def without_first(mask):
    rest = mask[:, 1:]
    return rest * (rest.cumsum(1) > 1)


def unshifted(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def shifted_back(logits, ids):
    return logits[:, 1:].log_softmax(-1).gather(-1, ids[:, :-1, None]).squeeze(-1)


def raw_logits(logits, ids):
    return logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


def overflowing(logits, ids):
    weights = logits[:, :-1].exp()
    return (weights / weights.sum(-1, keepdim=True)).gather(-1, ids[:, 1:, None]).squeeze(-1).log()


def underflowing(logits, ids):
    return logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).log()


def hidden_underflow(logits, ids):
    return (logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) + 1e-8).log()


def over_positions(logits, ids):
    return logits[:, :-1].log_softmax(1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def greedy(logits, ids):
    return logits[:, :-1].log_softmax(-1).amax(-1) + 0 * ids[:, 1:]


def row_means(logps, mask):
    return -(by_row(logps, mask) / mask.sum(1).clamp(min=1)).mean()


def zero_ignored(logits, ids, mask):
    targets = (ids * mask)[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=0)


def zero_counted(logits, ids, mask):
    targets = (ids * mask)[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)


def by_cross_entropy(logits, ids, mask):
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets)


def sft_truth(logits, ids, mask):
    return TokenByToken.apply(logits, ids, mask)


SFT = Exercise(
    id="08.2",
    title="The loss of SFT",
    kind="implement",
    truth=sft_truth,
    cases=sft_cases,
    wrong=(
        Wrong("a mean of the rows' means", sft(row_means),
              "In yours a token of a short completion weighs more than one of a long completion. How many tokens are there in all, and what is each one's share?"),
        Wrong("a mean of the means of rows with a completion",
              sft(lambda p, m: -((by_row(p, m) / m.sum(1).clamp(min=1)).sum() / (m.sum(1) > 0).sum())),
              "In yours a token of a short completion weighs more than one of a long completion. How many tokens are there in all, and what is each one's share?"),
        Wrong("rows without completion tokens divide 0 by 0", sft(lambda p, m: -(by_row(p, m) / m.sum(1)).mean()),
              "You divide row by row, and one row has nothing to divide. Is a row what the mean is taken over?"),
        Wrong("the sum", sft(lambda p, m: -by_row(p, m).sum()),
              "A sum grows with the batch, and with it the gradient. The task asks for the loss per token."),
        Wrong("a sum for each row, then the mean", sft(lambda p, m: -by_row(p, m).mean()),
              "Whole log-probabilities are what DPO needs. SFT's loss is per token: by what do you have to divide?"),
        Wrong("one loss for each row", sft(lambda p, m: -by_row(p, m)),
              "The task asks for one number, the mean over all completion tokens of the batch."),
        Wrong("a mean over all places", sft(lambda p, m: -(p * m).mean()),
              "The places that do not count are 0 in your sum and still count in your mean."),
        Wrong("prompt and padding counted", sft(lambda p, m: -p.mean()),
              "The mask says which tokens are to be learned. Where do you use it?"),
        Wrong("the prompt counted", sft(mean_of_all, of_mask=up_to_completion_end),
              "The prompt is given, not written by the model: only tokens with mask 1 are to be learned."),
        Wrong("what follows the completion counted", sft(mean_of_all, of_mask=from_completion_on),
              "A model that learns its padding learns to write padding: only tokens with mask 1 count."),
        Wrong("the last token dropped", sft(mean_of_all, of_mask=without_last),
              "The completion's last token is often the one that ends it. What does a model do that has never learned to end?"),
        Wrong("the first token dropped", sft(mean_of_all, of_mask=without_first),
              "The completion's first token is predicted too: by the logits at the prompt's last token."),
        Wrong("no shift", sft(mean_of_all, unshifted, lambda mask: mask),
              "The logits at a place predict the token at the next place. With which logits is the token at place t compared?"),
        Wrong("shifted the wrong way", sft(mean_of_all, shifted_back, lambda mask: mask[:, :-1]),
              "The logits at a place predict what comes after them, not what came before."),
        Wrong("the mask not shifted with its tokens", sft(mean_of_all, of_mask=lambda mask: mask[:, :-1]),
              "After the shift, entry t of the log-probabilities belongs to token t + 1. Which entry of the mask does?"),
        Wrong("logits taken for log-probabilities", sft(mean_of_all, raw_logits),
              "Logits are not normalised: a model could lower this loss by raising all of them."),
        Wrong("a softmax over the wrong dimension", sft(mean_of_all, over_positions),
              "Between which alternatives does the model choose at a place? Over those the probabilities sum to 1."),
        Wrong("probabilities without a logarithm", sft(mean_of_all, lambda z, ids: taken(z, ids).exp()),
              "The likelihood of a text is a product. What makes a sum of it?"),
        Wrong("exp overflows", sft(mean_of_all, overflowing),
              "The exponential of 20,000 is infinite. There is a function that goes from logits to log-probabilities directly."),
        Wrong("the logarithm of a softmax", sft(mean_of_all, underflowing),
              "A probability can be 0 in float64 while its logarithm is a number. There is a function that goes from logits to log-probabilities directly."),
        Wrong("a small number inside the logarithm", sft(mean_of_all, hidden_underflow),
              "The small number caps the loss of the very tokens from which there is most to learn. Stay in logarithms."),
        Wrong("the likeliest token's", sft(mean_of_all, greedy),
              "SFT learns the tokens that the text has, not those that the model would have preferred."),
        Wrong("the sign", sft(lambda p, m: -mean_of_all(p, m)),
              "A loss is minimised, a likelihood maximised."),
        Wrong("perplexity", sft(lambda p, m: mean_of_all(p, m).exp()),
              "Perplexity is the exponential of this loss, good to report; the logarithm is what is trained on."),
        Wrong("token 0 taken for padding", zero_ignored,
              "Token 0 may stand in a completion. Use the mask to say what does not count, not the ids."),
        Wrong("targets of 0 where nothing counts", zero_counted,
              "An id of 0 is still a token to be predicted. How does one tell cross_entropy to leave a place out?"),
        Wrong("cross_entropy on all places", lambda z, ids, m: torch.nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten()),
              "Two things are missing: the shift by one place, and the mask."),
        Wrong("detached", sft(lambda p, m: mean_of_all(p.detach(), m)),
              "The value is right, but nothing can be learned from it without a gradient."),
        Wrong("single precision", sft(mean_of_all, lambda z, ids: taken(z.float(), ids).double()),
              "Somewhere the numbers pass through float32 and lose half of their digits."),
        Wrong("zero", lambda z, ids, m: 0 * z.sum(),
              "The loss is 0 only for a model that is certain of every token, and right."),
    ),
    others=(
        by_cross_entropy,
        lambda z, ids, m: (z[:, :-1].logsumexp(-1) - raw_logits(z, ids))[m[:, 1:].bool()].mean(),
        lambda z, ids, m: sum(
            -z[i, t - 1].log_softmax(0)[ids[i, t]] for i, t in m.nonzero().tolist()
        ) / int(m.sum()),
    ),
    tolerance=1e-9,
    difficulty=3,
    importance=4,
    minutes=9,
)  # fmt: skip

# --- 08.3 what fits into memory ---

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
        case(60, 30, 30.01),
        case(60, 25, 29.99),  # 20
        case(64, 20, 16.005),
        case(64, 12, 15.995),  # 8
        case(37, 30, 30.5),  # a prime number: 1
        case(24, 20, 0.99),  # not one
        case(24, 16, 1.01),
        case(24, 10, 24.01),
        case(24, 20, 90.5),  # more than there are
        case(120, 32, 48.5),
        case(120, 20, 39.3),
        case(90, 8, 50.5),
        case(120, 30, 0.3),
        case(120, 32, -4.5),  # not even the weights and what belongs to them
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


def room(
    memory, parameters, length, vocabulary, weights=16, sequences=2, copies=3, size=4, gib=GIB
):
    """How many pairs fit, by bytes per parameter and per pair."""
    return int((memory * gib - weights * parameters) // (sequences * length * vocabulary * size * copies))  # fmt: skip


def largest(room, batch):
    return max((n for n in range(1, batch + 1) if batch % n == 0 and n <= room), default=0)


def fitting(**counts):
    return lambda memory, p, t, v, batch: largest(room(memory, p, t, v, **counts), batch)


def halved(memory, p, t, v, batch):
    fits, n = room(memory, p, t, v), batch
    while n > fits and n > 1:
        n = -(-n // 2)
    return n if n <= fits else 0


def power_of_two(memory, p, t, v, batch):
    fits = min(batch, room(memory, p, t, v))
    return 2 ** int(math.log2(fits)) if fits > 0 else 0


FITTING = Exercise(
    id="08.3",
    title="How many pairs at once?",
    kind="design",
    truth=fitting_truth,
    cases=fitting_cases,
    wrong=(
        Wrong("Adam's two averages forgotten", fitting(weights=8),
              "Weight and gradient are two numbers. What does Adam remember of every parameter, from one step to the next?"),
        Wrong("one average of Adam forgotten", fitting(weights=12),
              "Adam keeps an average of the gradient and one of its square."),
        Wrong("only the weights", fitting(weights=4),
              "That is enough to read a text. What else is there for each parameter while it is trained?"),
        Wrong("the weights forgotten", fitting(weights=0),
              "Some of the memory is taken before the first pair is read."),
        Wrong("a second model counted", fitting(weights=20),
              "The reference's log-probabilities were computed before the first step: its weights are gone."),
        Wrong("a second model counted as if it were trained", fitting(weights=32),
              "The reference is not trained, and its log-probabilities were computed before the first step: it needs no memory now."),
        Wrong("one sequence for a pair", fitting(sequences=1),
              "A pair has a chosen completion and a rejected one, and the model reads both."),
        Wrong("four sequences for a pair", fitting(sequences=4),
              "The reference's two log-probabilities are numbers by now: its logits are not needed again."),
        Wrong("one copy of the logits", fitting(copies=1),
              "Beside the logits their log-softmax is kept for the backward pass. And what does that pass produce?"),
        Wrong("two copies of the logits", fitting(copies=2),
              "The backward pass needs room as well: the gradient of the logits is as large as they are."),
        Wrong("numbers of two bytes", fitting(weights=8, size=2),
              "Everything here is float32. How many bits, and how many bytes, does such a number have?"),
        Wrong("eight bytes a number", fitting(weights=32, size=8),
              "That is float64. How many bytes does a float32 number have?"),
        Wrong("numbers, not bytes", fitting(weights=4, size=1),
              "You have counted numbers. How many bytes does one take?"),
        Wrong("a gigabyte of 10^9 bytes", fitting(gib=10**9),
              "A GiB is 2^30 bytes, seven percent more."),
        Wrong("the vocabulary forgotten", lambda m, p, t, v, b: largest(room(m, p, t, 1), b),
              "At each token the model returns a logit for every token that might come next."),
        Wrong("the length forgotten", lambda m, p, t, v, b: largest(room(m, p, 1, v), b),
              "The model returns logits at each token of a sequence, not one set for all."),
        Wrong("not a divisor of the batch", lambda m, p, t, v, b: max(0, min(b, room(m, p, t, v))),
              "That many fit, but the batch has to be cut into equal parts without a rest."),
        Wrong("more than the batch has", lambda m, p, t, v, b: next((n for n in range(room(m, p, t, v), 0, -1) if b % n == 0 or n > b), 0),
              "No micro-batch can have more pairs than the whole batch."),
        Wrong("rounded up", lambda m, p, t, v, b: largest(room(m, p, t, v) + 1, b),
              "A pair that fits in part does not fit."),
        Wrong("to the nearest", lambda m, p, t, v, b: largest(round((m * GIB - 16 * p) / (24 * t * v)), b),
              "A pair that fits in part does not fit."),
        Wrong("strictly fewer than fit", lambda m, p, t, v, b: largest(room(m, p, t, v) - 1, b),
              "You may use the memory up: which is the largest number that still fits?"),
        Wrong("at least one", lambda m, p, t, v, b: max(1, largest(room(m, p, t, v), b)),
              "Where not even one pair fits, one pair is a crash in the first step. The task asks for 0 there."),
        Wrong("a power of two", power_of_two,
              "Powers of two are a habit. Which numbers divide a batch of 60 without a rest?"),
        Wrong("the batch halved until it fits", halved,
              "Between a batch and its half there may be no divisor, but below the half there are others: 60 is three times 20."),
        Wrong("the number of micro-batches", lambda m, p, t, v, b: b // largest(room(m, p, t, v), b) if largest(room(m, p, t, v), b) else 0,
              "That is how many micro-batches a step has. How many pairs are in each?"),
        Wrong("the smallest divisor", lambda m, p, t, v, b: 1 if room(m, p, t, v) else 0,
              "One pair at a time always works, and leaves most of the memory idle."),
        Wrong("the whole batch", lambda m, p, t, v, b: b,
              "That is the fastest, if it fits. How many bytes does a pair take, and how many are free?"),
    ),
    others=(
        lambda m, p, t, v, b: next((b // k for k in range(1, b + 1) if b % k == 0 and 16 * p + 24 * (b // k) * t * v <= m * GIB), 0),
        lambda m, p, t, v, b: max(n * (b % n == 0 and n <= (m - 16 * p / GIB) / (24 * t * v / GIB)) for n in range(1, b + 1)),
    ),
    difficulty=2,
    importance=3,
    minutes=9,
)  # fmt: skip

# --- 08.4 the frontier of runs ---


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
    ]


def frontier_truth(kls, rewards):
    """The definition, every point against every other."""
    points = list(zip(kls, rewards))

    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    free = [i for i, point in enumerate(points) if not any(beats(p, point) for p in points)]
    return sorted(free, key=lambda i: points[i][0])


def kept_while_rising(kls, rewards):
    """One pass in the order of KL, points of equal KL in the order of the list."""
    kept, best = [], -math.inf
    for i in sorted(range(len(kls)), key=lambda i: kls[i]):
        if rewards[i] > best:
            kept, best = [*kept, i], rewards[i]
    return kept


def unbeaten(beats, key=None):
    """An answer from a rule, (kl, reward, other kl, other reward) -> the first beats the other."""

    def answer(kls, rewards):
        n = range(len(kls))
        free = [
            i for i in n
            if not any(j != i and beats(kls[j], rewards[j], kls[i], rewards[i]) for j in n)
        ]  # fmt: skip
        return sorted(free, key=key(kls, rewards) if key else lambda i: kls[i])

    return answer


def beats(k, r, other_k, other_r):
    return k <= other_k and r >= other_r and (k < other_k or r > other_r)


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


def places_when_sorted(kls, rewards):
    order = sorted(range(len(kls)), key=lambda i: kls[i])
    return [order.index(i) for i in frontier_truth(kls, rewards)]


def above_neighbour(kls, rewards):
    order = sorted(range(len(kls)), key=lambda i: (kls[i], -rewards[i]))
    return [i for before, i in zip([None, *order], order) if before is None or rewards[i] > rewards[before]]  # fmt: skip


def by_tensors(kls, rewards):
    k, r = torch.tensor(kls, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    no_worse = (k[:, None] <= k) & (r[:, None] >= r)
    beaten = (no_worse & ~no_worse.T).any(0)
    order = torch.argsort(k, stable=True)
    return order[~beaten[order]].tolist()


def argbest(score):
    return lambda kls, rewards: [max(range(len(kls)), key=lambda i: score(kls[i], rewards[i]))]


FRONTIER = Exercise(
    id="08.4",
    title="Which runs are on the frontier?",
    kind="implement",
    truth=frontier_truth,
    cases=frontier_cases,
    wrong=(
        Wrong("sorted by KL alone, then kept while the reward rises", kept_while_rising,
              "At equal KL your loop may meet the poorer point first and keep it. How must ties in KL be ordered?"),
        Wrong("more KL counted as better", unbeaten(lambda k, r, ok, orr: beats(-k, r, -ok, orr)),
              "KL is what reward is paid with. Of two runs with the same reward, which one do you want?"),
        Wrong("less reward counted as better", unbeaten(lambda k, r, ok, orr: beats(k, -r, ok, -orr)),
              "A run is better for a higher reward and for a smaller KL, one up and one down."),
        Wrong("both the wrong way round", unbeaten(lambda k, r, ok, orr: beats(-k, -r, -ok, -orr)),
              "You have kept what nobody wants: little reward for much KL."),
        Wrong("beaten only if worse in both", unbeaten(lambda k, r, ok, orr: k < ok and r > orr),
              "A run with the same reward as another but more KL is beaten too: being worse in one is enough if the other is equal."),
        Wrong("the same reward for more KL is kept", scan(lambda k, r: (k, -r), lambda r, best: r >= best),
              "A run that pays more KL for the same reward is beaten. Does yours tell it from one that has more reward?"),
        Wrong("less reward for the same KL is kept", unbeaten(lambda k, r, ok, orr: k < ok and r >= orr),
              "Two runs with the same KL: does the better one beat the other in yours?"),
        Wrong("the same KL in the wrong order", scan(lambda k, r: (k, r), lambda r, best: r > best),
              "Of two runs with the same KL you look at the worse one first, and it is still ahead of all before it. Which of them has to come first?"),
        Wrong("two equal points beat each other", unbeaten(lambda k, r, ok, orr: k <= ok and r >= orr),
              "Two runs at the very same point: is one of them better in anything? Look at your two comparisons, and at what is asked for besides."),
        Wrong("only one of two equal points", scan(lambda k, r: (k, -r), lambda r, best: r > best),
              "Two runs at the very same point do not beat each other, so both are on the frontier or neither is."),
        Wrong("in the order of the lists", unbeaten(beats, key=lambda kls, rewards: lambda i: i),
              "These are the right runs. In which order are they asked for?"),
        Wrong("the largest KL first", unbeaten(beats, key=lambda kls, rewards: lambda i: -kls[i]),
              "These are the right runs. In which order are they asked for?"),
        Wrong("the KLs, not the places", lambda kls, rewards: [kls[i] for i in frontier_truth(kls, rewards)],
              "These are the right runs, but the task asks where in the lists they stand."),
        Wrong("the points, not the places", lambda kls, rewards: [(kls[i], rewards[i]) for i in frontier_truth(kls, rewards)],
              "These are the right runs, but the task asks where in the lists they stand."),
        Wrong("places in the sorted list", places_when_sorted,
              "Your numbers count from the smallest KL on. The place of a run is the one that it has in the lists that you were given."),
        Wrong("places counted from 1", lambda kls, rewards: [i + 1 for i in frontier_truth(kls, rewards)],
              "Python's lists begin at 0."),
        Wrong("compared with the neighbour only", above_neighbour,
              "A run can be ahead of the one before it and still behind an earlier one. With whom does it have to be compared?"),
        Wrong("only the corners of a curve that bends down", hull,
              "The frontier of finitely many runs may bend either way. Is there a run that beats the one that you dropped, or only a line between two runs?"),
        Wrong("only the highest reward", argbest(lambda k, r: r),
              "That run is on the frontier. But is a run with less reward and far less KL beaten by it?"),
        Wrong("only the smallest KL", argbest(lambda k, r: -k),
              "That run is on the frontier. But is a run with more KL and far more reward beaten by it?"),
        Wrong("only the most reward per nat", argbest(lambda k, r: r / max(k, 1e-9)),
              "There is no one exchange rate between reward and nats: that is what beta would be. Which runs would nobody want, at any rate?"),
        Wrong("only the best J", argbest(lambda k, r: r - 0.1 * k),
              "For one price of KL one run is best. The frontier is to serve all prices."),
        Wrong("every run", lambda kls, rewards: sorted(range(len(kls)), key=lambda i: kls[i]),
              "Some runs are beaten: another one has at least as much reward for no more KL."),
        Wrong("the beaten ones", lambda kls, rewards: [i for i in sorted(range(len(kls)), key=lambda i: kls[i]) if i not in frontier_truth(kls, rewards)],
              "These are the others."),
        Wrong("none", lambda kls, rewards: [],
              "The run with the smallest KL, for one: can anybody beat it who has more KL?"),
    ),
    others=(unbeaten(beats), running_best, by_tensors),
    difficulty=2,
    importance=4,
    minutes=9,
)  # fmt: skip

# --- 08.5 predict the sweep ---


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
    id="08.5",
    title="Predict the sweep",
    kind="predict",
    truth=sweep_truth,
    cases=lambda generator: [()],
    wrong=(
        Wrong("a first loss that grows with beta", lambda: {"first loss": "larger"},
              "Before the first step the policy is the reference. What is every margin then, and beta times that?"),
        Wrong("a first loss that shrinks with beta", lambda: {"first loss": "smaller"},
              "Before the first step the policy is the reference. What is every margin then, and beta times that?"),
        Wrong("a large beta as a large first step", lambda: {"first step": "larger"},
              "The first gradient is indeed fifty times as large. What does AdamW do with the size of a gradient?"),
        Wrong("a large beta as a short first step", lambda: {"first step": "smaller"},
              "At margin 0 beta only scales the gradient: no pair is settled yet. What does AdamW do with the size of a gradient?"),
        Wrong("a large beta as a long leash", lambda: {"KL": "larger"},
              "Beta is the price of a nat: a pair with a large beta is settled by a small margin, and then lets go."),
        Wrong("the same steps, so the same way", lambda: {"KL": "same"},
              "The first steps are alike. But when do the pairs let go, at beta 5 and at beta 0.1?"),
        Wrong("a large beta as a weight on the reward", lambda: {"reward": "larger"},
              "In J beta stands before the KL, not before the reward. What happens to the reward when KL becomes dear?"),
        Wrong("a reward that does not depend on beta", lambda: {"reward": "same"},
              "Can a policy that stays near the reference write as many positive reviews as one that has moved?"),
        Wrong("a judge who likes it close to the reference", lambda: {"judge": "larger"},
              "The second judge mostly agrees with the reward. What does it think of a policy that has hardly changed?"),
        Wrong("a judge whom nothing impresses", lambda: {"judge": "same"},
              "The second judge labelled nothing, but it mostly agrees with the reward: does the reward change?"),
        Wrong("a nat as dear everywhere", lambda: {"gain per nat": "same"},
              "That would be a frontier that is a straight line. Which shape has it?"),
        Wrong("a frontier that grows steeper", lambda: {"gain per nat": "smaller"},
              "Which changes does a policy make first that may spend few nats: those that bring much for a nat, or those that bring little?"),
        Wrong("the same beta as the same price", lambda: {"compare at equal": "beta"},
              "In units of a reward twice as large, the same beta is half the price: the second method would go further and seem to be the better one."),
    ),
    difficulty=3,
    importance=5,
    minutes=7,
)  # fmt: skip

EXERCISES = (RATE, SFT, FITTING, FRONTIER, SWEEP)
