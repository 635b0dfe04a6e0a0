"""GRPO: the loss against TRL's own code and against a float64 sum written out token by token, the
advantages against what they stand for, and the loop in a small world.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from conftest import make_gpt2

from dpo_mini import exact, grpo
from dpo_mini.course import verified
from dpo_mini.evaluation import pass_at_k
from dpo_mini.grpo import (
    GRPOConfig,
    first_sentence_words,
    group_advantages,
    grpo_loss,
    lacks_letter,
    token_kl,
    verified_reward,
)
from dpo_mini.logprobs import token_logps
from dpo_mini.rewards import load_prompts
from dpo_mini.sampling import Completion
from dpo_mini.settings import SettingsError, TrainingError
from dpo_mini.tokens import collate

# --- rewards that a program can check ---


@pytest.mark.parametrize(
    "text, words",
    [
        (" was a real joy! I", 4), (" costs 3.5 dollars. Yes", 3), ("It's well-made.", 2),
        ("... and so on. More", 0), (". The film", 0), (" was a joy", None), ("", None),
        (" What? No.", 1), (' he said "No." Then.', 3), (" a\nb c. d", 3), (" – so – it’s.", 2),
    ],
)  # fmt: skip
def test_the_words_of_the_first_sentence(text, words):
    assert first_sentence_words(text) == words


def test_a_text_without_a_letter():
    assert lacks_letter(" a truly good plot, the end", "E", 4)
    assert not lacks_letter(" a truly good plot, the end", "e", 5)
    assert not lacks_letter(" a truly good", "e", 4)  # too short to tell
    assert not lacks_letter(" Every word", "e", 2)


def test_a_verified_reward_reads_the_completion_alone():
    completions = [Completion("A. B.", text, [0], [1]) for text in (" one two.", " one.")]
    found = verified_reward(lambda text: first_sentence_words(text) == 2)(completions)
    assert found.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "text, passed",
    [(" Yes.", True), (" was a real joy! I", True), (" was not a real joy!", False), ("...", False),
     (" was a joy", False)],
)  # fmt: skip
def test_the_task_of_chapter_17(text, passed):
    assert verified.passes(text) is passed


def test_the_other_prompts_are_apart_from_the_courses():
    known = set(load_prompts("train")) | set(load_prompts("held_out"))
    assert len(verified.OTHER_PROMPTS) == len(set(verified.OTHER_PROMPTS) - known) == 50


# --- pass@k ---


def test_pass_at_k_is_the_share_of_choices_that_hold_a_pass():
    passed = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        every = [list(chosen) for chosen in combinations(range(5), k)]
        expected = [sum(bool(row[c].any()) for c in every) / len(every) for row in passed]
        assert pass_at_k(passed, k).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(pass_at_k(passed, 1), passed.double().mean(1), atol=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_pass_at_k_is_unbiased_where_the_plain_estimate_is_not(k):
    """Every outcome of 4 samples, each with its probability."""
    p, mine, plain = 0.3, 0.0, 0.0
    for outcome in product((0, 1), repeat=4):
        chance = math.prod(p if o else 1 - p for o in outcome)
        mine += chance * pass_at_k(torch.tensor([outcome]), k).item()
        plain += chance * (1 - (1 - sum(outcome) / 4) ** k)
    truth = 1 - (1 - p) ** k
    assert mine == pytest.approx(truth, abs=1e-12) and plain < truth - 0.03


@pytest.mark.parametrize("k", [0, 6, 1.5])
def test_pass_at_k_asks_for_a_k_that_there_is(k):
    with pytest.raises(SettingsError, match="5 samples"):
        pass_at_k(torch.zeros(2, 5), k)


# --- advantages ---


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_group_advantages_number_by_number():
    rewards = normal(3, 4)
    rows = rewards.tolist()
    every = [r for row in rows for r in row]

    def deviation(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))

    for name in ("group", "batch", "none"):
        for row, found in zip(rows, group_advantages(rewards, name).tolist()):
            spread = {"group": deviation(row), "batch": deviation(every)}.get(name)
            scale = 1 if spread is None else spread + 1e-4
            mean = math.fsum(row) / 4
            assert found == pytest.approx([(r - mean) / scale for r in row], abs=1e-12)


def test_a_group_of_equal_rewards_is_silent_and_others_do_not_matter():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    for name in ("group", "none"):
        assert (group_advantages(rewards, name)[0] == 0).all()
        alone = group_advantages(rewards[1:], name)
        assert torch.equal(group_advantages(rewards, name)[1:], alone)
    with pytest.raises(SettingsError, match="'std'"):
        group_advantages(rewards, "std")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_what_the_division_by_the_spread_climbs(n, scale):
    """Every group of `n` completions of an exact world with its probability. Without the division
    the expected step is (n - 1) / n of the gradient of P(pass); with it, it is that gradient times
    a weight that depends on P(pass) alone.
    """
    responses = exact.completions(3, 2)
    passes = torch.tensor([float(y.count(1) == 1) for y in responses], dtype=torch.float64)
    logits = normal(len(exact.prefixes(responses)), 3, seed=2).requires_grad_()
    logps = exact.table_logps(logits, responses)
    p = exact.expectation(logps, passes)
    (climb,) = torch.autograd.grad(p, logits, retain_graph=True)
    every = torch.cartesian_prod(*[torch.arange(len(responses))] * n)
    chances = logps.detach()[every].sum(1).exp()
    surrogate = (chances * (group_advantages(passes[every], scale) * logps[every]).mean(1)).sum()
    (step,) = torch.autograd.grad(surrogate, logits)
    p, weight = p.item(), (n - 1) / n
    if scale == "group":
        spreads = {k: math.sqrt(k * (n - k) / (n * (n - 1))) for k in range(n + 1)}
        weight *= math.fsum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) * s * s / (s + 1e-4)
            for k, s in spreads.items()
        ) / (p * (1 - p))  # fmt: skip
    assert torch.allclose(step, weight * climb, rtol=0, atol=1e-12) and climb.abs().max() > 1e-2


# --- the loss ---


def batch_of_tokens(lengths=(5, 2, 7, 1, 4, 3), width=7, seed=0, moved=0.3):
    """logps (with a gradient), old, reference [rows, width], advantages [rows], mask."""
    rows = len(lengths)
    logps, old, reference = (-2 + normal(rows, width, seed=seed + i) for i in range(3))
    old, reference = logps + moved * old, logps + 0.5 * (reference + 2)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return logps.requires_grad_(), old + 0.6, reference, normal(rows, seed=seed + 9), mask


def written_out(logps, old, reference, advantages, mask, name, low, high, beta, limit):
    """The loss and its gradient, a token at a time, with Python's numbers."""
    rows, lengths = mask.shape[0], mask.sum(1).tolist()
    total, gradient = 0.0, torch.zeros_like(logps)
    for i, t in mask.nonzero().tolist():
        a, ratio = advantages[i].item(), math.exp(logps[i, t].item() - old[i, t].item())
        kept = min(max(ratio, 1 - low), 1 + high)
        value, slope = -min(ratio * a, kept * a), -ratio * a * (ratio * a <= kept * a)
        log_q = (reference - logps)[i, t].item()
        value += beta * (math.exp(log_q) - 1 - log_q)
        slope += beta * (1 - math.exp(log_q))
        weight = {"grpo": 1 / (rows * lengths[i]), "dapo": 1 / sum(lengths)}.get(name)
        weight = 1 / (rows * limit) if weight is None else weight
        total += weight * value
        gradient[i, t] += weight * slope
    return total, gradient


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("high", [None, 0.35])
@pytest.mark.parametrize("name", grpo.LOSS_TYPES)
def test_the_loss_is_what_is_written_out(name, high, beta):
    logps, old, reference, advantages, mask = batch_of_tokens()
    options = {"loss_type": name, "epsilon": 0.2, "epsilon_high": high, "beta": beta}
    options |= {"reference_logps": reference, "max_completion_length": 9}
    loss = grpo_loss(logps, old, advantages, mask, **options)
    (gradient,) = torch.autograd.grad(loss, logps)
    value, slopes = written_out(
        logps.detach(), old, reference, advantages, mask, name, 0.2, high or 0.2, beta, 9
    )
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert torch.allclose(gradient, slopes, rtol=0, atol=1e-12)
    assert ((gradient == 0) & (mask == 1)).any() == (beta == 0)  # some tokens are clipped


def test_what_stands_in_padding_changes_nothing():
    logps, old, reference, advantages, mask = batch_of_tokens()
    for name in grpo.LOSS_TYPES:
        options = {"loss_type": name, "beta": 0.3, "max_completion_length": 9}
        loss = grpo_loss(logps, old, advantages, mask, reference_logps=reference, **options)
        other = torch.where(mask == 1, logps, logps - 5)
        again = grpo_loss(other, old, advantages, mask, reference_logps=reference, **options)
        assert loss.item() == again.item()


def test_for_completions_of_one_length_the_three_differ_by_a_constant_alone():
    logps, old, _, advantages, mask = batch_of_tokens(lengths=(5,) * 6)
    losses = {
        name: grpo_loss(
            logps, old, advantages, mask, loss_type=name, max_completion_length=10
        ).item()
        for name in grpo.LOSS_TYPES
    }
    assert losses["grpo"] == pytest.approx(losses["dapo"], abs=1e-15)
    assert losses["dr_grpo"] == pytest.approx(losses["dapo"] / 2, abs=1e-15)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"loss_type": "bnpo"}, "bnpo"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"beta": 0.1}, "reference_logps"),
    ],
)
def test_a_loss_says_what_it_lacks(options, said):
    logps, old, _, advantages, mask = batch_of_tokens()
    with pytest.raises(SettingsError, match=said):
        grpo_loss(logps, old, advantages, mask, **options)


def test_the_estimate_of_the_kl_is_right_in_the_mean_and_its_gradient_is_another_kls():
    logits, reference = normal(6).requires_grad_(), normal(6, seed=1).log_softmax(-1)
    logps = logits.log_softmax(-1)
    estimates = token_kl(logps, reference)
    p = logps.detach().exp()
    assert (estimates >= 0).all()
    assert (p * estimates).sum().item() == pytest.approx(exact.kl(logps, reference).item())
    (found,) = torch.autograd.grad((p * estimates).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(exact.kl(reference, logps), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(exact.kl(logps, reference), logits)
    assert torch.allclose(found, forward, atol=1e-12)
    assert (found - reverse).abs().max() > 1e-2


# --- TRL's own code ---

ROWS = [([0, 5, 9], [11, 3, 0]), ([0], [7, 0]), ([0, 4], [8, 8, 8, 21, 60, 0]), ([0, 5], [90])]
LIMIT = 8


def trl_inputs(advantages, old, reference):
    """The rollout as GRPOTrainer holds it: prompts padded on the left, completions on the right."""
    left, right = max(len(p) for p, _ in ROWS), max(len(c) for _, c in ROWS)

    def on_the_right(values):
        return torch.tensor([[*row, *[0] * (right - len(row))] for row in values])

    return {
        "prompt_ids": torch.tensor([[0] * (left - len(p)) + p for p, _ in ROWS]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p, _ in ROWS]),
        "completion_ids": on_the_right([c for _, c in ROWS]),
        "completion_mask": on_the_right([[1] * len(c) for _, c in ROWS]),
        "old_per_token_logps": on_the_right(old), "ref_per_token_logps": on_the_right(reference),
        "advantages": advantages, "num_items_in_batch": torch.tensor(sum(len(c) for _, c in ROWS)),
    }  # fmt: skip


def trl_trainer(trl, policy, loss_type, beta):
    def logps_and_entropies(model, ids, mask, logits_to_keep, **_):
        found = token_logps(model, ids, mask)[:, -logits_to_keep:]
        return found, torch.zeros_like(found), None

    trainer = object.__new__(trl.GRPOTrainer)
    same = SimpleNamespace(
        num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, device="cpu"
    )
    trainer.__dict__ |= {
        "model": policy, "accelerator": same, "aux_loss_enabled": False, "loss_type": loss_type,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "importance_sampling_level": "token", "beta": beta, "epsilon_low": 0.2,
        "epsilon_high": 0.3, "max_completion_length": LIMIT, "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_get_per_token_logps_and_entropies": logps_and_entropies,
    }  # fmt: skip
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    "ours, theirs",
    [("grpo", "grpo"), ("dapo", "bnpo"), ("dapo", "dapo"), ("dr_grpo", "dr_grpo")],
)
def test_the_loss_and_gradient_of_grpo_trainer(ours, theirs, beta):
    """One batch, one policy that has moved, in float64; the gradient of every weight."""
    trl = pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")
    torch.manual_seed(0)
    policy = make_gpt2(width=16, layers=1).double().train()
    batch = collate(ROWS)
    mask = batch.completion_mask[:, 1:]
    logps = token_logps(policy, batch.input_ids, batch.attention_mask)
    old = logps.detach() + 0.3 * normal(*logps.shape)
    reference = logps.detach() + 0.3 * normal(*logps.shape, seed=1)
    advantages = normal(len(ROWS), seed=2)
    mine = grpo_loss(
        logps, old, advantages, mask, loss_type=ours, epsilon=0.2, epsilon_high=0.3, beta=beta,
        reference_logps=reference, max_completion_length=LIMIT,
    )  # fmt: skip
    rows = [[x[i][mask[i] == 1].tolist() for i in range(len(ROWS))] for x in (old, reference)]
    torch.set_default_dtype(torch.float64)
    try:
        inputs = trl_inputs(advantages, *rows)
        other = trl_trainer(trl, policy, theirs, beta)._compute_loss(policy, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
        for loss in (mine, other)
    ]
    assert mine.item() == pytest.approx(other.item(), rel=1e-9)
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[1].norm()
    assert gradients[1].norm() > 1e-3


def test_the_spread_is_trls():
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the test extra")
    rewards = normal(5, 4)
    theirs = rewards - rewards.mean(1, keepdim=True)
    theirs = theirs / (utils.nanstd(rewards, dim=1)[:, None] + 1e-4)  # GRPOTrainer, in 1.16
    # Its correction, n / (n - 1), is float32.
    assert torch.allclose(group_advantages(rewards), theirs, rtol=0, atol=1e-6)


# --- the loop ---


@pytest.fixture
def world():
    """A model of three tokens; a completion passes where it has exactly two 1s."""
    torch.manual_seed(1)
    policy = make_gpt2(vocabulary=3, width=16, layers=1, context=8)

    def reward(completions):
        return torch.tensor([float(c.ids.count(1) == 2) for c in completions])

    return SimpleNamespace(policy=policy, reference=copy.deepcopy(policy), reward=reward)


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<eos>", eos_token="<eos>")


CONFIG = GRPOConfig(
    steps=12, batch_size=64, num_generations=16, learning_rate=1e-2, max_completion_length=4,
    monitor_every=5,
)  # fmt: skip


def trained(world, words, **changes):
    policy = copy.deepcopy(world.policy)
    config = dataclasses.replace(CONFIG, **changes)
    return grpo.grpo(
        policy, world.reference, words, ["", "a b"] * 4, world.reward, config
    ), policy  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"scale_rewards": "none"}, {"scale_rewards": "batch"}, {"loss_type": "dapo"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"num_iterations": 3, "learning_rate": 4e-3},
    ],
    ids=str,
)  # fmt: skip
def test_it_learns_what_a_program_can_check(world, words, changes):
    log, _ = trained(world, words, **changes)
    assert log[-1]["score"] > log[1]["score"] + 0.3  # 0.2 to 0.3 before, 0.8 to 1 after
    assert abs(log[1]["sampled_kl"]) < 1e-5 < log[-1]["sampled_kl"]


def test_against_the_advantage_it_unlearns(world, words, monkeypatch):
    right = grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda *args: -right(*args))
    log, _ = trained(world, words)
    assert log[-1]["score"] < log[1]["score"]


def test_with_one_iteration_the_clip_never_acts_and_with_more_it_does(world, words):
    narrow, wide = (trained(world, words, epsilon=e)[0] for e in (1e-3, 0.2))
    assert narrow == wide
    narrow, wide = (trained(world, words, epsilon=e, num_iterations=3)[0] for e in (1e-3, 0.2))
    assert narrow[-1]["clipped"] > 0 and narrow != wide


def test_the_penalty_keeps_it_near_the_reference(world, words):
    free, _ = trained(world, words)
    held, _ = trained(world, words, beta=3.0)
    assert held[-1]["sampled_kl"] < 0.5 * free[-1]["sampled_kl"]


def test_where_every_reward_is_alike_nothing_moves(world, words):
    world.reward = lambda completions: torch.ones(len(completions))
    log, policy = trained(world, words)
    assert log[-1]["silent_groups"] == 1.0
    assert all(map(torch.equal, policy.parameters(), world.policy.parameters()))


def test_a_completion_is_compared_with_its_own_prompts(world, words):
    """A reward that depends on the prompt alone teaches nothing."""
    world.reward = lambda completions: torch.tensor([float(c.prompt == "") for c in completions])
    log, policy = trained(world, words, steps=3)
    assert 0 < log[1]["score"] < 1
    assert all(map(torch.equal, policy.parameters(), world.policy.parameters()))


def test_another_seed_draws_other_completions(world, words):
    policy, config = copy.deepcopy(world.policy), dataclasses.replace(CONFIG, steps=1, seed=1)
    args = world.reference, words, [""], world.reward
    (_, one) = grpo.grpo(policy, *args, dataclasses.replace(config, batch_size=16))
    policy = copy.deepcopy(world.policy)
    (_, other) = grpo.grpo(policy, *args, dataclasses.replace(config, batch_size=16, seed=2))
    assert (one["score"], one["length"]) != (other["score"], other["length"])


def test_the_log_calls_the_monitor_and_a_run_is_its_seed(world, words):
    calls = []

    def monitor(policy, log):
        calls.append(log[-1]["step"])
        return {"watched": len(calls)}

    args = world.reference, words, [""] * 8, world.reward, CONFIG
    log = grpo.grpo(copy.deepcopy(world.policy), *args, monitor)
    assert calls == [0, 5, 10, 12] and log[-1]["watched"] == 4
    assert grpo.grpo(copy.deepcopy(world.policy), *args)[-1]["score"] == log[-1]["score"]


def test_it_stops_before_a_step_that_is_no_number(world, words):
    world.reward = lambda completions: torch.full((len(completions),), math.nan)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        trained(world, words)


def test_a_batch_is_a_whole_number_of_groups(world, words):
    with pytest.raises(TrainingError, match="10 completions.*as many of every prompt"):
        trained(world, words, batch_size=10, num_generations=4)


@pytest.mark.parametrize(
    "name, value",
    [("num_generations", 1), ("epsilon", 0.0), ("loss_type", "x"), ("scale_rewards", True),
     ("beta", -1.0), ("steps", 0), ("num_iterations", 0), ("epsilon_high", -0.1)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_where_it_is_made(name, value):
    with pytest.raises(SettingsError, match=name):
        GRPOConfig(**{name: value})
