"""What the embedded reward, judge and model are worth on IMDb's test split, where at hand."""

import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED_IMDB, needs_imdb

from dpo_mini.data import read_rows
from dpo_mini.embedded import eight_bits, policy
from dpo_mini.embedded.judges import (
    calibration_error,
    fit_reward,
    judge_quality,
    save_reward,
)
from dpo_mini.embedded.pretraining import bits_per_byte, next_token_loss, orthogonalised
from dpo_mini.hub import HubError
from dpo_mini.models import load_model
from dpo_mini.rewards import WordJudge, load_judge, load_reward
from dpo_mini.settings import TrainingError

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


# The policy that ships


def test_eight_bits_are_off_by_half_a_step_at_most():
    rng = np.random.default_rng(0)
    for shape in ((7, 128), (3, 2, 64), (5, 48), (4, 1)):
        matrix = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 2, size=(*shape[:-1], 1))
        whole, scales = eight_bits.quantised(matrix)
        group = matrix.size // scales.size
        step = np.repeat(scales.astype(np.float64), group, axis=-1).reshape(shape)
        error = np.abs(eight_bits.restored(whole, scales) - matrix)
        assert (error <= 0.501 * step + 1e-12).all()
    assert not eight_bits.restored(*eight_bits.quantised(np.zeros((2, 64)))).any()


def test_what_is_packed_comes_back_by_name():
    tensors = {"a": np.ones((2, 64), np.float32), "b": np.full(3, 0.5, np.float32)}
    back = eight_bits.unpack(eight_bits.pack(tensors))
    assert back.keys() == tensors.keys() and np.allclose(back["a"], 1, atol=1e-2)
    assert (back["b"] == 0.5).all()


def test_the_policy_that_ships_belongs_to_the_model_that_ships():
    """After another pretraining: python -m dpo_mini.embedded.policy."""
    card = (policy.FOLDER / "README.md").read_text(encoding="utf-8")
    assert policy.base_weights() in card
    assert sum(p.stat().st_size for p in policy.FOLDER.iterdir()) <= 11 * 2**20
    words = ("embedded.policy", "beta", "95% interval", "longest run", "2305.18290", "apache-2.0")
    for word in words:
        assert word in card, f"the policy's card does not mention {word!r}"
    pairs = read_rows(policy.FOLDER / "pairs.jsonl.gz")
    assert f"{len(pairs):,} pairs" in card and {"prompt", "chosen", "rejected"} <= set(pairs[0])


def test_the_policy_that_ships_gives_its_margins():
    from dpo_mini.data import preference_pairs
    from dpo_mini.reference import reference_logps
    from dpo_mini.tokens import tokenize_pairs

    rows = read_rows(policy.FOLDER / policy.MARGINS)[:6]
    (trained, tokenizer), (reference, _) = policy.load_policy(), load_model()
    pairs = tokenize_pairs(preference_pairs(rows), tokenizer, 128)
    log_ratios = reference_logps(trained, pairs) - reference_logps(reference, pairs)
    margins = log_ratios[:, 0] - log_ratios[:, 1]
    assert torch.allclose(margins, torch.tensor([row["margin"] for row in rows]), atol=1e-2)
    assert margins.abs().max() > 1  # it is no copy of the reference


def test_a_difference_that_is_stored_is_the_one_that_is_loaded(tmp_path):
    model, _ = load_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    policy.store_difference(model, tmp_path)
    loaded, _ = policy.load_policy(tmp_path)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters()):
        assert torch.allclose(ours, theirs, atol=3e-5), name


def test_a_difference_from_other_weights_is_refused(tmp_path, monkeypatch):
    """Added to another model of the same shape, it would be a wrong policy without a word."""
    shutil.copy(policy.FOLDER / policy.DIFFERENCE, tmp_path)
    monkeypatch.setattr(policy, "base_weights", lambda: "another")
    with pytest.raises(HubError, match="another embedded model"):
        policy.load_policy(tmp_path)


def test_a_policy_of_another_model_is_not_stored(tmp_path, tiny_folder):
    """As a run is that was left from before the embedded model was replaced."""
    other, _ = load_model()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for model in (other, load_model(tiny_folder)[0]):
        with pytest.raises(TrainingError, match="not trained from the embedded model"):
            policy.store_difference(model, tmp_path)
