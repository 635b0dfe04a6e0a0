"""The door: rows of any known kind come in, checked preference pairs go out."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
