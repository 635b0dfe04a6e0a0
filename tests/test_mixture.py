"""A mixture of a policy and its reference: the rule, its samples, its KL, and its picture."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import make_gpt2, make_llama
from test_cli import fails

from dpo_mini import exact
from dpo_mini.cli import main
from dpo_mini.course import realigned, strengths, studies
from dpo_mini.data import DataError
from dpo_mini.evaluation import sequence_kl, token_shifts
from dpo_mini.models import load_model, save_model
from dpo_mini.sampling import (
    Completion,
    continuations,
    inverse_cdf,
    mixture_continuations,
    mixture_logps,
    sample_mixture,
    through_first,
)
from dpo_mini.settings import SettingsError

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"
STRENGTHS = (-1.0, 0.0, 0.3, 1.0, 2.5)
PROMPTS = [[0, 5, 9], [0, 4], [0, 5, 9], [0, 5, 9, 33, 2]]


@pytest.fixture(params=["gpt2", "llama"])
def two(request):
    """Two different models of one kind and one vocabulary."""
    make = make_gpt2 if request.param == "gpt2" else make_llama
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make())
    return models


@pytest.fixture
def other(tiny_folder):
    """A policy of the tiny model's family, moved a little."""
    model, _ = load_model(tiny_folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=generator))
    return model


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_rule_is_a_geometric_mean_normalised(strength):
    policy, reference = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = policy.softmax(-1), reference.softmax(-1)
    weights = q ** (1 - strength) * p**strength
    expected = weights / weights.sum(-1, keepdim=True)
    for shift in (0.0, 3.0):  # logits or log-probabilities: a constant changes nothing
        mixed = mixture_logps(policy + shift, reference.log_softmax(-1), strength)
        assert (mixed.exp() - expected).abs().max() < 1e-12


def test_at_its_ends_the_rule_is_one_of_the_two_models_to_the_last_bit():
    policy, reference = 30 * torch.randn(2, 4, 97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixture_logps(policy, reference, 1.0), policy.log_softmax(-1))
    assert torch.equal(mixture_logps(policy, reference, 0.0), reference.log_softmax(-1))
    assert mixture_logps(policy.bfloat16(), reference.bfloat16(), 0.5).dtype == torch.float32


@torch.no_grad()
def slowly(policy, reference, strength, prompt, u, end):
    """The definition: both models read the whole row again for every token."""
    ids = []
    for number in u:
        row = torch.tensor([[*prompt, *ids]])
        logits = [
            model(input_ids=row, use_cache=False).logits[:, -1] for model in (policy, reference)
        ]
        ids.append(inverse_cdf(mixture_logps(*logits, strength).exp(), number[None]).item())
    return through_first(ids, end)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_two_caches_draw_what_two_models_without_a_cache_draw(two, strength):
    u = torch.rand(9, len(PROMPTS), generator=torch.Generator().manual_seed(4))
    drawn = mixture_continuations(*two, strength, PROMPTS, u, end=7)
    for i, prompt in enumerate(PROMPTS):
        assert drawn[i] == slowly(*two, strength, prompt, u[:, i], 7), prompt


def test_at_its_ends_a_mixture_draws_what_one_model_draws(two):
    u = torch.rand(12, len(PROMPTS), generator=torch.Generator().manual_seed(5))
    for strength, model in ((1.0, two[0]), (0.0, two[1])):
        drawn = mixture_continuations(*two, strength, PROMPTS, u, end=7)
        assert drawn == continuations(model, PROMPTS, u, end=7)


def test_random_numbers_belong_to_the_completion(tiny_folder, other):
    """The same ones at every strength, for any batch, and whatever is asked after it."""
    reference, tokenizer = load_model(tiny_folder)
    given = (other, reference, tokenizer)
    many = sample_mixture(*given, ["This", "I saw", "A"], 0.5, 2, 6, seed=1)
    assert many == sample_mixture(*given, ["This", "I saw", "A"], 0.5, 2, 6, seed=1, batch_size=4)
    assert many[:2] == sample_mixture(*given, ["This", "I saw"], 0.5, 2, 6, seed=1)
    assert many != sample_mixture(*given, ["This", "I saw", "A"], 0.5, 2, 6, seed=2)
    nearly = sample_mixture(*given, ["This", "I saw", "A"], 0.5001, 2, 6, seed=1)
    same = sum(a == b for x, y in zip(many, nearly) for a, b in zip(x, y))
    assert same >= 5  # of six: the numbers are common, so that little moves with the strength


def test_what_cannot_be_mixed_is_refused_in_a_sentence(tiny_folder, gpt2, tokenizer):
    model, tokenizer = load_model(tiny_folder)
    with pytest.raises(DataError, match="vocabulary of 8192 tokens and the reference one of 97"):
        sample_mixture(model, gpt2, tokenizer, ["This"], 0.5)
    for strength in (float("nan"), float("inf"), 1e6, -1e6, "1", True):
        with pytest.raises(SettingsError, match="strength must be"):
            sample_mixture(model, model, tokenizer, ["This"], strength)
    with pytest.raises(DataError, match="context"):
        sample_mixture(model, model, tokenizer, ["This"], 0.5, max_new_tokens=10_000)


def test_a_model_that_cannot_be_continued_by_a_cache_is_named(two, monkeypatch):
    monkeypatch.setattr("dpo_mini.sampling.continuing_refusal", lambda *_: "a state runs through")
    with pytest.raises(SettingsError, match="LMHeadModel|LlamaForCausalLM"):
        mixture_continuations(*two, 0.5, PROMPTS, torch.rand(3, 4))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_kl_of_a_mixture_is_that_of_its_own_distributions(two, strength):
    policy, reference = two
    completions = [Completion("", "", [0, 5], [9, 33, 2]), Completion("", "", [0], [4, 7])]
    measured = sequence_kl(policy, reference, completions, strength=strength)
    for i, completion in enumerate(completions):
        row = torch.tensor([completion.prompt_ids + completion.ids])
        start = len(completion.prompt_ids) - 1
        with torch.no_grad():
            p, q = (m(row).logits[0, start:-1].double().log_softmax(-1) for m in two)
        mixed = ((1 - strength) * q + strength * p).log_softmax(-1)
        kl = (mixed.exp() * (mixed - q)).sum(-1)
        shifts = token_shifts(policy, reference, completion, strength)
        assert measured[i].item() == pytest.approx(kl.sum().item(), abs=1e-4)
        assert (shifts.kl - kl).abs().max() < 1e-4
        for ours, theirs in ((shifts.logps, mixed), (shifts.reference_logps, q)):
            expected = theirs[range(len(completion.ids)), completion.ids]
            assert (ours - expected).abs().max() < 1e-4


# --- the exact world ---

RESPONSES = exact.completions(3, 3)


def world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, len(RESPONSES), generator=generator, dtype=torch.float64)
    return draws[0].log_softmax(-1), draws[1]


def test_conditionals_are_the_inverse_of_the_chain_rule():
    logps, _ = world()
    logps = logps * 300  # probabilities far below float64's smallest
    logps = logps.log_softmax(-1)
    rows = exact.next_token_logps(logps, RESPONSES)
    assert (rows.exp().sum(-1) - 1).abs().max() < 1e-12
    assert (exact.table_logps(rows, RESPONSES) - logps).abs().max() < 1e-9


def test_for_whole_sequences_the_rule_is_exact_and_token_by_token_nearly():
    reference, rewards = world()
    optimum = exact.optimal_policy(reference, rewards, 0.7)
    for strength in (-1.0, 0.3, 2.0):
        mixed = ((1 - strength) * reference + strength * optimum).log_softmax(-1)
        target = exact.optimal_policy(reference, rewards, 0.7 / strength)
        assert (mixed - target).abs().max() < 1e-12
        near = exact.token_mixture(optimum, reference, RESPONSES, strength)
        assert abs(near.exp().sum().item() - 1) < 1e-12
        assert exact.total_variation(near, target) > 1e-3
    for strength, model in ((0, reference), (1, optimum)):
        same = exact.token_mixture(optimum, reference, RESPONSES, strength)
        assert (same - model).abs().max() < 1e-12


def test_it_is_exact_where_a_token_does_not_change_what_can_follow():
    """Texts of two tokens, drawn independently, and a reward that adds up over the places."""
    texts = [(a, b) for a in (0, 1) for b in (0, 1)]
    place = torch.tensor([[0.3, -1.0], [0.7, 0.2]]).double()
    chance = torch.tensor([[0.4, 0.6], [0.9, 0.1]]).double().log()
    rewards, reference = (
        torch.stack([table[0, a] + table[1, b] for a, b in texts]) for table in (place, chance)
    )
    rewards_that_need_both = rewards + torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    for strength in (-1.0, 0.5, 3.0):
        off = []
        for values in (rewards, rewards_that_need_both):
            optimum = exact.optimal_policy(reference, values, 0.5)
            target = exact.optimal_policy(reference, values, 0.5 / strength)
            mixed = exact.token_mixture(optimum, reference, texts, strength)
            off.append((mixed - target).abs().max().item())
        assert off[0] < 1e-12 and off[1] > 0.01


# --- the command line ---


def test_a_strength_from_the_command_line(tiny_folder, other, tmp_path, capsys):
    _, tokenizer = load_model(tiny_folder)
    save_model(other, tokenizer, tmp_path / "policy", "a card")
    common = ["sample", "--prompt", "The plot", "--samples", "2", "--max-new-tokens", "6", "--json"]

    def texts(*given):
        assert main([*common, *map(str, given)]) == 0
        return [row["text"] for row in json.loads(capsys.readouterr().out)["samples"]]

    pair = ("--model", tmp_path / "policy", "--reference", tiny_folder, "--strength")
    half = texts(*pair, 0.5)
    assert len(half) == 2 and half == texts(*pair, 0.5)
    assert texts(*pair, 0) == texts(
        "--model", tiny_folder, "--reference", tiny_folder, "--strength", 3
    )
    assert texts(*pair, 0) != texts(*pair, 1)


def test_a_mixture_that_makes_no_sense_is_told(tiny_folder, tmp_path, capsys):
    _, tokenizer = load_model(tiny_folder)
    tokenizer.add_tokens(["<another>"])
    save_model(load_model(tiny_folder)[0], tokenizer, tmp_path / "other", "a card")
    given = ["sample", "--model", str(tiny_folder), "--reference"]
    fails(
        capsys, main([*given, str(tmp_path / "other"), "--strength", "0.5"]), "different tokenizers"
    )
    fails(capsys, main([*given, str(tiny_folder)]), "say how much of the policy", "--strength")
    fails(capsys, main([*given, str(tiny_folder), "--strength", "nan"]), "finite")
    fails(capsys, main([*given, str(tiny_folder), "--strength", "1e9"]), "at most 100")


# --- the picture and the slider ---


def text_at(prompt, strength, seed):
    words = [("good & <b>", 1.5 * strength), ("film", -0.8 * strength), (f"nr {seed}", 0.1)]
    return realigned.Shown(prompt, strength, words, 0.5 + strength / 10, 2 * strength**2)


def test_the_picture_says_in_words_and_lines_what_its_colours_say():
    drawn = realigned.picture([text_at("This <i>", s, 0) for s in (0.0, 0.5, 1.0)], beta=0.4)
    root = ElementTree.fromstring(drawn)
    name = {"svg": "http://www.w3.org/2000/svg"}
    caption = root.find("svg:title", name).text
    assert "strength 0.5 · beta 0.80 · P(positive) 0.55 · KL 0.5 nats" in caption.lower().replace(
        "p(positive)", "P(positive)").replace("kl", "KL")  # fmt: skip
    assert "good & <b>" in caption and "This <i>" in caption
    titles = [t.text for t in root.findall("svg:g/svg:title", name)]
    assert titles[6:8] == ["+1.50 nats", "-0.80 nats"]
    lines = [g.find("svg:path", name) for g in root.findall("svg:g", name)]
    assert [i for i, line in enumerate(lines) if line is not None] == [3, 6, 7]
    assert "stroke-dasharray" not in lines[6].attrib and "stroke-dasharray" in lines[7].attrib
    assert "beta" not in realigned.numbers(text_at("x", -0.5, 0), 0.4)


def test_words_stay_inside_the_picture():
    long = realigned.Shown(
        "A prompt", 1.0, [("word" * (i % 5 + 1), 0.0) for i in range(60)], 0.5, 1
    )
    drawn = realigned.picture([long])
    height = float(re.search(r"viewBox='0 0 720 ([\d.]+)'", drawn)[1])
    for word in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text"):
        assert 0 < float(word.attrib["y"]) < height
        assert float(word.attrib["x"]) + float(word.attrib.get("textLength", 0)) <= 720


def test_a_real_text_is_measured_as_a_whole(tiny_folder, other):
    reference, tokenizer = load_model(tiny_folder)

    def reward(texts):
        return torch.tensor([float(len(text) % 3) for text in texts])

    text = realigned.shown(other, reference, tokenizer, reward, "This movie", 0.7, seed=2)
    ((completion,),) = sample_mixture(
        other, reference, tokenizer, ["This movie"], 0.7, max_new_tokens=32, seed=2
    )
    shifts = token_shifts(other, reference, completion, 0.7)
    total = (shifts.logps - shifts.reference_logps).sum().item()
    assert sum(shift for _, shift in text.words) == pytest.approx(total, abs=1e-3)
    assert " ".join(word for word, _ in text.words).split() == completion.text.split()
    assert text.kl == pytest.approx(shifts.kl.sum().item(), rel=1e-4)
    still = realigned.shown(other, reference, tokenizer, reward, "This movie", 0.0, seed=2)
    assert still.kl == 0 and all(shift == 0 for _, shift in still.words)


def test_the_slider_moves_the_text_and_a_page_without_a_kernel_shows_five(monkeypatch):
    import IPython.display

    seen = []
    monkeypatch.setattr(IPython.display, "display", lambda what, **_: seen.append(what))
    box = realigned.explore_strength(text_at, beta=0.4)
    strip = seen[0]["image/svg+xml"]
    ElementTree.fromstring(strip)
    for strength in (0.0, 0.5, 1.0, 1.5, 2.0):
        assert f">strength {strength:g} ·" in strip
    asked, slider, number, view = box.children
    assert all(control.tooltip and control.description for control in (asked, slider, number))
    before = view.value
    slider.value = 0.2
    assert view.value != before and "strength 0.2 · beta 2.00" in view.value
    number.value = 3
    assert "nr 3" in view.value
    asked.value = "The plot"
    assert ">plot<" in view.value


def test_a_prompt_that_cannot_be_used_is_told_in_the_picture(monkeypatch):
    def refuses(prompt, strength, seed):
        if prompt == "":
            raise DataError("a prompt <needs> words")
        return text_at(prompt, strength, seed)

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: None)
    box = realigned.explore_strength(refuses, beta=0.4)
    box.children[0].value = ""
    assert "a prompt &lt;needs&gt; words" in box.children[3].value


# --- the stored study ---


def test_the_stored_study_is_that_of_the_code():
    stored = studies.stored(RESULTS / "strengths.json")
    assert stored["command"] == "python -m dpo_mini.course.strengths strengths"
    settings = [strengths.Run(**run["setting"] | {"strengths": tuple(run["setting"]["strengths"])})
                for run in stored["runs"]]  # fmt: skip
    assert settings == list(strengths.STUDIES["strengths"])
    for run in stored["runs"]:
        assert [row["strength"] for row in run["strengths"]] == run["setting"]["strengths"]
        for row in run["strengths"]:
            assert row["kl"]["low"] <= row["kl"]["mean"] <= row["kl"]["high"]
