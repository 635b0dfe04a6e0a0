"""06 DPO from scratch: padding, log-probabilities, the frozen reference, micro-batches, and bugs."""

import random
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.course.checks.engine import Edge, Exercise, Wrong


def draw(generator, low, high, n=1):
    """n token ids in [low, high), a list."""
    return torch.randint(low, high, (n,), generator=generator).tolist()


def pad_cases(generator):
    def row(prompt, completion, pad):
        """A row that ends in the padding's id, with that id in its prompt and in its middle."""
        x, y = draw(generator, 1, 90, prompt), draw(generator, 1, 90, completion - 1) + [pad]
        x[0], y[completion // 2] = pad, pad
        return x, y

    cases = []
    for lengths, low, high in (
        (((2, 3),), 1, 9),
        (((2, 4), (3, 1)), 10, 90),
        (((4, 5), (1, 2), (2, 7), (6, 2)), 100, 500),
        (((1, 1), (5, 6), (3, 3)), 1, 90),
    ):
        pad = draw(generator, low, high)[0]
        cases.append(([row(*pair, pad) for pair in lengths], pad))
    return cases[:2] + [Edge("the longest prompt and completion are of two rows", c) for c in cases[2:]]


def pad_truth(rows, pad):
    """Entry by entry: what stands at place j of row i?"""
    length = max(sum(map(len, row)) for row in rows)

    def entry(x, y, j):
        if j < len(x):
            return x[j], 0
        return (y[j - len(x)], 1) if j < len(x) + len(y) else (pad, 0)

    table = torch.tensor([[entry(x, y, j) for j in range(length)] for x, y in rows])
    return table[..., 0].contiguous(), table[..., 1].contiguous()


def pad_by_pad_sequence(rows, pad):
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor([*x, *y]) for x, y in rows]
    masks = [torch.tensor([0] * len(x) + [1] * len(y)) for x, y in rows]
    return pad_sequence(ids, True, pad), pad_sequence(masks, True, 0)


def pad_by_comparison(rows, pad):
    ids = torch.full((len(rows), max(len(x) + len(y) for x, y in rows)), pad)
    starts = torch.tensor([[len(x)] for x, _ in rows])
    ends = torch.tensor([[len(x) + len(y)] for x, y in rows])
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    ids[places < ends] = torch.tensor([token for x, y in rows for token in [*x, *y]])
    return ids, ((places >= starts) & (places < ends)).long()


def pad_rows(rows, pad):
    length = max(len(x) + len(y) for x, y in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (x, y) in enumerate(rows):
        ids[i, : len(x) + len(y)] = torch.tensor(x + y)
        mask[i, len(x) : len(x) + len(y)] = 1
    return ids, mask


PAD = Exercise(
    "06.1", "Rows to a rectangle", "implement", difficulty=2, importance=3, minutes=8,
    truth=pad_truth, cases=pad_cases,
    right=(pad_rows, pad_by_pad_sequence, pad_by_comparison,),
    wrong=(
        Wrong("the mask asks whether an id is the padding's", "return ids, mask -> return ids, mask * (ids != pad)", "The padding's id also ends a completion and may stand inside a text. What do you know about each row that does not depend on the ids?"),
        Wrong("the completion ends at the first padding id", "return ids, mask -> return ids, mask * ((ids == pad) & (mask > 0)).long().cumsum(1).eq(0)", "Here that id is EOS as well: a completion may contain it, and its last token is one that the policy must learn to write."),
        Wrong("an attention mask, made from the ids", "return ids, mask -> return ids, (ids != pad).long()", "This marks the prompt as well, and loses every token that has the padding's id. Which two lengths say where a completion stands?"),
        Wrong("EOS dropped", "mask[i, len(x) : len(x) + len(y)] -> mask[i, len(x) : len(x) + len(y) - 1]", "The last token of the completion counts like the others: to stop is part of what the policy does."),
        Wrong("prompt counted", "mask[i, len(x) : -> mask[i, 0 :", "log pi(y | x) is about y only; the prompt is what it is given."),
        Wrong("padding counted", "mask[i, len(x) : len(x) + len(y)] -> mask[i, len(x) :]", "After the completion's last token nothing was written. Where does each row's completion end?"),
        Wrong("everything counted", "mask[i, len(x) : len(x) + len(y)] -> mask[i]", "A mask of ones masks nothing: it must tell the completion from prompt and padding."),
        Wrong("the mask marks the prompt", "mask[i, len(x) : len(x) + len(y)] -> mask[i, : len(x)]", "The mask is 1 where a token counts, and those are the completion's."),
        Wrong("the mask is one place late", "mask[i, len(x) : len(x) + len(y)] -> mask[i, len(x) + 1 : len(x) + len(y) + 1]", "Python counts from 0: after a prompt of 2 tokens, which place does the completion's first one take?"),
        Wrong("the mask is one place early", "mask[i, len(x) : len(x) + len(y)] -> mask[i, len(x) - 1 : len(x) + len(y) - 1]", "Here the mask marks tokens, not the logits that predict them; the shift belongs to the next exercise."),
        Wrong("the first token of the completion lost", "mask[i, len(x) : len(x) + len(y)] -> mask[i, len(x) + 1 : len(x) + len(y)]", "The completion begins right after the prompt; its first token counts too."),
        Wrong("the mask is measured from the right end", "mask[i, len(x) : len(x) + len(y)] -> mask[i, length - len(y) :]", "With padding on the right, a short row's completion does not end where the rectangle ends."),
        Wrong("padded on the left", "ids[i, : len(x) + len(y)] -> ids[i, length - len(x) - len(y) :] | mask[i, len(x) : len(x) + len(y)] -> mask[i, length - len(y) :]", "The task wants padding on the right, where the positions before it cannot see it."),
        Wrong("prompts and completions padded apart", "max(len(x) + len(y) for x, y in rows) -> max(len(x) for x, y in rows) + max(len(y) for x, y in rows) | ids[i, : len(x) + len(y)] = torch.tensor(x + y) -> n = max(len(x) for x, _ in rows); ids[i, : len(x)] = torch.tensor(x); ids[i, n : n + len(y)] = torch.tensor(y) | mask[i, len(x) : len(x) + len(y)] -> mask[i, n : n + len(y)]",
              "Padding between prompt and completion is seen by the completion: each row must first be joined, then padded."),
        Wrong("padded with 0", "length), pad) -> length), 0)", "Which id fills the empty places is the second argument."),
        Wrong("cut to the shortest row", "return ids, mask -> length = min(len(x) + len(y) for x, y in rows); return ids[:, :length], mask[:, :length]", "No token may be lost: the rectangle is as long as the longest row."),
        Wrong("one place too long", "for x, y in rows) -> for x, y in rows) + 1", "In a batch of one row nothing needs to be padded: how long is the rectangle then?"),
        Wrong("completion before prompt", "rows = [(y, x) for x, y in rows]", "A model reads from left to right: first what it is given, then what it writes."),
    ),
)  # fmt: skip


def logp_cases(generator):
    def case(rows, vocabulary, scale=1.0, shift=0.0, length=None):
        """`rows`: (prompt's, completion's) number of tokens."""
        length = length or max(map(sum, rows))
        logits = shift + torch.randn(len(rows), length, vocabulary, generator=generator)
        ids = torch.randint(vocabulary, logits.shape[:2], generator=generator)
        places = torch.arange(length)
        mask = torch.stack([(places >= n) & (places < n + m) for n, m in rows]).long()
        return (scale * logits.double()).requires_grad_(), ids, mask

    return [
        case([(1, 3)], 3, length=5),
        case([(2, 2)], 3, length=5),
        case([(2, 4), (1, 1), (4, 3), (3, 2)], 6),
        case([(1, 1), (1, 1), (1, 1)], 4),
        Edge("the logits are extreme", case([(1, 7), (1, 7)], 5, scale=1e4, shift=3.0)),
        Edge("large, but ordinary once normalised", case([(1, 3)], 4, shift=2e3)),
        case([(3, 5), (5, 3), (1, 2)], 11, length=9),
    ]


def logp_truth(logits, ids, mask):
    """The chain rule by hand: row by row and token by token, the largest logit taken out."""
    rows = []
    for i in range(len(ids)):
        total = 0 * logits[i, 0, 0]
        for t in range(1, ids.shape[1]):
            if mask[i, t]:
                before = logits[i, t - 1]
                top = before.max().item()
                log_sum = sum((before[v] - top).exp() for v in range(len(before))).log() + top
                total = total + before[ids[i, t]] - log_sum
        rows.append(total)
    return torch.stack(rows)


def token_logps(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def logp_by_where(logits, ids, mask):
    every = logits - logits.logsumexp(-1, keepdim=True)
    tokens = torch.zeros_like(every[..., 0])
    tokens[:, 1:] = every[:, :-1].gather(2, ids[:, 1:].unsqueeze(2))[..., 0]
    return torch.where(mask.bool(), tokens, 0).sum(-1)


def logp_by_cross_entropy(logits, ids, mask):
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return -torch.einsum("bt,bt->b", each, mask[:, 1:].to(each.dtype))


def completion_logps(logits, ids, mask):
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(1)


LOGP = Exercise(
    "06.2", "The log-probability of a completion", "implement", difficulty=3, importance=5, minutes=10, float64=True,
    truth=logp_truth, cases=logp_cases, tolerance=1e-9,
    right=(completion_logps, logp_by_where, logp_by_cross_entropy,),
    wrong=(
        Wrong("the logarithm of a softmax", ".log_softmax(-1) -> .softmax(-1).log()", "A softmax rounds small probabilities to 0, whose logarithm is infinite. One function does both at once, exactly."),
        Wrong("every dimension of size 1 is squeezed away", ".squeeze(-1) -> .squeeze() | mask[:, 1:]).sum(1) -> mask[:, 1:].squeeze()).sum(-1)", "squeeze() without a dimension also removes the batch, or the length, where there is only one. Name the dimension."),
        Wrong("logits not shifted", "logits[:, :-1] -> logits | ids[:, 1:, None] -> ids[:, :, None] | mask[:, 1:] -> mask", "The logits at a position are for the next token: which position predicted the token at place t?"),
        Wrong("shifted the wrong way", "logits[:, :-1] -> logits[:, 1:] | ids[:, 1:, None] -> ids[:, :-1, None] | mask[:, 1:] -> mask[:, :-1]", "This asks the logits after a token about that token. They have seen it; the ones before it have not."),
        Wrong("shifted by two", "logits[:, :-1] -> logits[:, :-2] | ids[:, 1:, None] -> ids[:, 2:, None] | mask[:, 1:] -> mask[:, 2:]", "The logits at a position are for the token right after it, one place on."),
        Wrong("EOS dropped", "mask = mask * (mask.flip(1).cumsum(1).flip(1) > 1)", "The last token of the completion is predicted like any other, by the position before it."),
        Wrong("the first token lost", "mask = mask * (mask.cumsum(1) > 1)", "The completion's first token is predicted at the prompt's last position, and it counts."),
        Wrong("mean for sum", ".sum(1) -> .sum(1) / mask.sum(1)", "The chain rule is a product of probabilities, so a sum of logarithms. The exponential of a mean is no probability."),
        Wrong("mean over the rectangle", ".sum(1) -> .mean(1)", "The chain rule is a sum. A mean would also depend on how much padding there is."),
        Wrong("no log-softmax", ".log_softmax(-1) -> ", "Logits are not log-probabilities: adding 5 to all of them must not change the result."),
        Wrong("exp before log overflows", ".log_softmax(-1) -> .sub(logits[:, :-1].exp().sum(-1, keepdim=True).log())", "The exponential of a logit of 1,000 is infinite. torch's log-softmax takes the largest out first."),
        Wrong("probabilities added", "log_softmax(-1) -> softmax(-1)", "Probabilities multiply along the chain. What does the logarithm make of a product?"),
        Wrong("log-softmax over positions", "log_softmax(-1) -> log_softmax(1)", "At each position, the probabilities of all tokens of the vocabulary sum to 1. Which dimension is that?"),
        Wrong("log-softmax over the batch", "log_softmax(-1) -> log_softmax(0)", "One row's probability cannot depend on the other rows. Over which dimension do probabilities sum to 1?"),
        Wrong("normalised after the lookup", ".log_softmax(-1) ->  | .squeeze(-1) -> .squeeze(-1).log_softmax(-1)", "The log-softmax needs the logits of all tokens that could have come, not only of those that came."),
        Wrong("one number per token", ".sum(1) -> ", "The task asks for one number a row: put the tokens' log-probabilities together."),
        Wrong("the normaliser is detached", ".log_softmax(-1) -> .sub(logits[:, :-1].logsumexp(-1, keepdim=True).detach())", "The log-sum-exp has a gradient as well: it is what pushes the other tokens down."),
    ),
)  # fmt: skip


class ReadTwice(Exception):
    """A model was given a row that it had read."""


class Model(NamedTuple):
    """A small causal language model, called with rows; it remembers what it has read."""

    weight: Tensor  # [vocabulary, vocabulary]
    read: list

    def __call__(self, rows):
        logps = []
        for x, y in rows:
            row = (tuple(x), tuple(y))
            if row in self.read:
                raise ReadTwice(f"the row {row} was given to the same model before")
            self.read.append(row)
            ids = torch.tensor([row[0] + row[1]])
            logps.append(token_logps(tiny_logits(self.weight, ids), ids)[0, len(x) - 1 :].sum())
        return torch.stack(logps)


def tiny_logits(weight, ids, dropout=None):
    """The logits of a model whose state is a fading sum of the rows of `weight` that it has read.

    `ids` [batch, length]; `dropout` is a generator, or None for none.
    """
    places = torch.arange(ids.shape[1])
    fading = torch.tril(0.5 ** (places[:, None] - places).double())
    states = fading @ weight[ids]
    if dropout:
        kept = torch.rand(states.shape, generator=dropout, dtype=torch.float64) > 0.1
        states = states * kept / 0.9
    return states


def row_logp(weight, x, y):
    """log pi(y | x) of the same model, token by token and one row at a time."""
    total, state = 0.0, 0.0
    for t, token in enumerate([*x, *y]):
        if t >= len(x):
            total = total + state.log_softmax(0)[token]
        state = state / 2 + weight[token]
    return total


def frozen_cases(generator):
    vocabulary = 6

    def tokens(n):
        return tuple(draw(generator, 0, vocabulary, n))

    def models(scale=1.0):
        weights = scale * torch.randn(
            2, vocabulary, vocabulary, generator=generator, dtype=torch.float64
        )
        return [Model(weight.clone().requires_grad_(), []) for weight in weights]

    x, other = tokens(2), tokens(3)
    w, l, worse = tokens(3), tokens(4), tokens(2)
    a, b, c, d = tokens(4)
    again = [(x, w, worse), (x, w, l), (other, w, l), (x, w, worse), (other, l, worse)]
    joined = [((a, b), (c, d), l), ((a,), (b, c, d), l)]
    both_ways = [pair for z in (x, other) for pair in ((z, w, l), (z, l, w))]
    return [
        (*models(), [(x, w, l)], 0.5),
        Edge("rows repeat, with other prompts too", (*models(), again, 0.1)),
        Edge("rows differ only in where the prompt ends", (*models(), joined, 1.3)),
        Edge("policy and reference are far apart", (*models(1e4), both_ways, 2.0)),
    ]


def frozen_truth(policy, reference, pairs, beta):
    """Token by token and pair by pair, without the models' own code; the loss's slope is the one of notebook 04."""
    losses = []
    for x, w, l in pairs:
        margin = row_logp(policy.weight, x, w) - row_logp(policy.weight, x, l)
        before = reference.weight.detach()
        margin = beta * (margin - row_logp(before, x, w) + row_logp(before, x, l))
        at = margin.detach()
        value = at.abs().neg().exp().log1p() - at.clamp(max=0)
        losses.append(value - (-at).sigmoid() * (margin - at))
    return torch.stack(losses)


def frozen_by_cache(policy, reference, pairs, beta):
    """A dictionary that is filled row by row."""

    def cached(model):
        known = {}

        def look_up(x, y):
            if (x, y) not in known:
                known[x, y] = model([(x, y)])[0]
            return known[x, y]

        return look_up

    new, old = cached(policy), cached(reference)
    losses = []
    for x, w, l in pairs:
        with torch.no_grad():
            before = old(x, w) - old(x, l)
        margin = beta * (new(x, w) - new(x, l) - before)
        losses.append(torch.logaddexp(torch.zeros_like(margin), -margin))
    return torch.stack(losses)


def frozen_by_sorting(policy, reference, pairs, beta):
    """The different rows, sorted; a matrix says which pair takes which."""
    rows = sorted({(x, y) for x, w, l in pairs for y in (w, l)})
    take = torch.zeros(len(pairs), len(rows), dtype=torch.float64)
    for i, (x, w, l) in enumerate(pairs):
        take[i, rows.index((x, w))] += 1
        take[i, rows.index((x, l))] -= 1
    margins = beta * (take @ (policy(rows) - reference(rows).detach()))
    return torch.nn.functional.softplus(-margins, threshold=1000)


def batch_losses(policy, reference, pairs, beta):
    chosen = [(x, w) for x, w, _ in pairs]
    rejected = [(x, l) for x, _, l in pairs]
    different = list(dict.fromkeys(chosen + rejected))
    place = {row: i for i, row in enumerate(different)}
    with torch.no_grad():
        before = reference(different)
    ratios = policy(different) - before
    margin = ratios[[place[row] for row in chosen]] - ratios[[place[row] for row in rejected]]
    return -torch.nn.functional.logsigmoid(beta * margin)


FROZEN = Exercise(
    "06.3", "A batch's loss, the reference frozen", "implement", difficulty=3, importance=4, minutes=11,
    truth=frozen_truth, cases=frozen_cases,
    right=(batch_losses, frozen_by_cache, frozen_by_sorting,),
    wrong=(
        Wrong("the reference gets a gradient", "torch.no_grad() -> torch.enable_grad()", "The values are right, but an optimiser could now lower the loss by moving the reference. It must be a constant."),
        Wrong("the wrong model is frozen", "torch.no_grad() -> torch.enable_grad() | policy(different) -> policy(different).detach()", "The values are right, but which of the two models is to learn?"),
        Wrong("the policy of this moment is the reference", "before = reference(different) -> pass | policy(different) - before -> (lambda logps: logps - logps.detach())(policy(different))",
              "The loss is log 2 at every step, though a gradient flows. The reference is the model as it was before training."),
        Wrong("the policy is asked for the reference's numbers", "reference(different) -> policy(different)", "The policy reads each row once, for its own numbers; the other numbers come from the reference."),
        Wrong("no reference", "reference(different) -> 0.0", "Each completion's log-probability is compared with what the reference gave the same completion."),
        Wrong("rows are read again", "list(dict.fromkeys(chosen + rejected)) -> chosen + rejected", "Collect the different rows first, read those, and give each pair its two numbers."),
        Wrong("the prompt is not part of the key", "list(dict.fromkeys(chosen + rejected)) -> list({y: (x, y) for x, *ys in reversed(pairs) for y in reversed(ys)}.values()) | {row: i -> {row[1]: i | place[row] -> place[row[1]]",
              "The same completion of another prompt is another row, with another probability."),
        Wrong("prompt and completion are one key", "list(dict.fromkeys(chosen + rejected)) -> list({x + y: (x, y) for x, *ys in reversed(pairs) for y in reversed(ys)}.values()) | {row: i -> {row[0] + row[1]: i | place[row] -> place[row[0] + row[1]]",
              "The prompt (1, 2) with completion (3,) and the prompt (1,) with completion (2, 3) are the same tokens. Have they the same log-probability?"),
        Wrong("log(sigmoid(x)) overflows", "torch.nn.functional.logsigmoid(beta * margin) -> torch.sigmoid(beta * margin).log()", "The sigmoid of a very negative margin is 0 in floating point. One torch function does both steps."),
        Wrong("the rejected one is detached", "for row in rejected]] -> for row in rejected]].detach()", "Both completions are read by the policy, and both carry a gradient."),
    ),
)  # fmt: skip


class OutOfMemory(Exception):
    """More pairs at once than a micro-batch holds."""


class StillInMemory(Exception):
    """The graph of an earlier micro-batch is waiting for backward()."""


class Losses(NamedTuple):
    """The DPO loss of pairs whose margin is linear in the weight, one per pair."""

    beta: float
    largest: int
    waiting: list  # the sizes of micro-batches whose graph no gradient has passed through

    def __call__(self, weight, pairs):
        if len(pairs) > self.largest:
            raise OutOfMemory(
                f"{len(pairs)} pairs at once; the largest micro-batch has {self.largest}"
            )
        if self.waiting:
            raise StillInMemory("the graph of the micro-batch before has not seen backward() yet")
        each = -torch.nn.functional.logsigmoid(self.beta * (pairs @ weight))
        if each.requires_grad:
            self.waiting.append(len(pairs))
            each.register_hook(lambda gradient: self.waiting.clear())
        return each


def accumulate_cases(generator):
    def case(*sizes):
        weight = torch.randn(3, generator=generator, dtype=torch.float64)
        parts = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in sizes]
        beta = 0.5 + torch.rand(1, generator=generator).item()
        return weight.requires_grad_(), Losses(beta, max(sizes), []), [3 * part for part in parts]

    unequal = [case(2, 1), case(1, 4, 2), case(5, 5, 5, 1)]
    return [case(2), case(3, 3), *(Edge("micro-batches are not equally large", c) for c in unequal)]


def accumulate_truth(weight, losses, micro_batches):
    """The derivative by hand, pair by pair, of the mean over all pairs."""
    gradient = [0.0] * len(weight)
    w, pairs = weight.tolist(), [row for part in micro_batches for row in part.tolist()]
    for row in pairs:
        margin = losses.beta * sum(a * b for a, b in zip(row, w))
        slope = -losses.beta * torch.tensor(-margin, dtype=torch.float64).sigmoid().item()
        gradient = [g + slope * a / len(pairs) for g, a in zip(gradient, row)]
    return torch.tensor(gradient, dtype=weight.dtype)


def accumulate_then_divide(weight, losses, micro_batches):
    n = 0
    for part in micro_batches:
        losses(weight, part).sum().backward()
        n += len(part)
    return weight.grad / n


def accumulate_pair_by_pair(weight, losses, micro_batches):
    gradient, n = torch.zeros_like(weight), 0
    for row in (row for part in micro_batches for row in part):
        (new,) = torch.autograd.grad(losses(weight, row[None])[0], weight)
        n += 1
        gradient = gradient + (new - gradient) / n
    return gradient


def accumulated_gradient(weight, losses, micro_batches):
    n = sum(len(part) for part in micro_batches)
    for part in micro_batches:
        (losses(weight, part).sum() / n).backward()
    return weight.grad


ACCUMULATE = Exercise(
    "06.4", "Micro-batches of unequal size", "implement", difficulty=2, importance=4, minutes=8,
    truth=accumulate_truth, cases=accumulate_cases,
    right=(accumulated_gradient, accumulate_then_divide, accumulate_pair_by_pair,),
    wrong=(
        Wrong("the mean of means", ".sum() / n -> .mean() / len(micro_batches)", "Right as long as all micro-batches are equally large. How much does a pair in a micro-batch of one weigh here?"),
        Wrong("means added", ".sum() / n -> .mean()", "backward() adds to what is there: cut into more micro-batches, the same batch would get a larger gradient."),
        Wrong("sums added, not divided", ".sum() / n -> .sum()", "That is the gradient of the batch's sum; the task wants that of its mean."),
        Wrong("only the last part, weighted rightly", "in micro_batches: -> in micro_batches[-1:]:", "The weight is right. But the gradients must add up over the loop, and only the last is left."),
        Wrong("smaller micro-batches are dropped", "micro_batches = [part for part in micro_batches if len(part) == max(map(len, micro_batches))]", "Every pair counts, those in a smaller micro-batch too."),
        Wrong("all taken to be as large as the largest", "/ n -> / (len(micro_batches) * max(map(len, micro_batches)))", "How many pairs are there really? Count them instead of multiplying."),
        Wrong("divided by the number of micro-batches", "/ n -> / len(micro_batches)", "The mean is over pairs: divide by how many pairs there are."),
        Wrong("divided twice", ".sum() / n -> .mean() / n", "One division is enough: a mean is divided already."),
        Wrong("earlier micro-batches counted again", "(losses(weight, part).sum() / n).backward() -> running = losses(weight, part).sum() / n + (0 if weight.grad is None else running); running.backward(retain_graph=True)",
              "A running loss still holds the earlier graphs, so each backward() passes through all of them again."),
        Wrong("the whole batch at once", "micro_batches = [torch.cat(micro_batches)]", "That is the right mean, but it does not fit: take one micro-batch at a time and let the gradients add up."),
        Wrong("one backward at the end", "for part in micro_batches: -> for part in [sum(losses(weight, part).sum() for part in micro_batches)]: | losses(weight, part).sum() / n -> part / n",
              "The gradient would be right, but until then the graphs of all micro-batches are kept. What frees one before the next is built?"),
        Wrong("the mean loss, not its gradient", "return weight.grad -> return sum(losses(weight.detach(), part).sum() for part in micro_batches) / n", "The task wants a tensor as large as the weight: what backward() leaves in weight.grad."),
    ),
)  # fmt: skip


# What seven runs of the tiny loop below showed, as printed in the task: first loss, first loss
# computed again, last loss, true margin, sum over all two-token completions, change by padding.
RUNS = {
    "A": (0.6931, 0.6931, 0.5251, 4.19, 0.235, 0.00),
    "B": (0.6931, 0.6931, 0.5252, -4.22, 1.000, 0.00),
    "C": (0.7066, 0.7137, 0.5191, 4.25, 1.000, 0.00),
    "D": (0.6931, 0.6931, 0.6840, 0.83, 3.954, 0.00),
    "E": (0.6931, 0.6931, 0.6931, 5.01, 1.000, 0.00),
    "F": (0.6931, 0.6931, 0.5251, 4.19, 1.000, 0.00),
    "G": (0.6931, 0.6931, 0.4780, 3.22, 0.235, 9.19),
}  # fmt: skip
BUGS = (
    "nothing", "mean for sum", "padding counted", "prompt counted", "sign swapped", "no reference",
    "reference = policy", "dropout on",
)  # fmt: skip
VOCABULARY, STEPS, RATE, BETA = 5, 15, 4.0, 0.1


def tiny_logps(weight, batch, bug="", dropout=None):
    """log pi(y | x) of a padded batch, with a bug or without."""
    ids, mask = batch
    if bug == "prompt counted":
        mask = mask.flip(1).cumsum(1).flip(1).clamp(max=1)
    if bug == "padding counted":
        mask = torch.ones_like(mask)
    sums = (token_logps(tiny_logits(weight, ids, dropout), ids) * mask[:, 1:]).sum(1)
    return sums / mask[:, 1:].sum(1) if bug == "mean for sum" else sums


@cache
def tiny_run(bug):
    """Train a tiny model with a bug; returns the six numbers of a row of RUNS."""
    drawn = random.Random(6)
    pairs = [
        [[drawn.randrange(VOCABULARY) for _ in range(drawn.randint(2, 7))] for _ in range(3)]
        for _ in range(8)
    ]
    start = [[drawn.gauss(0, 1) for _ in range(VOCABULARY)] for _ in range(VOCABULARY)]
    start = torch.tensor(start, dtype=torch.float64)
    dropout = torch.Generator().manual_seed(0) if bug == "dropout on" else None
    batch = pad_rows([(pair[0], pair[k]) for k in (1, 2) for pair in pairs], 0)
    before = tiny_logps(start, batch, bug)

    def margins(logps, reference):
        ratios = (logps - reference).view(2, -1)
        return ratios[0] - ratios[1]

    def loss(weight):
        logps = tiny_logps(weight, batch, bug, dropout)
        reference = {"no reference": 0.0, "reference = policy": logps.detach()}.get(bug, before)
        sign = -1 if bug == "sign swapped" else 1
        return -torch.nn.functional.logsigmoid(sign * BETA * margins(logps, reference)).mean()

    first, again = loss(start).item(), loss(start).item()
    weight = start.clone().requires_grad_()
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(last := loss(weight), weight)
        weight = (weight - RATE * gradient).detach().requires_grad_()
    truth = margins(tiny_logps(weight, batch), tiny_logps(start, batch)).mean().item()

    x = [1, 2]
    every = [(x, [a, b]) for a in range(VOCABULARY) for b in range(VOCABULARY)]
    sum_of_all = tiny_logps(start, pad_rows(every, 0), bug).exp().sum().item()
    row, longer = (x, [3, 4]), (x, [3, 4, 1, 2])
    alone, beside = (tiny_logps(start, pad_rows(r, 0), bug)[0] for r in ([row], [row, longer]))
    return first, again, last.item(), truth, sum_of_all, abs(alone - beside).item()


def diagnosis_truth():
    """Each bug is put into the loop and run again; the row that it gives bears its name."""
    rows = {bug: tiny_run(bug) for bug in BUGS}

    def distance(bug, seen):
        return sum(abs(a - b) for a, b in zip(rows[bug], seen))

    return {run: min(BUGS, key=lambda bug: distance(bug, seen)) for run, seen in RUNS.items()}


DIAGNOSE = Exercise(
    "06.5", "Which bug is it?", "diagnose", difficulty=3, importance=5, minutes=8, workshop=True,
    truth=diagnosis_truth, cases=lambda generator: [()],
    wrong=(
        Wrong("A passes because its loss does", {"A": "nothing"}, "Its losses and its margin are perfect, but one test does not look at the loss. What is its result, and what would make a sum of probabilities too small?"),
        Wrong("A: what is counted too much?", {"A": "padding counted"}, "Too many tokens are counted, that is right. But would this row's log-probability then stay the same beside a longer row?"),
        Wrong("B passes because its loss does", {"B": "nothing"}, "The loss falls as it should. Which way did the margin go, measured by the right code?"),
        Wrong("B: a reference that is missing", {"B": "no reference"}, "Without a reference the first loss would not be log 2."),
        Wrong("C: a reference that is missing", {"C": "no reference"}, "Without a reference the first loss is off, too, but it is a definite number. Compare the first two columns."),
        Wrong("C: log 2 up to rounding", {"C": "nothing"}, "Policy and reference are the same weights before the first step, so the loss is log 2 to all four digits. What makes two readings of one batch differ?"),
        Wrong("D: a learning rate too small", {"D": "nothing"}, "It could be the learning rate. But nothing has been trained yet where the sum over all completions was taken: can probabilities sum to more than 1?"),
        Wrong("D: the reference is the policy", {"D": "reference = policy"}, "Then the loss would not move at all; this one moves, slowly. Its sum over all completions is far above 1."),
        Wrong("D: too much is counted", {"D": "prompt counted"}, "Counting more tokens multiplies by more probabilities, so the sum would be below 1, not above."),
        Wrong("E: a reference that is missing", {"E": "no reference"}, "Without a reference the first loss would not be log 2."),
        Wrong("E learns slowly", {"E": "mean for sum"}, "Its loss is not slow, it is constant: which quantity in the margin can never differ from the other?"),
        Wrong("E passes because it starts at log 2", {"E": "nothing"}, "A loss of log 2 is right before the first step, not after the last."),
        Wrong("F has a bug that no loss can see", {"F": "prompt counted"}, "Its losses are those of another run, to the last digit. Which of the two passes the tests of log-probabilities?"),
        Wrong("G: what is counted too much?", {"G": "prompt counted"}, "A prompt that is counted cancels in the loss, and a longer row beside it changes nothing. Here both differ."),
        Wrong("G passes because its loss is low", {"G": "nothing"}, "It has the lowest loss of all, but not the largest margin: something besides the completions is being learned. See the last column."),
    ),
)  # fmt: skip

EXERCISES = (PAD, LOGP, FROZEN, ACCUMULATE, DIAGNOSE)
