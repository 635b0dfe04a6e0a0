"""From texts to token ids (chat template, BOS, EOS), and the padded batches that a model reads.

The ids are the tokenizer's own, as TRL 1.16 makes them of the same row: BOS where the tokenizer
adds it, a template's text as it stands, and prompt and completion tokenised in one piece. A text
that is an answer ends with exactly one EOS; a template closes an answer as it was written to.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.data import (
    DataError,
    LabelledAnswer,
    PreferencePair,
    Text,
    labelled_answers,
    shared_length,
)


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the token ids that a model reads; `data.PreferencePair` holds its texts.

    `rows` are exactly two, here and in `LabelledCompletion`: the reference's log-probabilities of
    all items are kept as a tensor [items, 2].
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def rows(self) -> tuple[tuple[list[int], list[int]], ...]:
        """(prompt ids, completion ids) of the chosen and of the rejected."""
        return (self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)


@dataclass(frozen=True)
class LabelledCompletion:
    """One completion as token ids and whether it was called good, for losses that need no pairs;
    `data.LabelledAnswer` holds its text.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool
    other_ids: list[int]  # another prompt's completion, for KTO's estimate of the KL

    @property
    def rows(self) -> tuple[tuple[list[int], list[int]], ...]:
        """(prompt ids, completion ids) of the completion, and of the other prompt's."""
        return (self.prompt_ids, self.completion_ids), (self.prompt_ids, self.other_ids)


# --- one text, one prompt, one answer ---


def tokenize_prompt(tokenizer, prompt: Text) -> list[int]:
    """The ids that a prompt is sampled from: a text's, or a conversation's with the template's
    opening of the answer.

    An empty text is BOS alone, also where the tokenizer adds none by itself. Raises DataError where
    there is no BOS either (nothing would predict the first token), and for messages that have no
    template, or one that refuses them.
    """
    if isinstance(prompt, str):
        return _text_ids(tokenizer, prompt) or _bos_alone(tokenizer)
    return _chat_ids(tokenizer, prompt, add_generation_prompt=True)


def _text_ids(tokenizer, text: str) -> list[int]:
    """The tokenizer's own ids of a text; BOS at most once, and no EOS that the text has not."""
    ids, bos, eos = tokenizer(text)["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token
    if ids[:2] == [bos, bos]:  # written in the text, and added by the tokenizer
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids = ids[:-1]
    return ids


def _bos_alone(tokenizer) -> list[int]:
    if tokenizer.bos_token_id is None:
        raise DataError("the prompt is empty and the tokenizer has no BOS to predict a token from.")
    return [tokenizer.bos_token_id]


def _chat_ids(tokenizer, messages: list[dict], options: dict | None = None, **more) -> list[int]:
    options = {**(options or {}), **more}
    if not (tokenizer.chat_template or "chat_template" in options):
        raise DataError(
            "messages, but the tokenizer has no chat template: use plain text, or a model that was "
            "made for chat."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own and may raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the chat template refuses these messages: {said}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # BOS is the template's affair


def _with_eos(text: str, eos: str | None) -> str:
    """The text with EOS at its end, exactly once; white space after an EOS is dropped."""
    if eos is None:
        return text
    while text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text + eos


def prompt_and_answers(
    tokenizer, prompt: Text, answers: Sequence[Text], options: dict | None = None
) -> tuple[list[int], list[list[int]], bool]:
    """Ids of a prompt and of each of its answers, and whether the prompt lost its end.

    Prompt and answer are tokenised in one piece. Where a token spans the end of the prompt, or the
    template closes the prompt in another way once an answer follows, the answers begin where the
    ids part, and what the prompt loses is theirs:

        "This mov" + "ie"  ->  [BOS, This, movie, EOS]  ->  prompt [BOS, This], answer [movie, EOS]
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        prompt_alone = _text_ids(tokenizer, prompt)
        with_answers = [_text_ids(tokenizer, prompt + _with_eos(text, eos)) for text in answers]
        with_answers = [with_one_eos(ids, tokenizer.eos_token_id) for ids in with_answers]
    else:
        prompt_alone = _chat_ids(tokenizer, prompt, options, add_generation_prompt=True)
        with_answers = [_chat_ids(tokenizer, [*prompt, *answer], options) for answer in answers]
    end = min(shared_length(prompt_alone, ids) for ids in with_answers)
    if not all(ids[end:] for ids in with_answers):
        raise DataError("an answer is empty: the template gives it no token of its own.")
    prompt_ids = prompt_alone[:end] or _bos_alone(tokenizer)
    return prompt_ids, [ids[end:] for ids in with_answers], end < len(prompt_alone)


def with_one_eos(ids: list[int], eos: int | None) -> list[int]:
    """The ids ending in exactly one EOS (unchanged where the tokenizer has none)."""
    if eos is None:
        return ids
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return [*ids, eos]


# --- sampled ids, and whose they are ---


def tokenizer_fingerprint(tokenizer) -> str:
    """Eight hex digits that name a tokenizer: a hash of its tokens in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:8]


def completion_text(tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    """The text that `ids` add to the prompt's. Alone, some tokenizers (Llama 2's) decode the first
    word of a completion without the space before it.
    """
    before, whole = _decoded(tokenizer, prompt_ids), _decoded(tokenizer, [*prompt_ids, *ids])
    return whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, ids)


def _decoded(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _sampled(pair: PreferencePair, tokenizer, fingerprint, decode) -> TokenizedPair | None:
    """The pair's own ids; None where another tokenizer made them, or they are not its texts'.

    `fingerprint()` is this tokenizer's, `decode(ids)` its text of them.
    """
    ids = TokenizedPair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    highest = max(map(max, (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids)))
    if highest >= len(tokenizer):  # an id that this tokenizer has not
        return None
    if pair.tokenizer and pair.tokenizer != fingerprint():  # the pair names another tokenizer
        return None
    if decode(tuple(ids.prompt_ids)) != pair.prompt:  # as markup of a chat, or an added BOS, does
        if ids.prompt_ids != tokenize_prompt(tokenizer, pair.prompt):  # the text was edited
            return None
    for answer, (prompt_ids, of_answer) in zip((pair.chosen, pair.rejected), ids.rows):
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        if tokenizer.eos_token_id in of_answer[:-1]:  # it would have ended there
            return None
        if text != decode(tuple(of_answer)):  # a first space is lost where it is decoded alone
            if text != completion_text(tokenizer, prompt_ids, of_answer):  # the text was edited
                return None
    return ids


# --- pairs and labelled completions ---


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer, max_length: int, drop_long: bool = False
) -> list[TokenizedPair]:
    """Token ids of pairs: those that were sampled where they are this tokenizer's and give back the
    pair's text, otherwise the text's (`prompt_and_answers`).

    Raises DataError where chosen and rejected are the same tokens, and for a pair longer than
    `max_length` tokens: cut, it would not be what was preferred. `drop_long` drops it. Warns, with
    the count, of pairs that were dropped, tokenised anew, or whose prompt lost its end.
    """
    fingerprint = cache(lambda: tokenizer_fingerprint(tokenizer))  # only where a pair asks for it
    decode = cache(lambda ids: _decoded(tokenizer, ids))  # a completion is in several pairs

    def ids_of(pair: PreferencePair) -> tuple[TokenizedPair, list[str]]:
        ids = _sampled(pair, tokenizer, fingerprint, decode) if pair.prompt_ids else None
        notes = [ANEW] if pair.prompt_ids and not ids else []
        if ids is None:
            texts, options = (pair.chosen, pair.rejected), pair.chat_template_kwargs
            prompt_ids, answers, moved = prompt_and_answers(tokenizer, pair.prompt, texts, options)
            ids, notes = TokenizedPair(prompt_ids, *answers), notes + [BOUNDARY_MOVED] * moved
        if ids.chosen_ids == ids.rejected_ids:
            raise DataError("chosen equals rejected, token for token. Drop the row.")
        return ids, notes

    return _of_each(pairs, ids_of, max_length, drop_long)


def tokenize_labelled(
    rows: Sequence[dict], tokenizer, max_length: int, drop_long: bool = False
) -> list[LabelledCompletion]:
    """Rows with the columns `prompt`, `completion`, `label` (TRL's names; true is desirable),
    tokenised as in `tokenize_pairs`. Raises DataError for a missing column or another label.
    """

    def ids_of(answer: LabelledAnswer) -> tuple[LabelledCompletion, list[str]]:
        prompt_ids, (ids,), moved = prompt_and_answers(
            tokenizer, answer.prompt, [answer.completion], answer.chat_template_kwargs
        )
        completion = LabelledCompletion(prompt_ids, ids, answer.desirable, other_ids=[])
        return completion, [BOUNDARY_MOVED] * moved

    items = _of_each(labelled_answers(rows), ids_of, max_length, drop_long)
    # Another prompt's completion is known only now: `labelled_completions` fills other_ids.
    return labelled_completions(
        [(item.prompt_ids, item.completion_ids, item.desirable) for item in items], max_length
    )


BOUNDARY_MOVED = (
    "have a prompt whose last tokens change once the answer follows: the answer begins there"
)
ANEW = "have ids of another tokenizer or text: their text was tokenised anew"
LONG = "were dropped: they are longer than the model's context"


def _of_each(items: Sequence, ids_of: Callable, max_length: int, drop_long: bool) -> list:
    """`ids_of` each item, errors with the item's place, too long ones refused or dropped."""
    kept, notes = [], Counter()
    for i, item in enumerate(items, start=1):
        where = item.where or f"pair {i}"
        try:
            ids, its_notes = ids_of(item)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error.__cause__
        length = max(len(prompt) + len(completion) for prompt, completion in ids.rows)
        if length <= max_length:
            kept.append(ids)
        elif not drop_long:
            raise DataError(
                f"{where} has {length} tokens, more than the model's context of {max_length}. "
                "Shorten it, or drop such rows (drop_long): cut silently, it would not be what was "
                "preferred."
            )
        notes.update(its_notes if length <= max_length else [LONG])
    if items and not kept:
        raise DataError(f"all {len(items)} rows are longer than the model's context: none is left.")
    for note, count in notes.items():
        warnings.warn(f"{count} of {len(items)} rows {note}.", stacklevel=3)
    return kept


def labelled_completions(
    rows: Sequence[tuple[list[int], list[int], bool]], max_length: int | None = None
) -> list[LabelledCompletion]:
    """`LabelledCompletion`s of rows (prompt ids, completion ids, called good?), each with another
    prompt's completion.

    Neighbours with one prompt are a group. Row k of a group gets completion k (modulo its size) of
    the next group, so that labels do not bias the KL estimate: good and bad completions are
    given alike. The last group gets the first's. Of prompts A, A, B:

        (A, [1], True), (A, [2], False), (B, [3], True)  ->  other_ids [3], [3], [1]

    The other completion is cut where it would pass `max_length` after this prompt: it only serves
    an estimate. Raises DataError where all answer one prompt.
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
        for k, i in enumerate(run):
            room = None if max_length is None else max_length - len(rows[i][0])
            others[i] = rows[following[k % len(following)]][1][:room]
    return [LabelledCompletion(*row, others[i]) for i, row in enumerate(rows)]


def unpaired(
    pairs: Sequence[TokenizedPair], max_length: int | None = None
) -> list[LabelledCompletion]:
    """Each pair as two labelled completions: the chosen is desirable, the rejected is not."""
    rows = [
        (pair.prompt_ids, ids, desirable)
        for pair in pairs
        for ids, desirable in ((pair.chosen_ids, True), (pair.rejected_ids, False))
    ]
    return labelled_completions(rows, max_length)


def text_items(
    texts: Sequence[str], tokenizer, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Texts as (prompt ids, completion ids) for SFT: after the first token, which nothing predicts
    (BOS where the tokenizer adds it), all tokens and EOS; cut to `max_length` tokens.

    Raises DataError for a blank text, and for a tokenizer without EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no EOS: a model that never saw one would never stop.")
    for i, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"text {i} is blank: there is nothing to learn from it.")
    rows = [with_one_eos(_text_ids(tokenizer, text), eos)[:max_length] for text in texts]
    return [(ids[:1], ids[1:]) for ids in rows]


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
    padded = []  # of each sequence the three columns of a `Batch`
    for prompt, completion in sequences:
        pad = [0] * (length - len(prompt) - len(completion))
        columns = (
            prompt + completion,
            [1] * (len(prompt) + len(completion)),
            [0] * len(prompt) + [1] * len(completion),
        )
        padded.append([c + pad if padding_side == "right" else pad + c for c in columns])
    return Batch(*torch.tensor(padded).unbind(1))
