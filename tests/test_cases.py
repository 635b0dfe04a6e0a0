"""The files of tests/cases: what people bring, each with its right outcome."""

import itertools
import json
import warnings
from pathlib import Path

import pytest

from dpo_mini.data import (
    DataError,
    preference_pairs,
    read_prompts,
    read_rows,
    read_texts,
    write_jsonl,
)
from dpo_mini.hub import HubError
from dpo_mini.tokens import tokenize_labelled, tokenize_pairs

CASES = Path(__file__).parent / "cases"
ANIMALS = [
    (
        f"Tell me about animal {i}.",
        f" The animal {i} sleeps by day and hunts by night.",
        f" No idea {i}.",
    )
    for i in range(8)
]
LIST = "list_rejected.jsonl"


def pairs_of(name, split="train"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no case that is read is read with a warning
        return preference_pairs(read_rows(CASES / name, split))


def texts(pairs):
    return [(p.prompt, p.chosen, p.rejected) for p in pairs]


def refused(read, *words):
    with pytest.raises(DataError) as error:
        read()
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence
    return sentence


# --- read: eight animals in every kind of file ---


@pytest.mark.parametrize(
    "name",
    "ok.jsonl crlf.jsonl bom.jsonl utf16.jsonl gz.jsonl.gz array.json table.csv table.parquet "
    "hub_layout".split(),
)
def test_a_file_of_any_kind_is_read(name):
    assert texts(pairs_of(name)) == ANIMALS
    assert [row["_line"] for row in read_rows(CASES / name)] == list(range(1, 9))


def test_a_line_ends_at_a_newline_only():
    expected = [(x, y.replace("sleeps", "sleeps\u2028 and\x85"), z) for x, y, z in ANIMALS]
    assert texts(pairs_of("u2028.jsonl")) == expected


def test_characters_of_several_code_points_come_through(tokenizer):
    pairs = pairs_of("emoji.jsonl")
    assert pairs[0].chosen.endswith(" 👩‍👩‍👧 日本語")
    (ids, *_) = tokenize_pairs(pairs, tokenizer, 128)
    whole = tokenizer.decode(ids.prompt_ids + ids.chosen_ids, skip_special_tokens=True)
    assert whole == pairs[0].prompt + pairs[0].chosen


def test_an_eos_in_the_text_is_the_one_eos(tokenizer):
    ours, plain = (
        tokenize_pairs(pairs_of(name), tokenizer, 64) for name in ("eos_in_text.jsonl", "ok.jsonl")
    )
    assert ours == plain and all(p.chosen_ids.count(0) == 1 for p in ours)


# --- splits ---


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_folder_is_read_by_split(split):
    rows = read_rows(CASES / "splits_folder", split)
    assert len(rows) == 12 and all(row["text"].startswith(split.upper()) for row in rows)


def test_a_split_that_is_not_there_names_those_that_are():
    refused(
        lambda: read_rows(CASES / "splits_folder", "dev"), "no split 'dev'",
        "it has test, train, validation",
    )
    refused(lambda: read_rows(CASES / "hub_layout", "test"), "no split 'test'", "it has train")


def test_train_is_not_train_sft(tmp_path):
    for split in ("train_sft", "test_sft"):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / f"{split}-00000-of-00001.jsonl", [{"text": split}])
    refused(lambda: read_rows(tmp_path), "no split 'train'", "test_sft, train_sft")
    assert [row["text"] for row in read_rows(tmp_path, "train_sft")] == ["train_sft"]


def test_parts_of_a_split_are_read_in_order(tmp_path):
    for i in (1, 0):
        write_jsonl(tmp_path / f"train-0000{i}-of-00002.jsonl", [{"text": str(i)}])
    (tmp_path / "validation").mkdir()
    write_jsonl(tmp_path / "validation" / "0000.jsonl", [{"text": "v"}])
    assert [row["text"] for row in read_rows(tmp_path)] == ["0", "1"]
    assert [row["text"] for row in read_rows(tmp_path, "validation")] == ["v"]
    (tmp_path / "train.csv").write_text("text\nx\n")
    refused(lambda: read_rows(tmp_path), ".csv, .jsonl", "name one file")


def test_a_card_says_which_files_are_which_split(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [{"text": "one"}])
    write_jsonl(tmp_path / "two.jsonl", [{"text": "two"}])
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: two.jsonl\n  - split: test\n    path: one.jsonl\n---\n# Words\n"
    )
    assert [row["text"] for row in read_rows(tmp_path)] == ["two"]
    assert [row["text"] for row in read_rows(tmp_path, "test")] == ["one"]
    refused(lambda: read_rows(tmp_path, "dev"), "dev", "train", "test")
    (tmp_path / "README.md").write_text("# A folder with a plain README\n")
    refused(lambda: read_rows(tmp_path), "no split 'train'", "one, two")


def test_a_folder_that_datasets_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), a)) for a in ANIMALS])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert texts(preference_pairs(read_rows(tmp_path / "one"))) == ANIMALS
    assert texts(preference_pairs(read_rows(tmp_path / "two", "test"))) == ANIMALS[:1]
    refused(lambda: read_rows(tmp_path / "two", "dev"), "no split 'dev'", "train, test")
    refused(lambda: read_rows(tmp_path / "one", "test"), "no split 'test'", "train")


def test_a_file_is_one_split_so_nothing_of_it_is_held_out():
    assert len(read_texts(CASES / "texts.jsonl")) == 40
    refused(lambda: read_texts(CASES / "texts.jsonl", "test"), "no split 'test'", "it has train")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where", "no/where.csv"])
def test_a_missing_file_is_called_a_missing_file(name):
    refused(lambda: read_rows(name), f"{name} is missing", "no such file or folder")


def test_a_name_on_the_hub_without_the_hub():
    with pytest.raises(HubError, match="'owner/name'.*cannot be reached"):
        read_rows("owner/name")


# --- conversations ---


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return [{"role": "assistant", "content": text}]


FRUITS = [([user(f"Name fruit {i}")], says(f"Pear {i}"), says(f"Car {i}")) for i in range(8)]


@pytest.mark.parametrize(
    "name",
    "conv implicit prompt_list_and_full_conversation ultrafeedback conv_dict_answer "
    "sharegpt".split(),
)
def test_one_conversation_in_six_formats(name):
    assert texts(pairs_of(f"{name}.jsonl")) == FRUITS


def test_scores_become_rewards():
    pairs = pairs_of("ultrafeedback.jsonl")
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (8.0, 3.5)


def test_system_messages_and_several_turns():
    (pair, *_) = pairs_of("conv_system.jsonl")
    assert pair.prompt == [{"role": "system", "content": "Be brief."}, user("Name fruit 0")]
    (pair, *_) = pairs_of("conv_multiturn_answer.jsonl")
    assert pair.chosen == [*says("Pear"), user("And?"), *says("Fig")]
    assert pair.rejected == says("Car 0")


def test_a_template_that_refuses_a_role_is_quoted(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    pairs = pairs_of("conv_system.jsonl")
    words = "conv_system.jsonl, line 1", "System role not supported"
    refused(lambda: tokenize_pairs(pairs, chat, 64), *words)
    assert len(tokenize_pairs(pairs_of("conv.jsonl"), chat, 64)) == 8
    refused(lambda: tokenize_pairs(pairs, tokenizer, 64), "line 1", "no chat template")


def test_the_last_turn_of_a_transcript_is_the_completion():
    (pair, *_) = pairs_of("hh.jsonl")
    assert pair.prompt.endswith("\n\nHuman: The red one.\n\nAssistant:")
    assert (pair.chosen, pair.rejected) == (" About 30 metres.", " Look it up.")
    start = "\n\nHuman: Which?\n\nAssistant:"
    (pair,) = preference_pairs([{"chosen": start + " A red one.", "rejected": start + " A blue"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, " A red one.", " A blue")


def test_llama_factorys_rows():
    answer = {"from": "gpt", "value": "Pear"}
    turns = [{"from": "human", "value": "Name a fruit"}]
    row = {"conversations": turns, "chosen": answer, "rejected": {**answer, "value": "Car"}}
    (pair,) = preference_pairs([row])
    assert texts([pair]) == [([user("Name a fruit")], says("Pear"), says("Car"))]
    row = {"instruction": "Say it.", "input": "a", "chosen": " b", "rejected": " c"}
    assert texts(preference_pairs([row])) == [("Say it.\na", " b", " c")]
    refused(lambda: preference_pairs([{**row, "history": [["a", "b"]]}]), "'history'", "messages")


# --- more than a pair in a row ---


def test_several_answers_are_told_how_to_become_pairs():
    rows = read_rows(CASES / LIST)
    sentence = refused(lambda: preference_pairs(rows), "line 1", "holds 2 answers, expected one")
    made = eval(sentence.partition("each: ")[2], {"rows": rows})
    assert len(preference_pairs(made)) == 16


def test_a_ranking_is_told_how_to_become_pairs():
    rows = read_rows(CASES / "ranking.jsonl")
    sentence = refused(lambda: preference_pairs(rows), "line 1", "'chosen' is missing", "ranking")
    made = eval(sentence.partition("pairs: ")[2], {"rows": rows, "itertools": itertools})
    pairs = preference_pairs(made)
    assert len(pairs) == 8 * 3 and (pairs[0].chosen, pairs[0].rejected) == ANIMALS[0][1:]
    assert {p.rejected for p in pairs[:3]} == {" No idea 0.", " x"}


# --- refused with the line, and the value's kind ---


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.jsonl", ["line 4", "'rejected'", "null"]),
        ("nan.jsonl", ["line 4", "'rejected'", "NaN"]),
        ("number.jsonl", ["line 1", "'chosen'", "a number"]),
        ("blank.jsonl", ["line 4", "chosen is blank"]),
        ("reward_text.jsonl", ["line 1", "'chosen_reward'", "finite number, got text"]),
    ],
)
def test_a_value_of_another_kind_is_refused(name, words):
    sentence = refused(lambda: pairs_of(name), name, *words)
    assert "missing" not in sentence


def test_texts_that_are_null_or_missing():
    sentence = refused(lambda: read_texts(CASES / "texts_none.jsonl"), "line 6", "'text'", "null")
    assert "missing" not in sentence
    words = "line 6", "'text' is missing", "'body'"
    refused(lambda: read_texts(CASES / "texts_missing.jsonl"), *words)


def test_repeated_pairs_are_counted():
    with pytest.warns(UserWarning, match="7 of 8 pairs repeat"):
        assert len(preference_pairs(read_rows(CASES / "dups.jsonl"))) == 8


def test_answers_that_begin_with_their_prompt_are_counted():
    with pytest.warns(UserWarning, match="8 of 8 pairs have answers that begin with their prompt"):
        preference_pairs(read_rows(CASES / "prompt_repeated_in_text.jsonl"))


def test_a_prompt_taken_from_plain_texts_is_counted():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.warns(UserWarning, match="1 of 1 pairs have no prompt"):
        (pair,) = preference_pairs([row])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")


# --- lengths ---


def test_a_long_pair_is_refused_by_line_or_dropped_with_a_count(tokenizer):
    pairs = pairs_of("long.jsonl")
    refused(
        lambda: tokenize_pairs(pairs, tokenizer, 128), "long.jsonl, line 6 has", "context of 128"
    )
    with pytest.warns(UserWarning, match="1 of 8 rows were dropped"):
        kept = tokenize_pairs(pairs, tokenizer, 128, drop_long=True)
    assert kept == tokenize_pairs(pairs[:5] + pairs[6:], tokenizer, 128)


def test_nothing_left_is_no_empty_list(tokenizer):
    pairs = pairs_of("long_prompts.jsonl")
    refused(lambda: tokenize_pairs(pairs, tokenizer, 64), "line 1 has", "context of 64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: tokenize_pairs(pairs, tokenizer, 64, drop_long=True), "all 12", "none")


# --- ids ---


def test_ids_are_used_where_they_give_back_the_text(tokenizer):
    pairs = pairs_of("pairs_of_embedded.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenized = tokenize_pairs(pairs, tokenizer, 128)
    for pair, ids in zip(pairs, tokenized):
        assert ids.rows == (
            (pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)
        )  # fmt: skip


def test_an_edited_text_is_tokenised_anew(tokenizer):
    pairs = pairs_of("edited_text_keeps_ids.jsonl")
    edited = [i for i, pair in enumerate(pairs) if "EDITED" in pair.chosen]
    with pytest.warns(UserWarning, match=f"{len(edited)} of {len(pairs)} rows have ids of another"):
        tokenized = tokenize_pairs(pairs, tokenizer, 128)
    for i, (pair, ids) in enumerate(zip(pairs, tokenized)):
        text = tokenizer.decode(ids.chosen_ids, skip_special_tokens=True)
        assert text == pair.chosen and (ids.chosen_ids == pair.chosen_ids) == (i not in edited)


# --- labelled completions ---


@pytest.mark.parametrize("name", ["kto.jsonl", "kto_str_label.jsonl"])
def test_labelled_completions(tokenizer, name):
    rows = read_rows(CASES / name)
    items = tokenize_labelled(rows, tokenizer, 64)
    assert [i.desirable for i in items] == [str(row["label"]) == "True" for row in rows]
    assert tokenizer.decode(items[0].prompt_ids + items[0].completion_ids[:-1]).endswith(
        "Q0? answer 0"
    )


def test_labelled_conversations(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (item, *_) = tokenize_labelled(read_rows(CASES / "kto_conv.jsonl"), chat, 64)
    assert tokenizer.decode(item.prompt_ids) == "<user>Q0?<|endoftext|><assistant>"
    assert tokenizer.decode(item.completion_ids) == " answer 0<|endoftext|>"


def test_one_prompt_is_a_sentence(tokenizer):
    rows = read_rows(CASES / "kto_one_prompt.jsonl")
    refused(lambda: tokenize_labelled(rows, tokenizer, 64), "all completions answer one prompt")


# --- prompts ---


@pytest.mark.parametrize(
    "name, prompts",
    [
        ("prompts_bom.txt", ["This movie", "The plot", "I went"]),
        ("prompts_utf16.txt", ["This movie", "The plot"]),
        ("prompts_u2028.txt", ["This movie\u2028was shot in", "The plot\x0c of it"]),
    ],
)
def test_one_prompt_a_line(name, prompts):
    assert read_prompts(CASES / name) == prompts


def test_prompt_files_that_cannot_be_used(tmp_path):
    refused(lambda: read_prompts(tmp_path / "none.txt"), "none.txt is missing")
    (tmp_path / "p.txt").write_bytes(b"\n  \r\n")
    refused(lambda: read_prompts(tmp_path / "p.txt"), "is empty")
    (tmp_path / "p.txt").write_bytes(b"A\r\n\nCaf\xe9\n")
    refused(lambda: read_prompts(tmp_path / "p.txt"), "line 3", "UTF-8")
    (tmp_path / "p.txt").write_bytes(b"A \r\n\nB")
    assert read_prompts(tmp_path / "p.txt") == ["A ", "B"]


def test_rows_come_back_as_they_were_written(tmp_path):
    for name in ("ultrafeedback.jsonl", "conv_system.jsonl", "pairs_of_embedded.jsonl"):
        pairs = pairs_of(name)
        write_jsonl(tmp_path / name, pairs)
        assert preference_pairs(read_rows(tmp_path / name)) == pairs
        assert "_where" not in (tmp_path / name).read_text()
    json.loads((tmp_path / name).read_text().split("\n")[0])
