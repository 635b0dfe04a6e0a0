"""Damaged rows and files through the door: a sentence or a sound pair, never a traceback.

DPO_MINI_FUZZ=200000 asks for as many rows; the seed is fixed, so a failure comes back.
"""

import copy
import gzip
import json
import os
import random
import warnings
from pathlib import Path

import pytest

from dpo_mini.data import DataError, preference_pairs, read_prompts, read_rows, read_texts
from dpo_mini.tokens import tokenize_labelled, tokenize_pairs

ROWS = int(os.environ.get("DPO_MINI_FUZZ", 10_000))
CASES = Path(__file__).parent / "cases"
BYTES = b"", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\n", b"\r", b"\x1f\x8b", b"{", b"\xe2\x80"
DEEP = "[" * 3000 + "]" * 3000


def message(role, content):
    return {"role": role, "content": content}


VALUES = [
    None, True, False, 0, 1, -1, 3.5, 10**30, -(10**350), float("nan"), float("inf"),
    "", " ", "\n", "\u2028", "\ud83d", "x\udc00y", "\x00", "<|endoftext|>", "True", "12",
    "a" * 2000, [], {}, [[]], [{}], [None], [True], [0], [-1], [8191], [8192], [2**40], [1.0],
    ["a"], ["a", "b"], message("assistant", "Pear"), [message("assistant", "Pear")],
    [message("user", "Pear")],
    [message("assistant", None)], [message("assistant", "")], [message("owl", "Pear")],
    [message("assistant", [{"type": "text", "text": "Pear"}])], [message(["assistant"], "Pear")],
    [message("user", "Name"), message("assistant", "Pear")], [{"from": "gpt", "value": "Pear"}],
    [{"from": ["gpt"], "value": "Pear"}], [{"from": "gpt"}], [{"role": "assistant"}],
    [{**message("assistant", None), "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
    {"enable_thinking": False}, {"messages": 1}, {"tokenize": True}, {"chat_template": 3},
    {"chat_template": "{{ x.y.z }}"}, {"return_dict": True}, {"continue_final_message": True}, "{{ oops",
]  # fmt: skip
NAMES = (
    "prompt chosen rejected completion label prompt_ids chosen_ids rejected_ids chosen_reward "
    "rejected_reward score_chosen tokenizer tools chat_template_kwargs instruction input history "
    "system conversations role content from value tool_calls _line _where extra \ud800"
).split()


def seeds() -> list[dict]:
    rows = []
    for path in sorted(CASES.glob("*.json*")):
        rows += read_rows(path)[:2] if "texts" not in path.name else []
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def places(value, path=()):
    """The paths to all values inside."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def damaged(row: dict, draw: random.Random) -> str:
    """The row as a line of JSON, after one to three changes of its values or its text."""
    row = copy.deepcopy(row)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *start, last = draw.choice([path for path in places(row) if path] or [("prompt",)])
        inside = row
        for key in start:
            inside = inside[key]
        change = draw.random()
        if change < 0.5:
            inside[last] = copy.deepcopy(draw.choice(VALUES))
        elif change < 0.65:
            del inside[last]
        elif change < 0.8:
            row[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        elif isinstance(inside, dict):
            inside[draw.choice(NAMES)] = inside.pop(last)
        else:
            inside.append(copy.deepcopy(inside[last]))
    line = json.dumps(row)
    if draw.random() < 0.25:
        i, j = sorted(draw.randrange(len(line)) for _ in range(2))
        line = draw.choice(
            [
                line[:i] + line[j:],
                line[:j] + line[i:],
                line[:i],
                line[:i] + draw.choice('{}[]",:\\0e9') + line[i:],
                line.replace('": ', f'": {DEEP}, "x": ', 1),
                line.replace('": ', '": ' + "9" * 5000, 1),
            ]
        )
    return line


def chat_tokenizer(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'owl' %}{{ raise_exception('No owls') }}{% endif %}"
        "<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return chat


def sound(ids, tokenizer) -> bool:
    known = range(len(tokenizer))
    rows = ids.rows
    return all(p and c and all(type(i) is int and i in known for i in p + c) for p, c in rows)


def through_the_door(path: Path, tokenizer) -> str:
    """Either "read" or "refused"; anything else is raised."""
    try:
        rows = read_rows(path)
        if any("completion" in row or "label" in row for row in rows):
            other = {"prompt": "Another?", "completion": " Yes.", "label": True}
            if not isinstance(rows[0].get("prompt"), str):
                other["prompt"] = [message("user", "Another?")]
            items = tokenize_labelled([*rows, other], tokenizer, 128)
        else:
            pairs = preference_pairs(rows)
            for pair in pairs:
                rewards = (pair.chosen_reward, pair.rejected_reward)
                assert all(r is None or abs(r) < 1e301 for r in rewards)
            items = tokenize_pairs(pairs, tokenizer, 128)
            assert all(item.chosen_ids != item.rejected_ids for item in items)
        assert all(sound(item, tokenizer) for item in items)
        return "read"
    except DataError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence
        sentence.encode()  # a console can show it
        return "refused"


def test_damaged_rows_are_refused_in_a_sentence_or_read(tmp_path, tokenizer):
    chat, draw, rows, outcomes = chat_tokenizer(tokenizer), random.Random(14), seeds(), []
    path = tmp_path / "pairs.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(ROWS):
            line = damaged(draw.choice(rows), draw)
            path.write_text(line)
            try:
                outcomes.append(through_the_door(path, chat))
            except BaseException as error:
                pytest.fail(f"row {i}: {type(error).__name__}: {error}; {line[:500]}")
    share = outcomes.count("read") / len(outcomes)
    assert 0.1 < share < 0.9, share  # neither is everything refused nor everything read


def test_damaged_files_are_refused_in_a_sentence_or_read(tmp_path, tokenizer):
    chat, draw, outcomes = chat_tokenizer(tokenizer), random.Random(15), []
    files = [p for p in sorted(CASES.glob("*.*")) if p.suffix not in (".parquet", ".csv", ".md")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(ROWS // 10):
            source = draw.choice(files)
            data = bytearray(source.read_bytes())
            for _ in range(draw.choice((1, 2, 8))):
                k = draw.randrange(len(data) + 1)
                data[k : k + draw.choice((0, 1, 1, 40))] = draw.choice(BYTES)
            if draw.random() < 0.1:
                data = gzip.compress(bytes(data))[: draw.choice((None, -5, 9))]
            path = tmp_path / source.name
            path.write_bytes(bytes(data))
            try:
                if source.suffix == ".txt" or "texts" in source.name:
                    try:
                        (read_prompts if source.suffix == ".txt" else read_texts)(path)
                    except DataError as error:
                        outcomes.append("refused")
                        assert "\n" not in str(error)
                else:
                    outcomes.append(through_the_door(path, chat))
            except BaseException as error:
                pytest.fail(f"file {i}, {source.name}: {type(error).__name__}: {error}")
    assert {"read", "refused"} == set(outcomes)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_damaged_tables_are_refused_in_a_sentence_or_read(tmp_path, tokenizer, name):
    draw, outcomes = random.Random(16), set()
    whole = (CASES / name).read_bytes()
    for i in range(12):
        k = draw.randrange(len(whole))
        data = [whole[:k], whole[:k] + b'\xff"' + whole[k:], whole[:k] + b"," + whole[k:]][i % 3]
        path = tmp_path / f"{i}-{name}"
        path.write_bytes(data)
        outcomes.add(through_the_door(path, tokenizer))
    assert "refused" in outcomes
