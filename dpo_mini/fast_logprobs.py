"""The log-probabilities of `logprobs.py` without the waste: this is what trains."""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo_mini.logprobs import sequence_logps
from dpo_mini.tokens import collate

# A shared prompt needs an attention mask of its own, which keeps attention off its fastest path;
# that pays once this share of all tokens need not be read twice.
WORTH_SHARING = 0.25
MOST_PADDING = 0.25  # where lengths differ more, rows are read in several batches
LOGITS_AT_ONCE = 2**27  # numbers, half a gigabyte: beyond it the vocabulary is projected in chunks


def completion_logps(model, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(completion | prompt) of (prompt ids, completion ids), [rows]: `sequence_logps`, where
    every token is read once and only those that a completion needs.

    Equal rows are read once, a prompt once for all its completions (where that pays), the last
    token of a completion not at all, since it predicts nothing. Logits are computed only where a
    completion's token is predicted, and not all at once where they are many. Equal to
    `sequence_logps` up to rounding; for a model whose logits are more than its head on its last
    hidden state, it is `sequence_logps`.
    """
    different, index = different_rows(rows)
    if not splits(model):
        logps = sequence_logps(model, *collate(different).to(model.device))
        return logps[index.to(logps.device)]
    body, head = body_and_head(model)
    share, order, sums = shares_prompts(different), [], []
    for indices in of_like_length(different, share):
        batch = layout([different[i] for i in indices], share).to(model.device)
        hidden = body(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            attention_mask=additive(batch.attends, model.dtype),
        ).last_hidden_state  # fmt: skip
        logps = vocabulary_logps(head, hidden.flatten(0, 1)[batch.predictors], batch.targets)
        sums.append(logps.new_zeros(len(indices)).index_add(0, batch.owners, logps))
        order += indices
    return torch.cat(sums)[torch.tensor(order).argsort()[index].to(logps.device)]


def families(rows: Sequence[tuple[list[int], list[int]]], share: bool) -> list[list[int]]:
    """Which of `rows` become one row of a batch: each alone, or with `share` all of a prompt."""
    members: dict[tuple, list[int]] = {}
    for i, (prompt, _) in enumerate(rows):
        members.setdefault((*prompt, None if share else i), []).append(i)
    return list(members.values())


def family_length(rows: Sequence[tuple[list[int], list[int]]], members: list[int]) -> int:
    """Tokens to read: the prompt, and of each completion all but the last."""
    return len(rows[members[0]][0]) + sum(len(rows[i][1]) - 1 for i in members)


def of_like_length(rows: Sequence[tuple[list[int], list[int]]], share: bool) -> list[list[int]]:
    """Indices of `rows` in batches, longest first, of which at most MOST_PADDING is padding."""
    sized = [(family_length(rows, members), members) for members in families(rows, share)]
    batches, lengths = [], []
    for length, members in sorted(sized, key=lambda pair: -pair[0]):
        lengths.append(length)
        if not batches or sum(lengths) < (1 - MOST_PADDING) * lengths[0] * len(lengths):
            batches.append([])
            lengths = [length]
        batches[-1] += members
    return batches


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


def layout(rows: Sequence[tuple[list[int], list[int]]], share: bool) -> Layout:
    """One row for each of `rows`, or with `share` one for each prompt: the prompt, then each of its
    completions, which attend to the prompt and to themselves.
    """
    groups = families(rows, share)
    length = max(family_length(rows, members) for members in groups)
    ids, positions, segments, predictors, targets, owners = [], [], [], [], [], []
    for row, members in enumerate(groups):
        prompt = rows[members[0]][0]
        tokens, places, parts = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for part, i in enumerate(members, start=1):
            completion, start = rows[i][1], row * length + len(tokens)
            predictors += [
                row * length + len(prompt) - 1,
                *range(start, start + len(completion) - 1),
            ]
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


def shares_prompts(rows: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Is it worth while to read each prompt once for all its completions?"""
    prompts = {tuple(prompt): len(prompt) for prompt, _ in rows}
    alone = sum(len(prompt) + len(completion) for prompt, completion in rows)
    together = sum(prompts.values()) + sum(len(completion) for _, completion in rows)
    return together <= (1 - WORTH_SHARING) * alone


def additive(attends: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to attention scores, [batch, 1, length, length]: 0 where a token attends."""
    if attends is None:
        return None
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min)[:, None]


def body_and_head(model):
    """A causal model's two halves: token ids to hidden states, hidden states to logits."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model, causal.get_output_embeddings()


def splits(model) -> bool:
    """Are the logits its head on its last hidden state, neither scaled nor capped? Tried once."""
    if model not in SPLITS:
        body, head = body_and_head(model)
        tokens = torch.tensor([[1, 2, 3]], device=model.device)
        with torch.no_grad():
            whole = model(input_ids=tokens).logits
            halves = head(body(input_ids=tokens).last_hidden_state)
        SPLITS[model] = torch.allclose(whole.float(), halves.float(), rtol=1e-2, atol=1e-2)
    return SPLITS[model]


SPLITS: WeakKeyDictionary = WeakKeyDictionary()


def vocabulary_logps(head, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax of `head(hidden)` at `targets`, [N], for hidden states [N, width].

    In chunks where there are many, whose logits the backward pass computes again instead of
    keeping them.
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

    Its gradient, onehot - softmax, takes the place of what was kept for it: no tensor is larger.
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


def different_rows(rows: Sequence[tuple]) -> tuple[list, Tensor]:
    """The different ones among rows (prompt ids, completion ids), and where in them each row is,
    int64 [rows]: a completion that is in several pairs need be read only once.
    """
    places: dict[tuple, int] = {}
    index = [places.setdefault((*prompt, -1, *ids), len(places)) for prompt, ids in rows]
    return list(dict(zip(index, rows)).values()), torch.tensor(index)
