"""The log-probabilities of `logprobs.py` without the waste: this is what trains.

Four readers give the log-probabilities of the same rows, fastest first. Which of them is exact for
a model is decided in `exactness.py`. The last one always is: it is the definition.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo_mini.exactness import (
    body_and_head,
    check_defined,
    difference,
    refusal,
    say_once,
)
from dpo_mini.logprobs import sequence_logps
from dpo_mini.models import check_ids
from dpo_mini.tokens import Batch, collate

# In this file a row is one sequence for the model; in data.py it is a dict of a JSON line.
Rows = Sequence[tuple[list[int], list[int]]]  # (prompt ids, completion ids)

# A shared prompt needs an attention mask of its own, which keeps attention off its fastest path;
# that pays once this share of all tokens need not be read twice.
WORTH_SHARING = 0.25
MOST_PADDING = 0.25  # where lengths differ more, rows are read in several batches
LOGITS_AT_ONCE = 2**27  # numbers, half a gigabyte: beyond it the vocabulary is projected in chunks


def completion_logps(model, rows: Rows) -> Tensor:
    """log pi(completion | prompt) of (prompt ids, completion ids), [rows], in nats.

    Equal, up to rounding, to `sequence_logps` of each row alone: for every causal model and every
    length. Equal rows are read once. Where it is exact, a prompt is read once for all its
    completions (if that pays), and logits are computed only where a completion's token is
    predicted. Where it is not, a warning says so once.

    Puts the model into evaluation mode: with dropout a log-probability is a random number. Raises
    DataError for ids that the model does not know, HubError for a model that is not causal.
    """
    model.eval()
    different, index = different_rows(rows)
    for prompt, completion in different:
        check_ids(model, prompt)
        check_ids(model, completion)
    check_defined(model, max((p + c for p, c in different), key=len))
    logps = exact_reader(model, different)(model, different)
    return logps[index.to(logps.device)]


# --- four readers: a model and rows in, log-probabilities [rows] out ---


def read_shared(model, rows: Rows) -> Tensor:
    """Each prompt once for all its completions, and the head only where it is needed."""
    return read_by_halves(model, rows, share=True)


def read_split(model, rows: Rows) -> Tensor:
    """Each row once, and the head only where it is needed."""
    return read_by_halves(model, rows, share=False)


def read_padded(model, rows: Rows) -> Tensor:
    """Rows of like length in one batch, as the definition reads them."""
    batches = of_like_length(rows, share=False)
    logps = [sequence_logps(model, *batch_of(model, [rows[i] for i in b])) for b in batches]
    return in_order(logps, batches)


def read_one_by_one(model, rows: Rows) -> Tensor:
    """Each row alone: the definition, which the others must equal."""
    return torch.cat([sequence_logps(model, *batch_of(model, [row])) for row in rows])


READERS = {"share": read_shared, "split": read_split, "pad": read_padded}  # fastest first


def exact_reader(model, rows: Rows) -> Callable[..., Tensor]:
    """The fastest reader that is exact for this model and for rows as long as these."""
    share = shares_prompts(rows)
    sample, packed, longest = hardest_rows(rows, share)
    alone = cache(partial(read_one_by_one, model, sample))
    refused = []
    for shortcut, reader in READERS.items():
        if shortcut == "share" and not share:
            continue
        reason = refusal(
            model, shortcut, (packed, longest),
            trial=lambda reader=reader: difference(reader(model, sample), alone()),
        )  # fmt: skip
        if not reason:
            break
        refused.append(reason)
    else:
        reader = read_one_by_one
    if refused:
        say_once(model, f"{refused[0]}. Log-probabilities take a slower way, which is exact.")
    return reader


def hardest_rows(rows: Rows, share: bool) -> tuple[Rows, int, int]:
    """The rows to try a reader on: all of the longest prompt's, the longest and the shortest row.

    Also the length in tokens of the longest prompt with its completions, and of the longest row.
    """
    groups = by_prompt(rows, share)
    widest = max(groups, key=lambda members: packed_length(rows, members))
    order = sorted(range(len(rows)), key=lambda i: packed_length(rows, [i]))
    sample = {*widest, order[0], order[-1]}
    packed = packed_length(rows, widest)
    return [rows[i] for i in sorted(sample)], packed, packed_length(rows, [order[-1]]) + 1


def read_by_halves(model, rows: Rows, share: bool) -> Tensor:
    """The body on every token, the head only where a completion's token is predicted."""
    body, head = body_and_head(model)
    batches, sums = of_like_length(rows, share), []
    for indices in batches:
        batch = layout([rows[i] for i in indices], share).to(model.device)
        hidden = body(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            attention_mask=additive(batch.attends, model.dtype),
        ).last_hidden_state  # fmt: skip
        logps = vocabulary_logps(head, hidden.flatten(0, 1)[batch.predictors], batch.targets)
        sums.append(logps.new_zeros(len(indices)).index_add(0, batch.owners, logps))
    return in_order(sums, batches)


# --- which rows are read together ---


def batch_of(model, rows: Rows) -> Batch:
    return collate(rows).to(model.device)


def in_order(parts: Sequence[Tensor], batches: Sequence[list[int]]) -> Tensor:
    """Numbers of rows that were read in `batches` of indices, in the order of the rows."""
    indices = torch.tensor([i for batch in batches for i in batch])
    numbers = torch.cat(list(parts))
    return numbers[indices.argsort().to(numbers.device)]


def by_prompt(rows: Rows, share: bool) -> list[list[int]]:
    """Indices of `rows` that become one row of a batch: with `share` all of a prompt, else one."""
    members: dict[tuple, list[int]] = {}
    for i, (prompt, _) in enumerate(rows):
        members.setdefault((*prompt, None if share else i), []).append(i)
    return list(members.values())


def packed_length(rows: Rows, members: list[int]) -> int:
    """Tokens to read: the prompt and its completions, without the last token of each, which
    predicts nothing.
    """
    return len(rows[members[0]][0]) + sum(len(rows[i][1]) - 1 for i in members)


def of_like_length(rows: Rows, share: bool) -> list[list[int]]:
    """Indices of `rows` in batches, longest first, of which at most MOST_PADDING is padding."""
    sized = [(packed_length(rows, members), members) for members in by_prompt(rows, share)]
    batches, lengths = [], []
    for length, members in sorted(sized, key=lambda pair: -pair[0]):
        lengths.append(length)
        if not batches or sum(lengths) < (1 - MOST_PADDING) * lengths[0] * len(lengths):
            batches.append([])
            lengths = [length]
        batches[-1] += members
    return batches


def shares_prompts(rows: Rows) -> bool:
    """Is it worth while to read each prompt once for all its completions?"""
    prompts = {tuple(prompt): len(prompt) for prompt, _ in rows}
    alone = sum(len(prompt) + len(completion) for prompt, completion in rows)
    together = sum(prompts.values()) + sum(len(completion) for _, completion in rows)
    return together <= (1 - WORTH_SHARING) * alone


def different_rows(rows: Rows) -> tuple[list, Tensor]:
    """The different ones among rows (prompt ids, completion ids), and where in them each row is,
    int64 [rows]: a completion that is in several pairs need be read only once.
    """
    places: dict[tuple, int] = {}
    index = [places.setdefault((*prompt, -1, *ids), len(places)) for prompt, ids in rows]
    return list(dict(zip(index, rows)).values()), torch.tensor(index)


# --- how they lie in a batch ---


class Layout(NamedTuple):
    """Completions laid out in rows for one forward pass; N is the number of completion tokens."""

    input_ids: Tensor  # [batch, length], padded on the right
    position_ids: Tensor  # [batch, length]; every completion's go on from its prompt's
    attends: Tensor | None  # bool [batch, length, length]; None: to everything before
    predictors: Tensor  # [N], where in the flattened rows each completion token is predicted
    targets: Tensor  # [N], the tokens
    owners: Tensor  # [N], whose they are

    def to(self, device) -> "Layout":
        return Layout(*(t if t is None else t.to(device) for t in self))


def layout(rows: Rows, share: bool) -> Layout:
    """One row for each of `rows`, or with `share` one for each prompt: the prompt, then each of its
    completions without its last token. A completion attends to its prompt and to itself.

    Two completions of the prompt [1, 2, 3], with `share`: [([1, 2, 3], [5, 6, 0]), ([1, 2, 3],
    [7, 0])], 0 being EOS. The six lists are, in one row of six tokens,

        place        0  1  2  3  4  5
        ids          1  2  3  5  6  7
        positions    0  1  2  3  4  3    7 follows the prompt, as 5 does
        segments     0  0  0  1  1  2    0 is the prompt; a token attends to 0 and to its own
        predictors   2  3  4  2  5       the places that predict
        targets      5  6  0  7  0       these tokens
        owners       0  0  0  1  1       of these completions
    """
    groups = by_prompt(rows, share)
    length = max(packed_length(rows, members) for members in groups)
    ids, positions, segments, predictors, targets, owners = [], [], [], [], [], []
    for row, members in enumerate(groups):
        prompt = rows[members[0]][0]
        tokens, places, parts = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for part, i in enumerate(members, start=1):
            completion, start = rows[i][1], row * length + len(tokens)
            # The prompt's last token predicts the first of a completion, which predicts the second.
            predictors.append(row * length + len(prompt) - 1)
            predictors += range(start, start + len(completion) - 1)
            targets += completion
            owners += [i] * len(completion)
            tokens += completion[:-1]
            places += range(len(prompt), len(prompt) + len(completion) - 1)
            parts += [part] * (len(completion) - 1)
        padding = length - len(tokens)
        ids.append(tokens + [0] * padding)
        positions.append(places + [0] * padding)
        segments.append(parts + [-1] * padding)
    attends = None
    if share:
        segment = torch.tensor(segments)
        same = segment[:, :, None] == segment[:, None, :]
        attends = (same | (segment == 0)[:, None, :]).tril()
    return Layout(
        torch.tensor(ids), torch.tensor(positions), attends,
        torch.tensor(predictors), torch.tensor(targets), torch.tensor(owners),
    )  # fmt: skip


def additive(attends: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to attention scores, [batch, 1, length, length]: 0 where a token attends."""
    if attends is None:
        return None
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min)[:, None]


def vocabulary_logps(head, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax of `head(hidden)` at `targets`, [N], for hidden states [N, width].

    Where there are many, they are taken in chunks. The backward pass computes the logits of a chunk
    again, so that only one chunk of them is ever in memory.
    """

    def chosen(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return ChosenLogps.apply(logits, tokens)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(targets) <= size:
        return chosen(hidden, targets)
    chunks = zip(hidden.split(size), targets.split(size))
    return torch.cat([checkpoint(chosen, *chunk, use_reentrant=False) for chunk in chunks])


class ChosenLogps(torch.autograd.Function):
    """log softmax of logits [N, vocabulary] at tokens [N].

    The gradient, onehot - softmax, is written over the log-probabilities that were kept for it, so
    that no second tensor of that size is needed.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor) -> Tensor:
        logps = logits.log_softmax(1)
        ctx.save_for_backward(logps, tokens)
        return logps.gather(1, tokens[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        logps, tokens = ctx.saved_tensors
        result = logps.exp_().mul_(-gradient[:, None])
        return result.scatter_add_(1, tokens[:, None], gradient[:, None]), None
