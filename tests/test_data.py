"""The door: what is refused, with which words, and how text becomes tokens."""

import copy
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from dpo_mini.curation import pairs_from_samples
from dpo_mini.data import DataError, PreferencePair, preference_pairs, read_rows, write_jsonl
from dpo_mini.sampling import Completion
from dpo_mini.tokens import (
    LabelledCompletion,
    TokenizedPair,
    collate,
    labelled_completions,
    tokenize_labelled,
    tokenize_pairs,
    tokenize_prompt,
    unpaired,
)

ROW = {"prompt": "This movie", "chosen": " was great.", "rejected": " was dull."}


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "a", "chosen": "b"\n', ["line 1", "expected one JSON object"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n[1, 2]\n', ["line 2", "got list"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": 1,}\n', ["line 3"]),
        ("", ["empty"]),
        ("\n\n", ["empty"]),
    ],
)
def test_malformed_jsonl_is_told_with_its_line(tmp_path, content, words):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert all(word in str(error.value) for word in words)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "change, words",
    [
        ({"chosen": None}, ["'chosen' is missing", "line 2"]),
        ({"rejected": ""}, ["rejected is empty"]),
        ({"rejected": " was great."}, ["chosen equals rejected"]),
        ({"chosen": [{"role": "assistant", "content": "x"}]}, ["two texts or two lists"]),
        ({"prompt": 3, "chosen": 4, "rejected": 5}, ["line 2", "'prompt' must be text"]),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, change, words):
    path = tmp_path / "pairs.jsonl"
    row = {k: v for k, v in {**ROW, **change}.items() if v is not None}
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        preference_pairs(read_rows(path))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_pairs_survive_a_round_trip(tmp_path):
    pair = PreferencePair(
        "This", " wäs\nfine", " was \u2028 not", [0, 5], [6, 0], [7, 8], 1.5, -0.25
    )
    write_jsonl(tmp_path / "p.jsonl", [pair])
    assert preference_pairs(read_rows(tmp_path / "p.jsonl")) == [pair]


def test_text_pairs_begin_with_bos_and_end_with_one_eos(tokenizer):
    (ids,) = tokenize_pairs(preference_pairs([ROW]), tokenizer, 64)
    assert ids.prompt_ids == tokenizer("This movie")["input_ids"]
    assert ids.prompt_ids[0] == 0 and 0 not in ids.prompt_ids[1:]
    assert ids.prompt_ids + ids.chosen_ids == [*tokenizer("This movie was great.")["input_ids"], 0]
    twice = {**ROW, "chosen": " was great.<|endoftext|>", "prompt": "<|endoftext|>This movie"}
    (again,) = tokenize_pairs(preference_pairs([twice]), tokenizer, 64)
    assert again == ids


def test_an_empty_prompt_is_bos_alone(tokenizer):
    assert tokenize_prompt(tokenizer, "") == [0]
    without_bos = copy.deepcopy(tokenizer)
    without_bos.backend_tokenizer.post_processor = TemplateProcessing("$A", special_tokens=[])
    assert tokenize_prompt(without_bos, "") == [0]
    without_bos.bos_token = None
    with pytest.raises(DataError, match="no BOS"):
        tokenize_prompt(without_bos, "")
    assert tokenize_prompt(without_bos, "This") == without_bos("This")["input_ids"] == [956]


def test_a_merge_across_the_boundary_is_counted_and_loses_no_character(tokenizer):
    row = {"prompt": "This mov", "chosen": "ie was fine", "rejected": "es"}
    with pytest.warns(UserWarning, match="1 of 1 rows have a prompt whose last tokens change"):
        (ids,) = tokenize_pairs(preference_pairs([row]), tokenizer, 64)
    assert ids.prompt_ids == tokenizer("This")["input_ids"]
    assert tokenizer.decode(ids.prompt_ids[1:] + ids.chosen_ids[:-1]) == "This movie was fine"
    assert tokenizer.decode(ids.prompt_ids[1:] + ids.rejected_ids[:-1]) == "This moves"


def test_a_pair_longer_than_the_context_is_refused_not_cut(tokenizer):
    with pytest.raises(DataError, match="more than the model's context of 8"):
        tokenize_pairs(preference_pairs([{**ROW, "chosen": " great" * 20}]), tokenizer, 8)


def test_sampled_ids_are_kept_where_the_text_would_be_tokenised_otherwise(tokenizer):
    a, b = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("mov", "ie"))
    pair = PreferencePair("This", "movie", "b", [0, 956], [*a, *b], [66, 0])
    assert tokenizer("movie", add_special_tokens=False)["input_ids"] != [*a, *b]
    (ids,) = tokenize_pairs([pair], tokenizer, 16)
    assert (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids) == ([0, 956], [*a, *b], [66, 0])


def test_conversations_pass_through_the_chat_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "Review it."}],
        "chosen": [{"role": "assistant", "content": "Great."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
    }
    pairs = preference_pairs([row])
    assert vars(pairs[0]).items() >= row.items()
    (ids,) = tokenize_pairs(pairs, chat, 64)
    assert tokenizer.decode(ids.prompt_ids) == "<user>Review it.\n<assistant>"
    assert tokenizer.decode(ids.chosen_ids) == "Great.\n"
    assert tokenizer.decode(ids.rejected_ids) == "Bad.\n"
    with pytest.raises(DataError, match="row 1: messages, but the tokenizer has no chat template"):
        tokenize_pairs(pairs, tokenizer, 64)
    assert 0 not in ids.prompt_ids  # this template writes no BOS, so there is none


LABELLED = [
    {"prompt": "This movie", "completion": " was great.", "label": True},
    {"prompt": "The plot", "completion": " made no sense.", "label": False},
]


def test_labelled_rows_are_tokenised_like_pairs(tokenizer):
    first, second = tokenize_labelled(LABELLED, tokenizer, 64)
    (pair,) = tokenize_pairs(preference_pairs([ROW]), tokenizer, 64)
    assert (first.prompt_ids, first.completion_ids) == (pair.prompt_ids, pair.chosen_ids)
    assert (first.desirable, second.desirable) == (True, False)
    assert first.other_ids == second.completion_ids and second.other_ids == first.completion_ids
    row = {"prompt": "This mov", "completion": "ie was fine", "label": True}
    with pytest.warns(UserWarning, match="1 of 2 rows have a prompt whose last tokens change"):
        tokenize_labelled([row, LABELLED[1]], tokenizer, 64)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"completion": None}, ["line 2", "'completion' is missing"]),
        ({"completion": "  "}, ["line 2", "completion is blank"]),
        ({"completion": ""}, ["line 2", "completion is empty"]),
        ({"prompt": 7}, ["line 2", "'prompt' must be text or a list of messages, got a number"]),
        ({"prompt": None}, ["line 2", "'prompt' is missing"]),
        ({"label": "yes"}, ["line 2", "'label' must be true or false, got 'yes'"]),
        ({"label": None}, ["line 2", "'label' is missing"]),
        ({"label": 2}, ["line 2", "got 2"]),
        ({"completion": " great" * 30}, ["line 2 has", "more than the model's context of 16"]),
        ({"prompt": "This movie"}, ["all completions answer one prompt"]),
    ],
)
def test_bad_labelled_rows_are_refused_with_their_line(tmp_path, tokenizer, change, words):
    path = tmp_path / "labelled.jsonl"
    row = {k: v for k, v in {**LABELLED[1], **change}.items() if v is not None}
    path.write_text(json.dumps(LABELLED[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        tokenize_labelled(read_rows(path), tokenizer, 16)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_labelled_completion_gets_the_next_one_of_another_prompt():
    """Of any list of prompts, in runs of any length, around the end too."""
    generator = torch.Generator().manual_seed(0)

    def number(high):
        return int(torch.randint(high, (), generator=generator))

    refused = 0
    for _ in range(400):
        prompts = [[number(3)] for _ in range(1 + number(5)) for _ in range(1)]
        prompts = [prompt for prompt in prompts for _ in range(1 + number(4))]  # runs
        rows = [(prompt, [100 + i], number(2) == 1) for i, prompt in enumerate(prompts)]
        if len({p[0] for p in prompts}) == 1:
            refused += 1
            with pytest.raises(DataError, match="all completions answer one prompt"):
                labelled_completions(rows)
            continue
        items = labelled_completions(rows)
        assert [(i.prompt_ids, i.completion_ids, i.desirable) for i in items] == rows
        for i, item in enumerate(items):
            after = [(i + k) % len(rows) for k in range(1, len(rows))]
            start = next(k for k, j in enumerate(after) if rows[j][0] != item.prompt_ids)
            (end,) = [k for k, j in enumerate(after) if rows[j][1] == item.other_ids]
            between = [rows[j][0] for j in after[start : end + 1]]
            assert between and all(prompt == between[0] for prompt in between)  # the next run
    assert 10 < refused < 390


def test_no_labelled_completions_are_no_crash():
    with pytest.raises(DataError):
        labelled_completions([])


def test_a_pair_is_two_labelled_completions():
    pairs = [TokenizedPair([1], [2, 0], [3, 0]), TokenizedPair([4], [5, 0], [6, 0])]
    assert unpaired(pairs) == [
        LabelledCompletion([1], [2, 0], True, [5, 0]),
        LabelledCompletion([1], [3, 0], False, [6, 0]),
        LabelledCompletion([4], [5, 0], True, [2, 0]),
        LabelledCompletion([4], [6, 0], False, [3, 0]),
    ]


def test_collate_pads_either_side_and_masks_completions():
    rows = [([0, 1], [2, 3]), ([0], [4])]
    right, left = collate(rows), collate(rows, "left")
    assert right.input_ids.tolist() == [[0, 1, 2, 3], [0, 4, 0, 0]]
    assert right.completion_mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert left.input_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert left.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def samples(n=3):
    return [[Completion("p", f"t{i}", [0], [i + 1]) for i in range(n)]]


def test_all_pairs_of_a_prompt_the_higher_reward_chosen_and_ties_dropped():
    pairs, ties = pairs_from_samples(samples(4), torch.tensor([0.1, 0.9, 0.5, 0.9]))
    assert len(pairs) == 5 and ties == 1
    assert all(p.chosen_reward > p.rejected_reward for p in pairs)


def test_bradley_terry_labels_err_as_often_as_the_reward_says():
    many = samples(2) * 4000
    pairs, _ = pairs_from_samples(
        many, torch.tensor([0.0, 1.0]).repeat(4000), "bradley-terry", seed=3
    )
    right = sum(p.chosen_reward > p.rejected_reward for p in pairs) / 4000
    expected = 1 / (1 + 2.718281828**-1)
    assert abs(right - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_a_folder_without_data_is_told(tmp_path):
    with pytest.raises(DataError, match="no split 'train'; it has no file that can be read"):
        read_rows(tmp_path)
