"""What the embedded reward, judge and model are worth on IMDb's test split, where at hand."""

import pytest
import torch
from conftest import SHARED_IMDB, needs_imdb

from dpo_mini.data import read_rows
from dpo_mini.embedded.judges import (
    calibration_error,
    fit_reward,
    judge_quality,
    save_reward,
)
from dpo_mini.embedded.pretraining import bits_per_byte, next_token_loss, orthogonalised
from dpo_mini.models import load_model
from dpo_mini.rewards import WordJudge, load_judge, load_reward

one_worker = pytest.mark.xdist_group("reviews")  # 25,000 of them, read once


@pytest.fixture(scope="module")
def reviews():
    rows = read_rows(SHARED_IMDB, "test")
    return [r["text"].replace("<br />", " ") for r in rows], [r["label"] for r in rows]


@one_worker
@needs_imdb
@pytest.mark.slow
def test_the_reward_reads_reviews(reviews):
    texts, labels = reviews[0][::25], reviews[1][::25]
    quality = judge_quality(load_reward(), texts, labels)
    slack = 2 * (0.12 / 1000) ** 0.5  # two standard errors on 1,000 reviews
    assert quality["accuracy"] >= 0.88 - slack and quality["accuracy_40_words"] >= 0.76 - slack
    assert quality["calibration_error_40_words"] <= 0.05 + slack


@one_worker
@needs_imdb
def test_the_second_judge_reads_words(reviews):
    quality = judge_quality(load_judge(), reviews[0][::25], reviews[1][::25])
    assert quality["accuracy"] >= 0.86 and quality["accuracy_40_words"] >= 0.73


@one_worker
@needs_imdb
@pytest.mark.slow
def test_the_model_beats_the_yardstick(reviews):
    """1.535 bits per byte is what a first small model reached on the same 500 openings."""
    model, tokenizer = load_model()
    assert bits_per_byte(model, tokenizer, reviews[0][::50]) < 1.535


def test_reward_and_judge_know_good_from_bad_without_any_data():
    good = [
        "This movie was wonderful, a moving and brilliant film.",
        "I loved it, great acting and a perfect story.",
    ]
    bad = [
        "This movie was terrible, a boring waste of time.",
        "I hated it, awful acting and the worst story.",
    ]
    for judge in (load_reward(), load_judge()):
        assert (judge(good) > 1).all() and (judge(bad) < -1).all()
        both = judge(good + bad)
        assert torch.allclose(
            both[[2, 0]], judge([bad[0], good[0]]), atol=1e-4
        )  # batch and order do not matter
        assert judge([""]).isfinite().all()


def test_a_long_text_is_read_to_its_end():
    reward = load_reward()
    start = "It is a film about a town. " * 30
    assert (
        reward([start + "Wonderful, a brilliant and moving masterpiece. " * 12])
        > reward([start]) + 0.3
    )


def test_word_features_have_length_one():
    features = WordJudge.features("Not good, NOT good at all!")
    assert sum(v * v for v in features.values()) == pytest.approx(1)
    assert "not good" in features and "!" in features


def test_calibration_error_of_a_calibrated_and_of_an_overconfident_judge():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, generator=generator)
    targets = (torch.rand(20000, generator=generator) < logits.sigmoid()).float()
    assert calibration_error(logits, targets) < 0.02 < 0.1 < calibration_error(4 * logits, targets)


def test_the_chunked_cross_entropy_is_the_plain_one(gpt2):
    windows = torch.randint(0, 97, (3, 20))
    plain = torch.nn.functional.cross_entropy(
        gpt2(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()
    )
    plain.backward()
    expected = {n: p.grad.clone() for n, p in gpt2.named_parameters()}
    gpt2.zero_grad()
    chunked = next_token_loss(gpt2, windows)
    chunked.backward()
    assert chunked.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, p in gpt2.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


def test_muon_makes_singular_values_near_one():
    for shape in ((16, 64), (64, 16), (32, 32)):
        values = torch.linalg.svdvals(
            orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 10)
        )
        assert 0.6 < values.min() and values.max() < 1.3


def test_fitting_a_reward_learns_words_and_survives_saving(tmp_path):
    from safetensors.torch import load_file

    texts = ["A wonderful, moving film.", "A boring, awful film."] * 20
    reward = fit_reward(texts, [1, 0] * 20, steps=15, batch_size=8)
    logits = reward(texts[:2])
    assert logits[0] > 0 > logits[1]
    save_reward(reward, tmp_path)
    reward.head.load_state_dict(load_file(tmp_path / "reward.safetensors"))
    assert torch.allclose(reward(texts[:2]), logits, rtol=0.02, atol=0.02)  # half precision


def test_small_models_stay_on_the_cpu_where_there_is_a_gpu(monkeypatch, tmp_path):
    """The notebooks' tensors are the CPU's, and so must be the embedded model, on any machine."""
    from dpo_mini.models import load_model, pick_device
    from dpo_mini.verbs import Train, in_bfloat16_where_it_pays

    monkeypatch.delenv("DPO_MINI_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(5_000_000) == "cpu" and pick_device(124_000_000).startswith("cuda")
    model, _ = load_model()
    assert model.device.type == "cpu"
    assert in_bfloat16_where_it_pays(Train(pairs="pairs.jsonl"), model) == {"bf16": False}
    monkeypatch.setenv("DPO_MINI_DEVICE", "meta")
    assert pick_device(5_000_000) == "meta"
