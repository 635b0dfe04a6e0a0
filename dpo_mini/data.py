"""The door: rows of any known kind come in, checked preference pairs go out.

Two steps, one after the other. `read_rows` finds the rows of a file, a folder or a data set on the
Hub; `preference_pairs` says of each row what its prompt and its two answers are. Everything that
has no clear meaning is refused here, in a sentence with file and line, and nothing is repaired.
"""

import gzip
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from dpo_mini.hub import HubError, local_or_hub

Text = str | list[dict]  # a text, or a conversation: [{"role": "user", "content": "Hi"}, ...]


class DataError(ValueError):
    """The data cannot be used; the message says what was expected, what came, and where."""


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: of two completions of one prompt, `chosen` was preferred to `rejected`.

    Prompt and completions are three texts, or three lists of messages for a chat template, with
    `chat_template_kwargs` for its further arguments (tools, say).
    Sampled pairs also keep the token ids that were sampled (`*_ids`, EOS included where the sample
    ended), since text that is tokenised again need not give them back. `tokenizer` names whose ids
    they are (`tokens.tokenizer_fingerprint`).
    """

    prompt: Text
    chosen: Text
    rejected: Text
    prompt_ids: list[int] | None = None
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    tokenizer: str | None = None
    chat_template_kwargs: dict | None = field(default=None, repr=False)
    where: str | None = field(default=None, repr=False, compare=False)  # "pairs.jsonl, line 3"


@dataclass(frozen=True)
class LabelledAnswer:
    """One completion of a prompt as text or messages, and whether it was called good;
    `tokens.LabelledCompletion` holds its token ids.
    """

    prompt: Text
    completion: Text
    desirable: bool
    chat_template_kwargs: dict | None = None
    where: str | None = field(default=None, repr=False, compare=False)


# --- rows: a file, a folder or a data set becomes a list of dicts, one for each JSON line ---

JSON, TABLES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz"), (".csv", ".parquet")
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text", "instruction", "input")


def read_rows(source, split: str = "train") -> list[dict]:
    """The rows of one split of `source`, each with its place in "_line" (from 1) and "_where".

    `source`: a file (JSON lines, a JSON array, either of them gzipped, CSV, parquet), which is one
    split named train; a folder of such files; a folder that `datasets` saved; or a data set's name
    on the Hub. Of a folder's files, `train-00000-of-00002.parquet`, `data/train.jsonl` and
    `train/0000.parquet` belong to the split train; `train_sft.parquet` does not.

    Raises DataError for what is not there, a split that is not there, and a file or line that
    cannot be read; HubError for a name that is no file or folder while the Hub cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        splits = {"train": [path]}
    elif path.is_dir() and not _is_for_datasets(path):
        splits = _split_files(path)
    else:
        return _from_datasets(source, split)
    _check_split(source, split, splits)
    kinds = {f.suffix for f in splits[split]}
    if len(kinds) > 1:
        raise DataError(f"{source} holds {split} as {', '.join(sorted(kinds))}: name one file.")
    return [row for file in splits[split] for row in _file_rows(file)]


def _is_for_datasets(folder: Path) -> bool:
    """Whether `datasets` saved the folder, or a card in it says which files are which split."""
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return True
    card = folder / "README.md"
    return card.exists() and "\nconfigs:" in card.read_text("utf-8", "replace").split("\n---")[0]


def _split_files(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        kind = next((k for k in (*JSON[::-1], *TABLES) if path.name.endswith(k)), None)
        if kind is None or any(part.startswith(".") for part in inside.parts):
            continue
        stem = path.name.removesuffix(kind)
        name = re.sub(r"-\d+(-of-\d+(-\w+)?)?$", "", stem)
        splits.setdefault(path.parent.name if name.isdecimal() else name, []).append(path)
    return splits


def _check_split(source, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        have = ", ".join(splits) or "no file that can be read"
        raise DataError(f"{source} has no split {split!r}; it has {have}.")


def _from_datasets(source, split: str) -> list[dict]:
    """What only `datasets` can read: folders that it saved or that have a card, and the Hub."""
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(source)
    named_as_a_file = path.suffix in (*JSON, *TABLES, ".gz", ".txt") or path.is_absolute()
    if not path.is_dir() and (named_as_a_file or str(source).startswith((".", "~"))):
        raise DataError(f"{source} is missing: there is no such file or folder.")
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = load_from_disk(str(path))
            splits = {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved
            _check_split(source, split, splits)
            rows = splits[split].to_list()
        else:
            if not path.is_dir():
                local_or_hub(source, "dataset")
            rows = load_dataset(str(source), split=split).to_list()
    except (DataError, HubError):
        raise
    except Exception as error:  # datasets, pyarrow and the network raise many kinds
        raise DataError(f"{source} cannot be read as split {split!r}: {_reason(error)}") from error
    return _rows_with_places(rows, source)


def _file_rows(path: Path) -> list[dict]:
    if path.suffix in TABLES:
        return _table_rows(path)
    text = decoded(path)
    if text.lstrip().startswith("["):
        rows = _rows_with_places(_parsed(text, str(path)), path)
    else:
        lines = enumerate(text.split("\n"), start=1)  # splitlines() would also cut at U+2028
        places = ((n, f"{path}, line {n}", line) for n, line in lines if line.strip())
        rows = [_row_with_place(_parsed(line, where), n, where) for n, where, line in places]
    if not rows:
        raise DataError(f"{path} is empty: expected one JSON object per line.")
    return rows


def _table_rows(path: Path) -> list[dict]:
    from datasets import load_dataset

    kind, options = path.suffix[1:], {}
    if kind == "csv":  # the word "null" is a text, and so is a prompt of digits
        options = {"keep_default_na": False, "encoding": "utf-8-sig"}
        options["converters"] = dict.fromkeys(TEXT_COLUMNS, str)
    try:
        rows = load_dataset(kind, data_files=[str(path)], split="train", **options).to_list()
    except Exception as error:  # datasets, pandas and pyarrow raise many kinds
        raise DataError(f"{path} cannot be read as {kind}: {_reason(error)}") from error
    if not rows:
        raise DataError(f"{path} is empty: expected at least one row.")
    twice = [c[:-2] for c in rows[0] if c.endswith(".1") and c[:-2] in rows[0] and kind == "csv"]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} stands twice.")
    return _rows_with_places(rows, path)


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _rows_with_places(rows: Sequence, source) -> list[dict]:
    return [_row_with_place(row, n, f"{source}, row {n}") for n, row in enumerate(rows, start=1)]


def _row_with_place(row, number: int, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return {**row, "_line": number, "_where": where}


def decoded(path: Path) -> str:
    """A file's text, unzipped where it is gzipped, of the encoding that its first bytes tell."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}.") from None
    encoding = json.detect_encoding(data)  # UTF-8, -16 or -32, by byte order mark or zero bytes
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"{path}, line {data[: error.start].count(10) + 1}"
        came = f"expected text in {encoding.upper()}, but {error.reason}"
        raise DataError(f"{where}: {came}. Save the file as UTF-8.") from None


def _parsed(text: str, where: str):
    try:
        return json.loads(text, object_pairs_hook=_row_of_unique_keys)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        where, problem = f"{where}{line}, column {error.colno}", error.msg
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:  # a key that stands twice, an integer of thousands of digits
        problem = str(error)
    raise DataError(f"{where}: expected one JSON object and no more; {problem}.")


def _row_of_unique_keys(items: list[tuple]) -> dict:
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        raise DataError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return row


def read_texts(source, split: str = "train", column: str = "text") -> list[str]:
    """The texts of a data set, with IMDb's `<br />` as a space; sources as in `read_rows`.

    Raises DataError for a text that is missing, null, blank or no text.
    """
    texts = []
    for i, row in enumerate(read_rows(source, split), start=1):
        where = _where(row, i)
        if column not in row:
            raise DataError(f"{where}: the column {column!r} is missing; it has {_names(row)}.")
        texts.append(_text(row[column], column, where).replace("<br />", " "))
        if not texts[-1].strip():
            raise DataError(f"{where}: {column!r} is blank: there is nothing to learn from it.")
    return texts


def read_prompts(path) -> list[str]:
    """The prompts of a text file, one a line; blank lines are passed over."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing: expected a text file with one prompt a line.")
    lines = (line.removesuffix("\r") for line in decoded(path).split("\n"))
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} is empty: expected one prompt a line.")
    return prompts


def write_jsonl(path, rows: Iterable) -> None:
    """One JSON object a line, empty fields left out; the file is written whole or not at all."""
    path = Path(path)
    lines = []
    for row in rows:
        if not isinstance(row, dict):
            row = {f.name: getattr(row, f.name) for f in fields(row) if f.compare}
        cells = {k: v for k, v in row.items() if v is not None and not k.startswith("_")}
        lines.append(json.dumps(cells, ensure_ascii=False))
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


# --- pairs: what a row's prompt and answers are ---


def preference_pairs(rows: Sequence[dict]) -> list[PreferencePair]:
    """Rows as checked pairs. A row's `chosen` and `rejected` are texts or lists of messages:

        {"prompt": "This movie", "chosen": " is great.", "rejected": " is bad."}
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [...], "rejected": [...]}
        {"chosen": [prompt and answer], "rejected": [prompt and answer]}     the prompt is implicit

    The prompt may also be LLaMA-Factory's `instruction` and `input`, or `conversations`; messages
    may be ShareGPT's (`from`, `value`); a whole conversation may stand where an answer is expected.
    Raises DataError, naming the row, for all that has no clear meaning. Warns of repeated pairs, of
    answers that begin with their prompt, and of prompts that were taken from plain texts.
    """
    pairs, implicit = [], 0
    for i, row in enumerate(rows, start=1):
        where = _where(row, i)
        ids, stated = _sampled_ids(row, where), _prompt(row, where)
        prompt, (chosen, rejected) = _parts(row, stated, ("chosen", "rejected"), where, bool(ids))
        if chosen == rejected and not ids:
            raise DataError(
                f"{where}: chosen equals rejected; such a pair has no gradient. Drop it."
            )
        rewards = [_reward(row, name, where) for name in ("chosen", "rejected")]
        fingerprint = row.get("tokenizer") if ids else None
        if not isinstance(fingerprint, str | None):
            raise DataError(f"{where}: 'tokenizer' must be text, got {_kind(fingerprint)}.")
        of_ids, options = ids or (None,) * 3, _template_kwargs(row, prompt, where)
        pairs.append(
            PreferencePair(prompt, chosen, rejected, *of_ids, *rewards, fingerprint, options, where)
        )
        implicit += stated is None and isinstance(prompt, str) and not prompt.endswith(ASSISTANT)
    _warn_of(pairs, implicit)
    return pairs


def are_labelled(rows: Sequence[dict]) -> bool:
    """Whether rows are labelled completions (True) or pairs (False).

    All rows are asked. Raises DataError where some are of one kind and some of the other.
    """
    labelled = ["completion" in row and not {"chosen", "rejected"} <= row.keys() for row in rows]
    for i, (row, is_labelled) in enumerate(zip(rows, labelled), start=1):
        if is_labelled != labelled[0]:
            raise DataError(
                f"{_where(row, i)}: expected the same columns as in {_where(rows[0], 1)}, got "
                f"{_names(row)}. Put pairs and labelled completions in files of their own."
            )
    return labelled[:1] == [True]


def labelled_answers(rows: Sequence[dict]) -> list[LabelledAnswer]:
    """Rows with the columns `prompt`, `completion`, `label` (TRL's names; true is desirable) as
    checked answers. Prompt and completion are as in `preference_pairs`.
    """
    answers = []
    for i, row in enumerate(rows, start=1):
        where = _where(row, i)
        prompt, (completion,) = _parts(row, _prompt(row, where), ("completion",), where)
        if "label" not in row:
            raise DataError(f"{where}: 'label' is missing; it has {_names(row)}.")
        label = {"true": True, "false": False}.get(str(row["label"]).lower(), row["label"])
        if label not in (True, False):
            raise DataError(f"{where}: 'label' must be true or false, got {row['label']!r}.")
        options = _template_kwargs(row, prompt, where)
        answers.append(LabelledAnswer(prompt, completion, bool(label), options, where))
    return answers


def as_text(text: Text) -> str:
    """What a text, or a conversation's messages one after the other, say."""
    if isinstance(text, str):
        return text
    return "\n".join(message["content"] or "" for message in text)


def answer_to(prompt: Text, text: str) -> Text:
    """A sampled text as an answer of its prompt's kind: a text, or one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


ASSISTANT = "\n\nAssistant:"  # begins an answer in Anthropic's transcripts
RANKING = (
    " Of a ranking make all pairs: [{'prompt': row['prompt'], 'chosen': a, 'rejected': b} for row "
    "in rows for (i, a), (j, b) in itertools.permutations(zip(row['ranks'], row['responses']), 2) "
    "if i < j]"
)


def _parts(
    row: dict, prompt: Text | None, names: Sequence[str], where: str, sampled=False
) -> tuple[Text, list[Text]]:
    """The prompt and the answers, all of them texts or all lists of messages.

    | prompt   | answers                       | prompt that is returned    | answers returned   |
    |---|---|---|---|
    | none     | two texts                     | the text that both share   | what follows it    |
    | none     | two conversations             | the messages that both share | what follows them |
    | text     | texts                         | as given                   | as given           |
    | text     | messages without a prompt     | a user's message           | as given           |
    | text     | conversations that hold it    | the messages that both share | what follows them |
    | messages | texts                         | as given                   | assistant messages |
    | messages | messages, the prompt's before them or not | as given       | without the prompt's |
    """
    missing = ", ".join(repr(name) for name in names if name not in row)
    if missing:
        wanted = " and ".join(map(repr, names))
        raise DataError(
            f"{where}: expected the columns 'prompt', {wanted}, but {missing} is missing; it has "
            f"{_names(row)}.{RANKING if 'ranks' in row or 'responses' in row else ''}"
        )
    answers = [_text_or_messages(row[name], name, where) for name in names]
    if len({type(answer) for answer in answers}) > 1:
        raise DataError(f"{where}: expected two texts or two lists of messages, got one of each.")
    if prompt is None and len(answers) == 1:
        raise DataError(f"{where}: 'prompt' is missing; it has {_names(row)}.")
    if isinstance(answers[0], str):
        if prompt is None:
            prompt, answers = _without_shared_text(*answers)
        elif not isinstance(prompt, str):
            answers = [answer_to(prompt, text) for text in answers]
    else:
        prompt, answers = _without_prompt(prompt, answers, where)
    for name, answer in zip(names, answers):
        if sampled and isinstance(answer, str):
            continue  # a model may end at once, or write spaces
        if not answer:
            raise DataError(f"{where}: {name} is empty; a completion needs at least one token.")
        said = answer if isinstance(answer, str) else answer[-1]["content"]
        if not (sampled or said is None or said.strip()):
            raise DataError(f"{where}: {name} is blank; a completion needs a word.")
    return prompt, answers


def shared_length(a: Sequence, b: Sequence) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _without_shared_text(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Two texts that hold the prompt too, as TRL 1.16 parts them: where they first differ, before a
    space; in a transcript after the last `Assistant:` that they share.
    """
    end = shared_length(chosen, rejected)
    if ASSISTANT in chosen[:end]:
        end = chosen.rindex(ASSISTANT, 0, end) + len(ASSISTANT)
    elif end == min(len(chosen), len(rejected)):
        end = max(0, end - 1)
    else:
        end -= chosen[:end].endswith(" ")
    return chosen[:end], [chosen[end:], rejected[end:]]


def _without_prompt(
    prompt: Text | None, answers: list[list[dict]], where: str
) -> tuple[list[dict], list[list[dict]]]:
    """Messages whose answers may hold the prompt too: once in all that comes back."""
    shared = []
    if not isinstance(prompt, list):
        # The last message of each is its answer, even where one goes on after the other.
        first, last = answers[0][:-1], answers[-1][:-1]
        shared = first[: shared_length(first, last)]
    if isinstance(prompt, str):
        texts = [message["content"] for message in shared]
        if prompt.strip() not in [text.strip() for text in texts if text]:
            if shared:
                raise DataError(
                    f"{where}: 'prompt' is none of the messages that the answers begin with. "
                    "Leave the column out to take these messages as the prompt."
                )
            shared = [{"role": "user", "content": prompt}]
    prompt = prompt if isinstance(prompt, list) else shared
    if not prompt:
        raise DataError(f"{where}: chosen and rejected begin with no common message: no prompt.")
    rest = [a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in answers]
    for answer in rest:
        if answer and answer[0]["role"] in ("user", "system"):
            raise DataError(
                f"{where}: an answer begins with the role {answer[0]['role']!r}. Expected the "
                "assistant's, or a whole conversation that begins with the prompt's messages."
            )
    return prompt, rest


def _prompt(row: dict, where: str) -> Text | None:
    """The prompt of TRL's or LLaMA-Factory's columns; None where there is none."""
    if "prompt" in row:
        return _text_or_messages(row["prompt"], "prompt", where)
    if "conversations" in row:
        prompt = _text_or_messages(row["conversations"], "conversations", where)
        if row.get("system") and isinstance(prompt, list):
            system = {"role": "system", "content": _text(row["system"], "system", where)}
            prompt = [system, *prompt]
        return prompt
    if "instruction" not in row:
        return None
    for name in ("system", "history"):
        if row.get(name):
            raise DataError(f"{where}: {name!r} is not read beside 'instruction': give messages.")
    parts = [_text(row.get(name) or "", name, where) for name in ("instruction", "input")]
    return "\n".join(part for part in parts if part)


def _text_or_messages(value, name: str, where: str) -> Text:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _text(value, name, where, "text or a list of messages")
    if not value:
        raise DataError(f"{where}: {name!r} is an empty list, expected messages.")
    if all(isinstance(v, str | list) for v in value):
        raise DataError(
            f"{where}: {name!r} holds {len(value)} answers, expected one. Make a pair of each: "
            f"[{{**row, {name!r}: answer}} for row in rows for answer in row[{name!r}]]"
        )
    return [_message(message, name, where) for message in value]


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def _message(message, name: str, where: str) -> dict:
    """A checked message: role and content are texts. ShareGPT's names become the usual ones."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name!r} must hold messages, got {_kind(message)}.")
    message = {k: v for k, v in message.items() if v is not None or k == "content"}
    if "from" in message and "role" not in message:
        role = _text(message.pop("from"), "from", where)
        content = message.pop("value", None)
        message |= {"role": SHAREGPT_ROLES.get(role, role), "content": content}
    if "role" not in message:
        raise DataError(f"{where}: a message in {name!r} has no role; it has {_names(message)}.")
    _text(message["role"], "role", where)
    if not (message.get("tool_calls") and message.get("content") is None):
        if "content" not in message:
            raise DataError(f"{where}: a message in {name!r} has no content.")
        _text(message["content"], "content", where)
    return {"content": None, **message}


def _text(value, name: str, where: str, wanted: str = "text") -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be {wanted}, got {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {name!r} holds half of a surrogate pair (such as \\ud83d alone), which is "
            "no character. Write the file again as UTF-8."
        ) from None
    return value


def _kind(value) -> str:
    """A value's type in the words of JSON."""
    if value is None or value != value:
        return "null" if value is None else "NaN"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _sampled_ids(row: dict, where: str) -> list[list[int]] | None:
    """The three lists of token ids, or None where there are none."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [row.get(name) for name in names]
    if ids == [None] * 3:
        return None
    for name, values in zip(names, ids):
        whole = isinstance(values, list) and all(type(i) is int and 0 <= i < 2**31 for i in values)
        if not (whole and values):
            raise DataError(
                f"{where}: {name!r} must be a list of token ids, as in all three of "
                f"{', '.join(names)}, or in none of them."
            )
    if ids[1] == ids[2]:
        raise DataError(f"{where}: chosen equals rejected, id for id. Drop the row.")
    return ids


def _reward(row: dict, name: str, where: str) -> float | None:
    """The reward of one side, also under UltraFeedback's name."""
    for column in (f"{name}_reward", f"score_{name}"):
        value = row.get(column)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or abs(value) > 1e300 or not math.isfinite(value):
            raise DataError(f"{where}: {column!r} must be a finite number, got {_kind(value)}.")
        return value
    return None


def _template_kwargs(row: dict, prompt: Text, where: str) -> dict | None:
    """Further arguments of the chat template, from TRL's columns."""
    if isinstance(prompt, str):
        return None
    options, tools = row.get("chat_template_kwargs") or {}, row.get("tools")
    if not isinstance(options, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, got {_kind(options)}.")
    if tools:
        options = {"tools": _parsed(tools, where) if isinstance(tools, str) else tools, **options}
    return options or None


def _where(row, number: int) -> str:
    if not isinstance(row, dict):
        raise DataError(f"row {number}: expected columns, got {_kind(row)}.")
    return row.get("_where") or f"row {number}"


def _names(row: dict) -> str:
    return ", ".join(repr(name) for name in row if not str(name).startswith("_")) or "none"


def _warn_of(pairs: Sequence[PreferencePair], implicit: int) -> None:
    different = {(repr(p.prompt), repr(p.chosen), repr(p.rejected)) for p in pairs}
    texts = [p for p in pairs if isinstance(p.prompt, str) and p.prompt.strip()]
    begin = sum(p.chosen.startswith(p.prompt) and p.rejected.startswith(p.prompt) for p in texts)
    for count, what in (
        (len(pairs) - len(different), "repeat an earlier pair: they count twice"),
        (begin, "have answers that begin with their prompt: the model reads it twice"),
        (implicit, "have no prompt: the beginning that both texts share was taken"),
    ):
        if count:
            warnings.warn(f"{count} of {len(pairs)} pairs {what}.", stacklevel=3)
