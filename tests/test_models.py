"""A model is whole or refused: damaged folders, missing weights, adapters, contexts, rewards."""

import json
import os
import random
import shutil
import time

import pytest
import torch
from conftest import make_gpt2
from safetensors.torch import load_file, save_file
from test_architectures import TABLE, build

from dpo_mini.hub import HubError
from dpo_mini.models import ANY_LENGTH, context_length, load_model, same_tokenizer, with_lora
from dpo_mini.rewards import load_reward, positive_label
from dpo_mini.settings import SettingsError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(path, **settings):
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, **settings}))


def change_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors", metadata={"format": "pt"})


def weights_are_the_files(model, folder):
    stored = load_file(folder / "model.safetensors")
    held = dict(model.named_parameters())
    assert set(stored) <= set(held) | {"lm_head.weight"}
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in stored.items())
    return True


# --- whole, or a sentence ---


def test_a_whole_folder_loads_and_leaves_the_random_state_alone(folder):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    model, _ = load_model(folder)
    assert weights_are_the_files(model, folder) and not model.training
    assert torch.equal(before, torch.random.get_rng_state())


NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: {k: t for k, t in w.items() if k != NAME},
        lambda w: {k + "_old" if k == NAME else k: t for k, t in w.items()},
        lambda w: {k: t[:, :-1].contiguous() if k == NAME else t for k, t in w.items()},
        lambda w: {k: t for k, t in w.items() if "wte" not in k},
        lambda w: {f"model.{k}": t for k, t in w.items()},
    ],
    ids=["one missing", "renamed", "misshapen", "no embedding", "another architecture"],
)
def test_weights_that_are_missing_or_misshapen_are_refused(folder, edit):
    change_weights(folder, edit)
    with pytest.raises(HubError, match="is not whole"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_layer=2), dict(n_layer=0), dict(n_layer=10**9), dict(n_embd=32),
        dict(n_positions=10**7), dict(vocab_size=10**12), dict(vocab_size=100), dict(n_head=0),
        dict(model_type="llama"), dict(model_type="no_such"), dict(n_layer="many"),
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_another_model_is_refused_at_once(folder, settings):
    change(folder / "config.json", **settings)
    start = time.perf_counter()
    with pytest.raises(HubError):
        load_model(folder)
    assert time.perf_counter() - start < 10


def test_tied_weights_are_no_fault(folder):
    assert not [name for name in load_file(folder / "model.safetensors") if "lm_head" in name]
    load_model(folder)


def test_a_configuration_cannot_name_a_kernel_to_fetch(folder):
    for key in ("attn_implementation", "_attn_implementation"):
        change(folder / "config.json", **{key: "someone/kernel"})
    assert load_model(folder)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shard", ["../other.safetensors", "/other.safetensors", "gone", 3])
def test_an_index_of_shards_stays_in_its_folder(folder, shard):
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {NAME: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="no file in its folder"):
        load_model(folder)


def test_a_model_in_shards_loads(tiny_folder, tmp_path):
    model, tokenizer = load_model(tiny_folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, _ = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def damage(folder, choose: random.Random) -> str:
    """One fault of a kind that a disk, a download or an editor makes; says which."""
    path = choose.choice([p for p in sorted(folder.iterdir()) if p.suffix != ".md"])
    data = path.read_bytes()
    kind = choose.choice(["cut", "gone", "empty", "bytes", "json", "json", "json"])
    if kind == "gone":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: choose.randrange(len(data))])
    elif kind == "bytes" or path.suffix != ".json":
        changed = bytearray(data)
        for _ in range(3):  # of a file of weights its header: nobody can know a number was another
            changed[choose.randrange(min(len(data), 600))] = choose.randrange(256)
        path.write_bytes(changed)
    else:
        stored = json.loads(data)
        key = choose.choice(sorted(stored))
        value = choose.choice([None, -1, 0, "x", 1e30, [], {}, True, 10**9, [[1]], "remove"])
        stored.pop(key) if value == "remove" else stored.update({key: value})
        kind = f"{key}={value!r}"
        path.write_text(json.dumps(stored))
    return f"{path.name}: {kind}"


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders_load_as_they_are_stored_or_end_in_a_sentence(tiny_folder, tmp_path):
    """DPO_MINI_FUZZ in the environment: how many, 60 without it."""
    refused, count = 0, int(os.environ.get("DPO_MINI_FUZZ", 60))
    for seed in range(count):
        folder = shutil.copytree(tiny_folder, tmp_path / str(seed))
        what, start = damage(folder, random.Random(seed)), time.perf_counter()
        try:
            model, tokenizer = load_model(folder)
            assert weights_are_the_files(model, folder), what
        except HubError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error), what
        except BaseException as error:
            raise AssertionError(f"{seed}, {what}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - start < 10, what
        shutil.rmtree(folder)
    assert refused > count / 3


def test_a_model_that_rescales_itself_is_saved_as_it_is_read(tmp_path, tokenizer):
    """RWKV divides the weights of later layers in place in evaluation mode: twice, if so saved."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, rescale_every=2
    )
    RwkvForCausalLM(config).save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    ids, (model, _) = torch.tensor([[0, 5, 9, 7]]), load_model(tmp_path / "first")
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    again, _ = load_model(tmp_path / "second")
    assert torch.allclose(again(ids).logits, logits, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert weights_are_the_files(again, tmp_path / "first")


# --- adapters ---


def test_adapters_are_made_after_the_seed():
    def adapters(seed, salt):
        torch.manual_seed(salt)
        before = torch.random.get_rng_state()
        model = with_lora(build_tiny(), 4, seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return [p for p in model.parameters() if p.requires_grad and p.abs().sum() > 0]

    def build_tiny():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make_gpt2()

    same = zip(adapters(1, 5), adapters(1, 6), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not all(torch.equal(a, b) for a, b in zip(adapters(1, 5), adapters(2, 5)))


@pytest.mark.parametrize("rank", [-1, 2**60, 1.5, True, None])
def test_a_rank_out_of_range_is_refused(gpt2, rank):
    with pytest.raises(SettingsError, match="rank"):
        with_lora(gpt2, rank)


@pytest.fixture
def adapter_folder(folder, tmp_path):
    model, _ = load_model(folder)
    adapted = with_lora(model, 2, seed=1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted


def test_an_adapters_folder_loads_merged(adapter_folder, tokenizer):
    path, adapted = adapter_folder
    model, its_tokenizer = load_model(path)
    ids = torch.tensor([[0, 5, 9]])
    assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-5)
    assert type(model).__name__ == "GPT2LMHeadModel" and same_tokenizer(tokenizer, its_tokenizer)


def test_an_adapter_that_is_not_whole_is_refused(adapter_folder):
    path, _ = adapter_folder
    weights = load_file(path / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match="not whole"):
        load_model(path)
    change(path / "adapter_config.json", base_model_name_or_path=str(path))
    with pytest.raises(HubError, match="adapter itself"):
        load_model(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(HubError, match="cannot be loaded"):
        load_model(path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(HubError, match="no adapter_model.safetensors"):
        load_model(path)


# --- what a model can read ---


def test_every_configuration_has_a_context_length():
    stated = {name: context_length(build(name)) for name in TABLE}
    assert stated["gpt2"] == stated["llama"] == stated["mpt"] == 512
    assert stated["bloom"] == stated["mamba"] == ANY_LENGTH
    assert stated["roberta"] == 510  # two of its 512 positions are never used
    assert all(isinstance(length, int) and length > 100 for length in stated.values()), stated


def test_tokenizers_are_the_same_where_they_give_the_same_ids(tokenizer, tiny_folder):
    from transformers import AutoTokenizer

    assert same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tiny_folder))
    for edit in (
        lambda t: t.add_tokens(["<new>"]),
        lambda t: setattr(t, "eos_token", "e"),
        lambda t: setattr(t.backend_tokenizer, "normalizer", lowercase()),
    ):
        other = AutoTokenizer.from_pretrained(tiny_folder)
        edit(other)
        assert not same_tokenizer(tokenizer, other)


def lowercase():
    from tokenizers import normalizers

    return normalizers.Lowercase()


# --- rewards ---


@pytest.mark.parametrize(
    "labels, positive",
    [
        (["NEGATIVE", "POSITIVE"], 1), (["pos", "neg"], 0), (["nontoxic", "toxic"], 0),
        (["good", "bad"], 0), (["toxic", "non-toxic"], 1), (["neutral", "toxic"], 0),
        (["negative", "neutral", "positive"], 2), (["safe", "unsafe"], 0), (["reward"], 0),
    ],
)  # fmt: skip
def test_a_known_word_says_which_label_is_positive(labels, positive):
    assert positive_label("m", labels) == positive


@pytest.mark.parametrize(
    "labels",
    [["LABEL_0", "LABEL_1"], ["yes", "no"], ["joy", "anger"], ["toxic", "obscene", "threat"],
     ["good", "positive"], ["bad", "negative"]],
)  # fmt: skip
def test_labels_that_do_not_say_it_are_refused_with_their_names(labels):
    with pytest.raises(HubError, match=f"(?s){labels[0]}.*positive="):
        positive_label("m", labels)
    assert positive_label("m", labels, positive=labels[0]) == 0
    with pytest.raises(HubError, match="no label 'other'"):
        positive_label("m", labels, positive="other")


def classifier_folder(path, tokenizer, labels, pad=True, **settings):
    """A tiny GPT-2 classifier with these labels in the Hub's format."""
    import copy

    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    its_tokenizer = copy.deepcopy(tokenizer)
    its_tokenizer.pad_token = "the" if pad else None
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        pad_token_id=its_tokenizer.pad_token_id, initializer_range=0.3, **settings,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(path)
    its_tokenizer.save_pretrained(path)
    return path, model


TEXTS = ["It is good.", "A long and dull film, I fear, and not a short one", "Bad."]


def outputs_alone(model, tokenizer):
    with torch.no_grad():
        rows = [tokenizer(t, return_tensors="pt")["input_ids"] for t in TEXTS]
        return torch.cat([model(row).logits for row in rows])


@pytest.mark.parametrize("pad", [True, False], ids=["pads", "has no pad token"])
def test_a_reward_models_one_output_is_the_reward(tmp_path, tokenizer, pad):
    path, model = classifier_folder(tmp_path, tokenizer, ["LABEL_0"], pad)
    expected = outputs_alone(model, tokenizer)[:, 0]
    assert torch.allclose(load_reward(path)(TEXTS), expected, atol=1e-5)


def test_a_classifiers_reward_is_the_logit_of_p_positive(tmp_path, tokenizer):
    for labels, positive in ((["nontoxic", "toxic"], 0), (["bad", "fair", "good"], 2)):
        path, model = classifier_folder(tmp_path / labels[0], tokenizer, labels)
        p = outputs_alone(model, tokenizer).softmax(-1)[:, positive]
        assert torch.allclose(load_reward(path)(TEXTS), p.logit(), atol=1e-4)
    assert load_reward(path, positive="fair")([]).shape == (0,)
    long = load_reward(path)(["word " * 500])  # cut at the context
    assert long.isfinite().all()


def test_a_reward_without_its_head_is_refused(tiny_folder):
    with pytest.raises(HubError, match="score.weight"):
        load_reward(tiny_folder)
