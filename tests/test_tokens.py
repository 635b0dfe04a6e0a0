"""The ids: TRL 1.16's own, of every kind of row under every kind of tokenizer."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_mini.data import DataError, PreferencePair, preference_pairs
from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.tokens import (
    completion_text,
    prompt_and_answers,
    text_items,
    tokenize_labelled,
    tokenize_pairs,
    tokenize_prompt,
    tokenizer_fingerprint,
    with_one_eos,
)

GPT2 = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "gpt2"
CORPUS = [
    "Name a fruit. Pear. Car. Be brief. The plot was great and moving, this movie was dull.",
    "Human: How tall is it? Assistant: About thirty metres. And? Fig. user assistant system model",
] * 20

# --- six kinds of tokenizer, and a seventh whose template thinks ---

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def trls_template(name: str) -> str:
    trl = pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def made(kind: str, special: list[str], bos: str | None, eos: str, template=None, adds_bos=False):
    """A tokenizer of the kind "bytes" (GPT-2, Llama 3, Qwen), "metaspace" (Llama 2) or "gemma"."""
    tokenizer = Tokenizer(models.BPE(unk_token=special[0], byte_fallback=kind != "bytes"))
    alphabet = [f"<0x{i:02X}>" for i in range(256)] if kind != "bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + alphabet, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [],
    )  # fmt: skip
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            fallback.append(decoders.Strip(" ", 1, 0))
        else:
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(fallback)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        place = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=place)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def make_tokenizer(name: str):
    im, turns = ["<|im_start|>", "<|im_end|>"], ["<start_of_turn>", "<end_of_turn>"]
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    deep = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    if name == "gpt2":
        if not GPT2.is_dir():
            pytest.skip("GPT-2's tokenizer is not beside the project")
        return AutoTokenizer.from_pretrained(GPT2)
    return {
        "embedded": lambda: AutoTokenizer.from_pretrained(EMBEDDED_FOLDER / "model"),
        "llama": lambda: made(
            "bytes", headers, headers[0], headers[3], trls_template("llama3"), adds_bos=True
        ),
        "chatml": lambda: made("bytes", im, *im, CHATML),
        "zephyr": lambda: made("metaspace", ["<s>", "</s>"], "<s>", "</s>", ZEPHYR, adds_bos=True),
        "gemma": lambda: made(
            "gemma", ["<bos>", "<eos>", *turns], "<bos>", "<eos>", trls_template("gemma"), True
        ),
        "metaspace": lambda: made("metaspace", ["<s>", "</s>"], "<s>", "</s>", adds_bos=True),
        "thinking": lambda: made(
            "bytes", [*im, "<think>", "</think>"], None, im[1], trls_template("qwen3")
        ),
        "r1": lambda: made(
            "bytes", [*deep, "<think>"], *deep, trls_template("deepseek_r1_distill"), adds_bos=True
        ),
    }[name]()  # fmt: skip


TOKENIZERS = "gpt2 embedded llama chatml zephyr gemma metaspace thinking r1".split()


@pytest.fixture(scope="module", params=TOKENIZERS)
def named(request):
    return request.param, make_tokenizer(request.param)


# --- kinds of row ---


def user(text, role="user"):
    return {"role": role, "content": text}


def says(text):
    return user(text, "assistant")


TOOL = {
    "type": "function",
    "function": {"name": "weigh", "description": "Weigh it.", "parameters": {"type": "object"}},
}
PLAIN = {
    "plain": {"prompt": "This movie", "chosen": " was great.", "rejected": " was dull."},
    "space before": {"prompt": "This movie ", "chosen": "was great.", "rejected": "was dull."},
    "merge": {"prompt": "This mov", "chosen": "ie was great.", "rejected": "ing."},
    "eos typed": {"prompt": "This movie", "chosen": " was great.EOS", "rejected": " was dull."},
    "eos and newline": {"prompt": "This movie", "chosen": " great.EOS\n", "rejected": " dull."},
    "bos typed": {"prompt": "BOSThis movie", "chosen": " was great.", "rejected": " was dull."},
    "other writing": {"prompt": "Name 果物", "chosen": " 梨 👩‍👧", "rejected": " 車"},
    "newlines": {"prompt": "Name a fruit.\n\n", "chosen": "Pear.\n", "rejected": "\n\nCar.  "},
    "no prompt": {"prompt": "", "chosen": "This movie", "rejected": "The plot"},
    "implicit": {"chosen": "This movie was great.", "rejected": "This movie was dull."},
    "transcript": {
        "chosen": "\n\nHuman: How tall?\n\nAssistant: About thirty.",
        "rejected": "\n\nHuman: How tall?\n\nAssistant: Look it up.",
    },
    "transcript, one start": {
        "chosen": "\n\nHuman: How tall?\n\nAssistant: About thirty.",
        "rejected": "\n\nHuman: How tall?\n\nAssistant: About it.",
    },
}
FRUIT, PEAR, CAR = [user("Name a fruit.")], [says("Pear.")], [says("Car.")]
CHAT = {
    "chat": {"prompt": FRUIT, "chosen": PEAR, "rejected": CAR},
    "system": {"prompt": [user("Be brief.", "system"), *FRUIT], "chosen": PEAR, "rejected": CAR},
    "turns before": {
        "prompt": [*FRUIT, *PEAR, user("And?")], "chosen": [says("Fig.")], "rejected": CAR,
    },
    "turns in the answer": {
        "prompt": FRUIT, "chosen": [*PEAR, user("And?"), says("Fig.")], "rejected": CAR,
    },
    "implicit chat": {"chosen": FRUIT + PEAR, "rejected": FRUIT + CAR},
    "without thinking": {
        "prompt": FRUIT, "chosen": PEAR, "rejected": CAR,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "tools": {"prompt": FRUIT, "chosen": PEAR, "rejected": CAR, "tools": [TOOL]},
    "thoughts": {
        "prompt": FRUIT, "chosen": [says("<think>\nA pear\n</think>\n\nPear.")], "rejected": CAR,
    },
    "full conversation": {"prompt": FRUIT, "chosen": FRUIT + PEAR, "rejected": FRUIT + CAR},
}  # fmt: skip
ROWS = PLAIN | CHAT

# Where the ids are not TRL's, on purpose, and why.
NO_BOS = "an empty prompt is BOS alone, or refused: TRL leaves the first token without a prediction"
DIFFERENT = {
    **{(name, "no prompt"): NO_BOS for name in ("gpt2", "chatml", "thinking")},
    **{
        (name, "eos and newline"): "one EOS: TRL adds a second one after the newline"
        for name in TOKENIZERS
    },
    **{
        (name, "bos typed"): "one BOS: TRL keeps the typed one beside the tokenizer's"
        for name in ("embedded", "llama", "zephyr", "gemma", "metaspace", "r1")
    },
    **{
        (name, "transcript, one start"): "the answer is the whole turn: TRL's begins inside it"
        for name in TOKENIZERS
    },
    **{
        (name, "full conversation"): "the prompt is there once: TRL repeats it"
        for name in TOKENIZERS
    },
}  # fmt: skip


def typed(row: dict, tokenizer) -> dict:
    """The row with the tokenizer's own EOS and BOS in place of the words."""
    def put(text):
        bos = tokenizer.bos_token or ""
        return text.replace("EOS", tokenizer.eos_token).replace("BOS", bos)

    return {k: put(v) if isinstance(v, str) else v for k, v in row.items()}


def trls_ids(row: dict, tokenizer, kto=False) -> list[tuple[list[int], ...]]:
    """What TRL's trainer makes of the row, as (prompt, chosen, rejected) or (prompt, completion)."""
    trl = pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")
    import datasets
    from accelerate import PartialState

    PartialState()
    datasets.disable_progress_bars()
    trainer = trl.KTOTrainer if kto else trl.DPOTrainer
    me = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    whole = {"max_length": None, "truncation_mode": "keep_start"}
    arguments = SimpleNamespace(dataset_num_proc=None, **whole)
    rows = datasets.Dataset.from_list([row])
    row = trainer._prepare_dataset(me, rows, tokenizer, arguments, "check")[0]
    names = ("prompt_ids", "completion_ids") if kto else ("prompt_ids", "chosen_ids", "rejected_ids")
    return tuple(row[name] for name in names)


def our_ids(row: dict, tokenizer) -> tuple[list[int], ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (pair,) = tokenize_pairs(preference_pairs([row]), tokenizer, 1000)
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


@pytest.mark.parametrize("kind", ROWS)
def test_the_ids_are_trls(named, kind):
    name, tokenizer = named
    row, differs = typed(ROWS[kind], tokenizer), (name, kind) in DIFFERENT
    try:
        theirs = trls_ids(row, tokenizer)
    except Exception:  # no template, or it refuses a role
        theirs = None
    refused = theirs is None and not (differs and tokenizer.chat_template)
    if refused or (tokenizer.bos_token is None and kind == "no prompt"):
        with pytest.raises(DataError, match="no chat template|template refuses|no BOS"):
            our_ids(row, tokenizer)
    elif differs:
        assert our_ids(row, tokenizer) != theirs, DIFFERENT[name, kind]
    else:
        assert our_ids(row, tokenizer) == theirs


@pytest.mark.parametrize("kind", ["plain", "space before", "eos typed", "chat", "system", "tools"])
def test_the_ids_of_a_labelled_completion_are_trls(named, kind):
    _, tokenizer = named
    pair = typed(ROWS[kind], tokenizer)
    row = {k: v for k, v in pair.items() if k not in ("chosen", "rejected")}
    row |= {"completion": pair["chosen"], "label": True}
    prompt = [user("And?")] if isinstance(row["prompt"], list) else "And?"
    other = {**row, "prompt": prompt, "label": "False"}
    try:
        theirs = trls_ids(row, tokenizer, kto=True)
    except Exception:
        with pytest.raises(DataError, match="no chat template|template refuses"):
            tokenize_labelled([row, other], tokenizer, 1000)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = tokenize_labelled([row, other], tokenizer, 1000)
    assert (first.prompt_ids, first.completion_ids) == theirs
    assert (first.desirable, second.desirable) == (True, False)


def test_a_prompt_is_sampled_from_the_ids_that_a_pair_trains_on(named):
    name, tokenizer = named
    for kind in ("plain", "chat"):
        if kind == "chat" and tokenizer.chat_template is None:
            continue
        prompt_ids, *_ = our_ids(ROWS[kind], tokenizer)
        sampled_from = tokenize_prompt(tokenizer, ROWS[kind]["prompt"])
        # R1's template opens a thought that the finished conversation does not have
        assert sampled_from == prompt_ids or (name, kind) == ("r1", "chat")


def test_an_answer_has_one_eos(named):
    name, tokenizer = named
    for kind in ("plain", "eos typed", "eos and newline", "chat"):
        if kind == "chat" and not tokenizer.chat_template:
            continue
        # Gemma's template closes a turn with <end_of_turn>, which is not its EOS.
        expected = 0 if (name, kind) == ("gemma", "chat") else 1
        for ids in our_ids(typed(ROWS[kind], tokenizer), tokenizer)[1:]:
            assert ids.count(tokenizer.eos_token_id) == expected


# --- sampled ids, and whose they are ---


def sampled(by, mark=None, prompt="This movie", answers=(" was great", " was dull")):
    """A pair as sampling makes it: ids without EOS, and the text that they decode to."""
    prompt_ids = tokenize_prompt(by, prompt)
    ids = [by(prompt + text)["input_ids"][len(prompt_ids) :] for text in answers]
    texts = [completion_text(by, prompt_ids, one) for one in ids]
    return PreferencePair(prompt, *texts, prompt_ids, *ids, tokenizer=mark)


def test_sampled_ids_count_under_the_tokenizer_that_made_them(named):
    name, tokenizer = named
    for mark in (None, tokenizer_fingerprint(tokenizer)):
        pair = sampled(tokenizer, mark=mark)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (ids,) = tokenize_pairs([pair], tokenizer, 64)
        assert ids.rows == (
            (pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)
        )  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 1 rows have ids of another tokenizer or text"):
        (ids,) = tokenize_pairs([sampled(tokenizer, mark="0badf00d")], tokenizer, 64)
    assert ids.chosen_ids == [*pair.chosen_ids, tokenizer.eos_token_id]


def test_ids_of_another_tokenizer_are_not_used(tokenizer):
    other = make_tokenizer("chatml")
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    for mark in (None, tokenizer_fingerprint(tokenizer)):
        pair = sampled(tokenizer, mark=mark)
        plain = PreferencePair(pair.prompt, pair.chosen, pair.rejected)
        with pytest.warns(UserWarning, match="ids of another tokenizer or text"):
            assert tokenize_pairs([pair], other, 64) == tokenize_pairs([plain], other, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": " by hand"},
        {"prompt": "That movie"},
        {"chosen_ids": [9_000, 9_001]},  # beyond the vocabulary
        {"chosen_ids": [7, 0, 7]},  # goes on after EOS
        {"chosen_ids": [956, 0, 0]},  # two EOS
        {"tokenizer": "0badf00d"},
    ],
)
def test_ids_that_do_not_give_back_the_text_are_not_used(tokenizer, change):
    pair = sampled(tokenizer, mark=tokenizer_fingerprint(tokenizer))
    pair = PreferencePair(**{**vars(pair), **change})
    plain = PreferencePair(pair.prompt, pair.chosen, pair.rejected)
    with pytest.warns(UserWarning, match="ids of another tokenizer or text"):
        assert tokenize_pairs([pair], tokenizer, 64) == tokenize_pairs([plain], tokenizer, 64)


def test_a_fingerprint_names_the_tokens(tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    marks = {tokenizer_fingerprint(t) for t in (tokenizer, copy.deepcopy(tokenizer), more)}
    assert len(marks) == 2 and all(len(mark) == 8 for mark in marks)


# --- boundaries ---


@pytest.mark.parametrize("name", ["metaspace", "zephyr", "gemma"])
def test_a_space_at_the_boundary_is_one_space(name):
    tokenizer = make_tokenizer(name)
    for prompt, answer in (("This movie", " was great"), ("This movie ", "was great")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prompt_ids, (ids,), _ = prompt_and_answers(tokenizer, prompt, [answer])
        whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
        assert whole == "This movie was great"
    prompt_ids = tokenize_prompt(tokenizer, "This movie")
    ids = tokenizer("This movie was great")["input_ids"][len(prompt_ids) :]
    assert completion_text(tokenizer, prompt_ids, ids) == " was great"


def test_a_tokenizer_that_adds_eos_itself(tokenizer):
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenize_prompt(closing, "This movie") == tokenize_prompt(tokenizer, "This movie")
    assert our_ids(PLAIN["plain"], closing) == our_ids(PLAIN["plain"], tokenizer)


def test_the_embedded_ids_are_what_they_were(tokenizer):
    """A BOS, then the text's own ids: as when every prompt was given a BOS by hand."""
    for text in ("This movie", "", " x", "Ein Café \u2028 😀", "a\n\nb"):
        apart = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == tokenize_prompt(tokenizer, text) == [0, *apart]
        if text:
            assert text_items([text], tokenizer, 64) == [([0], [*apart, 0])]
    assert tokenizer("This movie was great.", add_special_tokens=False)["input_ids"] == [
        956, 360, 336, 599, 14,
    ]  # fmt: skip


def test_a_new_tokenizer_of_the_embedded_kind_adds_its_bos():
    from dpo_mini.embedded.pretraining import train_tokenizer

    tokenizer = train_tokenizer(CORPUS, vocabulary=400)
    apart = tokenizer("This movie", add_special_tokens=False)["input_ids"]
    assert tokenizer("This movie")["input_ids"] == [0, *apart]


def test_texts_for_sft_are_the_tokenizers_own_ids(named):
    _, tokenizer = named
    (item,) = text_items(["This movie was great."], tokenizer, 64)
    own = tokenizer("This movie was great.")["input_ids"]
    assert item == (own[:1], [*own[1:], tokenizer.eos_token_id])
    (cut,) = text_items(["This movie was great."], tokenizer, 4)
    assert cut == (own[:1], own[1:4])  # a text that is cut has no EOS
    with pytest.raises(DataError, match="text 2 is blank"):
        text_items(["a b", ""], tokenizer, 64)


def test_sft_needs_an_eos(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        text_items(["a b"], endless, 64)


def test_one_eos_at_the_end():
    assert with_one_eos([1, 0, 0], 0) == with_one_eos([1], 0) == [1, 0]
    assert with_one_eos([1], None) == [1]
