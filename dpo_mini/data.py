"""Preference pairs: reading, checking, tokenising, batching. What passes is not checked again."""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.hub import local_or_hub


class DataError(ValueError):
    """The data cannot be used; the message says what was expected, what came, and where."""


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: of two completions of one prompt, `chosen` was preferred to `rejected`.

    Sampled pairs also keep the token ids that were sampled (`*_ids`, EOS included where the sample
    ended), since text that is tokenised again need not give them back; the text is then for reading
    only.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int] | None = None
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None


@dataclass(frozen=True)
class TokenizedPair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class LabelledCompletion:
    """One completion and whether it was called good, for losses that need no pairs."""

    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool
    other_ids: list[int]  # another prompt's completion, for KTO's estimate of the KL


def read_rows(source, split: str = "train") -> list[dict]:
    """The rows of a JSONL file, a folder of parquet files or a data set on the Hub.

    Raises DataError for a line that is no JSON object, with its number, and HubError for a name
    that is no file or folder while the Hub cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        return _read_jsonl(path)
    from datasets import load_dataset

    if path.is_dir():
        files = sorted(str(f) for f in path.glob(f"{split}*.parquet"))
        if not files:
            raise DataError(f"{path} holds no file {split}*.parquet: expected one or more a split.")
        return list(load_dataset("parquet", data_files=files, split="train"))
    local_or_hub(source, "dataset")
    return list(load_dataset(str(source), split=split))


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            where = f"{path}, line {number}, column {error.colno}"
            raise DataError(
                f"{where}: expected one JSON object and no more; {error.msg}."
            ) from None
        if not isinstance(row, dict):
            came = type(row).__name__
            raise DataError(f"{path}, line {number}: expected a JSON object, got {came}.")
        rows.append({**row, "_line": number})
    if not rows:
        raise DataError(f"{path} is empty: expected one JSON object per line.")
    return rows


def read_texts(source, split: str = "train", column: str = "text") -> list[str]:
    """The texts of a data set, with IMDb's `<br />` as a space; sources as in `read_rows`."""
    rows = read_rows(source, split)
    if column not in rows[0]:
        raise DataError(f"{source} has no column {column!r}; it has {', '.join(rows[0])}.")
    return [row[column].replace("<br />", " ") for row in rows]


def write_jsonl(path, rows: Iterable) -> None:
    """One JSON object a line, empty fields left out; the file is written whole or not at all."""
    path = Path(path)
    lines = []
    for row in rows:
        cells = row if isinstance(row, dict) else asdict(row)
        cells = {name: value for name, value in cells.items() if value is not None}
        lines.append(json.dumps(cells, ensure_ascii=False))
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def preference_pairs(rows: Sequence[dict], tokenizer=None) -> list[PreferencePair]:
    """Rows with the columns `prompt`, `chosen`, `rejected` (TRL's names), checked, as pairs.

    A column holds text, or a list of messages `{"role": ..., "content": ...}`, which the
    tokenizer's chat template turns into text. Raises DataError for a missing column, an empty
    completion, chosen equal to rejected, or messages without a template, naming the row.
    """
    pairs = []
    for i, row in enumerate(rows):
        where = f"line {row['_line']}" if "_line" in row else f"row {i}"
        missing = [c for c in ("prompt", "chosen", "rejected") if row.get(c) is None]
        if missing:
            have = ", ".join(repr(k) for k in row if k != "_line") or "none"
            raise DataError(
                f"{where}: expected the columns 'prompt', 'chosen' and 'rejected', but "
                f"{', '.join(map(repr, missing))} is missing; it has {have}."
            )
        prompt, chosen, rejected = _as_text(row, tokenizer, where)
        others = {f.name: row.get(f.name) for f in fields(PreferencePair)[3:]}
        pair = PreferencePair(prompt, chosen, rejected, **others)
        for name in ("chosen", "rejected"):
            if not getattr(pair, f"{name}_ids") and not getattr(pair, name):
                raise DataError(f"{where}: {name} is empty; a completion needs at least one token.")
        if (chosen, pair.chosen_ids) == (rejected, pair.rejected_ids):
            raise DataError(
                f"{where}: chosen equals rejected; such a pair has no gradient. Drop it."
            )
        pairs.append(pair)
    return pairs


def _as_text(row, tokenizer, where) -> tuple[str, str, str]:
    columns = [row[c] for c in ("prompt", "chosen", "rejected")]
    if all(isinstance(c, str) for c in columns):
        return tuple(columns)
    if not all(isinstance(c, list) for c in columns):
        kinds = ", ".join(type(c).__name__ for c in columns)
        raise DataError(f"{where}: expected three texts or three lists of messages, got {kinds}.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: messages, but the tokenizer has no chat template; use plain text."
        )
    render = tokenizer.apply_chat_template
    prompt = render(columns[0], tokenize=False, add_generation_prompt=True)
    texts = [render(columns[0] + answer, tokenize=False) for answer in columns[1:]]
    if not all(text.startswith(prompt) for text in texts):
        raise DataError(f"{where}: the template changes the prompt once an answer follows it.")
    return prompt, texts[0][len(prompt) :], texts[1][len(prompt) :]


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
