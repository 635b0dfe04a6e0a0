"""Token ids: chat template, BOS, EOS, and the batches that a model reads. Only this room knows."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.data import DataError, PreferencePair


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the token ids that a model reads."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def rows(self) -> tuple[tuple[list[int], list[int]], ...]:
        """(prompt ids, completion ids) of the chosen and of the rejected."""
        return (self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)


@dataclass(frozen=True)
class LabelledCompletion:
    """One completion and whether it was called good, for losses that need no pairs."""

    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool
    other_ids: list[int]  # another prompt's completion, for KTO's estimate of the KL

    @property
    def rows(self) -> tuple[tuple[list[int], list[int]], ...]:
        """(prompt ids, completion ids) of the completion, and of the other prompt's."""
        return (self.prompt_ids, self.completion_ids), (self.prompt_ids, self.other_ids)


def tokenize_prompt(tokenizer, prompt: str) -> list[int]:
    """A prompt's token ids, after exactly one BOS where the tokenizer has one.

    Raises DataError for an empty prompt without BOS: nothing would predict the first token.
    """
    ids, bos = tokenizer(prompt)["input_ids"], tokenizer.bos_token_id
    if bos is not None:
        while ids and ids[0] == bos:
            ids = ids[1:]
        return [bos, *ids]
    if not ids:
        raise DataError("the prompt is empty and the tokenizer has no BOS to predict a token from.")
    return ids


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer, max_length: int
) -> list[TokenizedPair]:
    """Token ids of pairs. Sampled pairs keep the ids that were sampled.

    Text is tokenised jointly (prompt + completion), and apart where the joint ids do not begin with
    the prompt's (a merge across the boundary; counted in a warning). A completion that came as text
    ends with exactly one EOS. Raises DataError for a pair longer than `max_length` tokens.
    """
    tokenized, merged = [], 0
    for i, pair in enumerate(pairs):
        if pair.prompt_ids and pair.chosen_ids and pair.rejected_ids:
            ids = TokenizedPair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        else:
            prompt_ids = tokenize_prompt(tokenizer, pair.prompt)
            chosen_ids, chosen_apart = tokenize_completion(tokenizer, pair.prompt, pair.chosen)
            rejected_ids, apart = tokenize_completion(tokenizer, pair.prompt, pair.rejected)
            ids = TokenizedPair(prompt_ids, chosen_ids, rejected_ids)
            merged += chosen_apart + apart
        longest = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        check_length(f"pair {i}", longest, max_length)
        tokenized.append(ids)
    warn_of_merges(merged)
    return tokenized


def tokenize_labelled(rows: Sequence[dict], tokenizer, max_length: int) -> list[LabelledCompletion]:
    """Rows with the columns `prompt`, `completion`, `label` (TRL's names; true is desirable),
    tokenised as in `tokenize_pairs`. Raises DataError for a missing column or another label.
    """
    tokenized, merged = [], 0
    for i, row in enumerate(rows):
        where = f"line {row['_line']}" if "_line" in row else f"row {i}"
        if not all(isinstance(row.get(c), str) for c in ("prompt", "completion")):
            raise DataError(f"{where}: expected texts in the columns 'prompt' and 'completion'.")
        if row.get("label") not in (True, False):
            raise DataError(f"{where}: 'label' must be true or false, got {row.get('label')!r}.")
        prompt_ids = tokenize_prompt(tokenizer, row["prompt"])
        ids, apart = tokenize_completion(tokenizer, row["prompt"], row["completion"])
        merged += apart
        check_length(where, len(prompt_ids) + len(ids), max_length)
        tokenized.append((prompt_ids, ids, bool(row["label"])))
    warn_of_merges(merged)
    return labelled_completions(tokenized)


def tokenize_completion(tokenizer, prompt: str, text: str) -> tuple[list[int], bool]:
    """A completion's token ids, ending in exactly one EOS, and whether it had to be tokenised apart
    from its prompt.
    """
    prompt_ids, joint = (tokenize_prompt(tokenizer, t) for t in (prompt, prompt + text))
    apart = joint[: len(prompt_ids)] != prompt_ids
    ids = joint[len(prompt_ids) :]
    if apart:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return with_one_eos(ids, tokenizer.eos_token_id), apart


def check_length(where: str, length: int, max_length: int) -> None:
    if length > max_length:
        raise DataError(
            f"{where} has {length} tokens, more than the model's context of {max_length}. "
            "Shorten or drop it: cut silently, it would not be what was preferred."
        )


def warn_of_merges(count: int) -> None:
    if count:
        said = f"{count} completions were tokenised apart: a token spans the end of the prompt."
        warnings.warn(said, stacklevel=3)


def labelled_completions(
    rows: Sequence[tuple[list[int], list[int], bool]],
) -> list[LabelledCompletion]:
    """(prompt ids, completion ids, called good?) as `LabelledCompletion`s. Each is given the
    completion at its own place in the next run of rows with one prompt, so that good and bad ones
    are given alike. Raises DataError where all answer one prompt.
    """
    runs: list[list[int]] = []
    for i, (prompt, *_) in enumerate(rows):
        if not runs or prompt != rows[runs[-1][0]][0]:
            runs.append([])
        runs[-1].append(i)
    if len({tuple(rows[run[0]][0]) for run in runs}) < 2:
        raise DataError("all completions answer one prompt: KTO's KL estimate needs two or more.")
    if rows[runs[0][0]][0] == rows[runs[-1][0]][0]:  # the list is a ring
        runs[0] = runs.pop() + runs[0]
    others = {}
    for run, following in zip(runs, runs[1:] + runs[:1]):
        others |= {i: rows[following[k % len(following)]][1] for k, i in enumerate(run)}
    return [LabelledCompletion(*row, others[i]) for i, row in enumerate(rows)]


def unpaired(pairs: Sequence[TokenizedPair]) -> list[LabelledCompletion]:
    """Each pair as two labelled completions: the chosen is desirable, the rejected is not."""
    rows = [
        (pair.prompt_ids, ids, desirable)
        for pair in pairs
        for ids, desirable in ((pair.chosen_ids, True), (pair.rejected_ids, False))
    ]
    return labelled_completions(rows)


def with_one_eos(ids: list[int], eos: int | None) -> list[int]:
    """The ids ending in exactly one EOS (unchanged where the tokenizer has none)."""
    if eos is None:
        return ids
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return [*ids, eos]


def text_items(
    texts: Sequence[str], tokenizer, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Texts as (prompt ids, completion ids) for SFT: all tokens, and EOS, after BOS alone (EOS
    where there is no BOS); cut to `max_length` tokens.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [bos if bos is not None else eos]
    rows = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return [(start, with_one_eos(ids, eos)[: max_length - 1]) for ids in rows]


class Batch(NamedTuple):
    """Padded sequences: three int64 tensors [batch, length], the masks 1 on what they name."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device) for t in self))


def collate(sequences: Sequence[tuple[list[int], list[int]]], padding_side: str = "right") -> Batch:
    """Pad (prompt ids, completion ids) to a `Batch`. Pads are 0 and never count: see the masks."""
    length = max(len(p) + len(c) for p, c in sequences)
    rows = []
    for prompt, completion in sequences:
        pad = [0] * (length - len(prompt) - len(completion))
        columns = (
            prompt + completion,
            [1] * (len(prompt) + len(completion)),
            [0] * len(prompt) + [1] * len(completion),
        )
        rows.append([c + pad if padding_side == "right" else pad + c for c in columns])
    return Batch(*torch.tensor(rows).unbind(1))
