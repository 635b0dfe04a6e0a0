"""The loop: exact under accumulation, processes, interruption and resumption; safe when things go
wrong.
"""

import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, random_pairs

from dpo_mini import fast_logprobs, training
from dpo_mini.checkpoints import TrainingInterrupted, diverged, finished, saved_step
from dpo_mini.course import studies
from dpo_mini.course.plots import monitor_figure, training_figure
from dpo_mini.family import LOSSES, REFERENCE_FREE, UNPAIRED, kto_loss, plackett_luce_loss
from dpo_mini.fast_logprobs import different_rows
from dpo_mini.models import without_dropout
from dpo_mini.reference import reference_logps
from dpo_mini.settings import TrainingConfig, TrainingError
from dpo_mini.tokens import TokenizedPair, labelled_completions, unpaired
from dpo_mini.training import (
    batch_indices,
    learning_rate,
    preference_objective,
    ranking_objective,
    sft_objective,
    shared_prompt_block,
    train,
    train_preferences,
    unpaired_objective,
)

CONFIG = TrainingConfig(
    steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=2, checkpoint_every=2, monitor_every=3
)


SFT_ITEMS = [(pair.prompt_ids, pair.chosen_ids) for pair in random_pairs(8)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fresh():
    torch.manual_seed(0)
    return make_gpt2()


def test_training_begins_at_log_2_and_learns_the_pairs():
    model = fresh()
    log = train_preferences(
        model, random_pairs(16), dataclasses.replace(CONFIG, steps=40), beta=0.5
    )
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(log[1]["rewards/margins"]) < 1e-4
    assert log[-1]["loss"] < 0.2 and log[-1]["rewards/margins"] > 2
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }
    assert names <= set(log[1])


def test_the_reference_does_not_move_with_the_policy():
    """The trap `reference = model`: the loss would stay at log 2 for ever."""
    model, pairs = fresh(), random_pairs(16)
    before = reference_logps(model, pairs)
    log = train_preferences(model, pairs, CONFIG, beta=0.1)
    margin = log[-1]["rewards/margins"]
    assert abs(margin) > 1e-3
    assert not torch.allclose(before, reference_logps(model, pairs))


@pytest.mark.parametrize("objective", ["preferences", "sft"])
def test_accumulating_4_times_2_equals_1_times_8_with_unequal_lengths(objective):
    def run(micro):
        model = (
            fresh().double()
        )  # in float32 AdamW turns the rounding of a zero gradient into a step
        config = dataclasses.replace(CONFIG, micro_batch_size=micro)
        if objective == "preferences":
            log = train_preferences(model, random_pairs(20), config, beta=0.5)
        else:
            log = train(
                model,
                [(p.prompt_ids, p.chosen_ids) for p in random_pairs(20)],
                sft_objective(),
                config,
            )
        return weights(model), log

    (whole, log), (parts, log_parts) = run(8), run(2)
    assert torch.allclose(whole, parts, atol=1e-9)
    for a, b in zip(log[1:], log_parts[1:]):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-9
        )


@pytest.mark.parametrize("loss", [*LOSSES, *UNPAIRED])
def test_every_loss_accumulates_exactly(loss):
    """KTO too: its KL is that of the whole batch."""

    def run(micro):
        model = fresh().double()
        config = dataclasses.replace(CONFIG, steps=2, micro_batch_size=micro)
        log = train_preferences(model, random_pairs(20), config, loss=loss)
        return weights(model), [(row["loss"], row["grad_norm"]) for row in log[1:]]

    whole, log = run(None)
    for micro in (1, 2, 3, 8):
        part, log_parts = run(micro)
        assert torch.allclose(whole, part, atol=1e-9)
        for a, b in zip(log, log_parts):
            assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("loss", [*LOSSES, *UNPAIRED])
def test_every_loss_trains_and_reads_a_reference_only_if_it_has_one(loss, monkeypatch):
    reads = []
    real = training.reference_logps
    monkeypatch.setattr(
        training, "reference_logps", lambda *a, **k: reads.append(1) or real(*a, **k)
    )
    model, config = fresh(), dataclasses.replace(CONFIG, steps=3)
    before = weights(model)
    log = train_preferences(model, random_pairs(8), config, loss=loss)
    assert len(reads) == (loss not in REFERENCE_FREE)
    assert (weights(model) - before).abs().max() > 1e-4
    assert len(log) == 4 and all(math.isfinite(v) for row in log for v in row.values())
    assert {"loss", "grad_norm", "rewards/accuracies"} <= set(log[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls_on_the_pairs_it_is_trained_on(loss):
    config = dataclasses.replace(CONFIG, steps=6, warmup_steps=0)
    log = train_preferences(fresh(), random_pairs(8), config, loss=loss)
    assert log[-1]["loss"] < log[1]["loss"]


def test_options_of_a_loss_reach_it_and_the_checkpoints_identity(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1)
    given = {"loss": "simpo", "beta": 1.5, "loss_options": {"gamma": 0.25}}
    log = train_preferences(fresh(), random_pairs(8), config, output=tmp_path, **given)
    other = train_preferences(
        fresh(), random_pairs(8), config, loss="simpo", beta=1.5, loss_options={"gamma": 0.0}
    )
    assert log[1]["loss"] > other[1]["loss"]  # a margin to reach costs
    for change, words in (
        ({"loss_options": {"gamma": 0.5}}, "gamma was 0.25, is 0.5"),
        ({"loss": "dpo", "loss_options": {}}, "loss was"),
    ):
        with pytest.raises(TrainingError, match=words):
            train_preferences(
                fresh(), random_pairs(8), config, output=tmp_path, resume=True, **given | change
            )
    inside = {"loss_options": {"beta": 1.5, "gamma": 0.25}}  # beta among them is as good
    assert train_preferences(fresh(), random_pairs(8), config, loss="simpo", **inside) == log
    with pytest.raises(TrainingError, match="takes no gamma"):
        train_preferences(fresh(), random_pairs(8), config, loss_options={"gamma": 1.0})
    with pytest.raises(TrainingError, match="no loss 'sigmoid'"):
        train_preferences(fresh(), random_pairs(8), config, loss="sigmoid")


def test_rankings_of_two_train_as_pairs_do_and_longer_ones_are_learned():
    def trained(items, objective, batch_size):
        # In float64: Adam's first steps make much of a gradient's rounding.
        model, config = fresh().double(), dataclasses.replace(CONFIG, batch_size=batch_size)
        return train(model, items, objective, config), weights(model)

    pairs = random_pairs(8)
    reference = reference_logps(fresh(), pairs).tolist()
    of_pairs = preference_objective(lambda logps: LOSSES["dpo"](logps, 0.3), 0.3)
    of_rankings = ranking_objective(lambda logps: plackett_luce_loss(logps, 0.3), 0.3)
    log, learned = trained(list(zip(pairs, reference)), of_pairs, 4)
    ranked = list(zip([pair.rows for pair in pairs], reference))
    other_log, also_learned = trained(ranked, of_rankings, 4)
    assert torch.allclose(learned, also_learned, atol=1e-9)
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        assert log[-1][name] == pytest.approx(other_log[-1][name], abs=1e-5)
    items = [
        ([*one.rows, *other.rows], [*logps, *others])
        for one, other, logps, others in zip(
            pairs[::2], pairs[1::2], reference[::2], reference[1::2]
        )
    ]
    longer, _ = trained(items, of_rankings, 4)
    assert longer[1]["loss"] == pytest.approx(math.log(24), abs=1e-4)  # policy = reference
    assert longer[-1]["loss"] < longer[1]["loss"]
    assert longer[-1]["rewards/accuracies"] > 0.6


def test_kto_of_pairs_is_kto_of_their_completions_one_by_one():
    pairs, config = random_pairs(8), dataclasses.replace(CONFIG, steps=3)
    one, other = fresh(), fresh()
    log = train_preferences(one, pairs, config, loss="kto")
    again = train_preferences(other, unpaired(pairs), config, loss="kto")
    assert torch.equal(weights(one), weights(other)) and log == again
    assert log[1]["loss"] == pytest.approx(0.5, abs=1e-4)  # policy = reference: z = 0, r = 0
    names = {"rewards/signed", "rewards/accuracies", "kl", "logps/completion"}
    assert names <= set(log[1]) and "rewards/chosen" not in log[1]


def test_kto_of_pairs_that_fill_the_context_stays_inside_it():
    """The long answer to a short prompt is read after the long prompt too: there it is cut."""
    short = TokenizedPair([0], [5] * 62 + [0], [6, 0])
    long = TokenizedPair([0] * 60, [7, 0], [8, 0])
    model = make_gpt2(context=64)
    config = dataclasses.replace(CONFIG, steps=1, batch_size=4)
    log = train_preferences(model, [short, long], config, loss="kto")
    assert math.isfinite(log[1]["loss"])


def test_kto_learns_from_completions_without_pairs():
    rows = [(p.prompt_ids, p.chosen_ids, i % 3 > 0) for i, p in enumerate(random_pairs(12))]
    config = dataclasses.replace(CONFIG, steps=40, batch_size=12)
    options = {"beta": 0.5, "loss_options": {"undesirable_weight": 2.0}}
    log = train_preferences(fresh(), labelled_completions(rows), config, loss="kto", **options)
    assert log[-1]["loss"] < 0.6 * log[1]["loss"] and log[-1]["rewards/accuracies"] > 0.9


def alone(model, prompt, completion):
    """log pi(completion | prompt), one sequence, token by token."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    start = len(prompt)
    return sum(logps[start + t - 1, token].item() for t, token in enumerate(completion))


@pytest.mark.parametrize("turned", [False, True])
def test_the_kl_of_kto_is_that_of_completions_of_other_prompts(turned):
    torch.manual_seed(3)
    policy, reference = make_gpt2().double(), make_gpt2().double()
    with torch.no_grad():
        for p, q in zip(policy.parameters(), reference.parameters()):
            q.copy_(p + 0.05 * q)
    if turned:
        policy, reference = reference, policy
    items = unpaired(random_pairs(4))[1:]
    answers = [  # of both models to each prompt's own and other completion
        [
            [alone(model, item.prompt_ids, ids) for model in (policy, reference)]
            for ids in (item.completion_ids, item.other_ids)
        ]
        for item in items
    ]
    seen = []

    def loss(logps):
        seen.append(logps)
        return kto_loss(logps, beta=0.4)

    given = [(own[1], other[1]) for own, other in answers]
    objective, known = unpaired_objective(loss, 0.4), list(zip(items, given))
    with torch.no_grad():
        log_ratios = objective.of_whole_batch(policy, known)
    read = objective.logps(policy, known, log_ratios)
    total, metrics = objective.loss(read).sum(), objective.metrics(read)
    (logps,) = seen
    elsewhere = [other[0] - other[1] for _, other in answers]
    assert logps.log_ratios_elsewhere.tolist() == pytest.approx(elsewhere, abs=1e-9)
    assert not logps.log_ratios_elsewhere.requires_grad and logps.policy.requires_grad
    assert logps.policy.tolist() == pytest.approx([own[0] for own, _ in answers], abs=1e-9)
    assert logps.reference.tolist() == pytest.approx([own[1] for own, _ in answers], abs=1e-9)
    assert logps.desirable.tolist() == [item.desirable for item in items]
    z = max(0.0, sum(elsewhere) / len(elsewhere))
    assert (z > 0) != turned
    assert metrics["kl"].tolist() == pytest.approx([z] * len(items), abs=1e-9)
    by_hand, signs = 0.0, []
    for item, (own, _) in zip(items, answers):
        sign = 1 if item.desirable else -1
        by_hand += 1 / (1 + math.exp(0.4 * sign * (own[0] - own[1] - z)))
        signs.append(0.4 * sign * (own[0] - own[1]))
    assert total.item() == pytest.approx(by_hand, abs=1e-9)
    assert metrics["rewards/signed"].tolist() == pytest.approx(signs, abs=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
def test_a_log_of_any_loss_can_be_drawn(loss):
    log = train_preferences(fresh(), random_pairs(8), CONFIG, loss=loss)
    axes = [*training_figure(log, loss).axes, *monitor_figure(log, loss).axes]
    panels = {axis.get_title(): axis for axis in axes}
    assert panels["Loss (nats)"].lines and panels["Gradient norm"].lines
    drawn = [line.get_label() for line in panels["Implicit rewards"].lines]
    assert ("with the label's sign" in drawn) == (loss == "kto")
    assert ("chosen" in drawn) == (loss != "kto")
    assert bool(panels["KL from reference (nats)"].lines) == (loss == "kto")
    start = {"dpo": math.log(2), "kto": 0.5, "orpo": None}[loss]
    lines = training_figure(log, start=start).axes[0].lines
    assert len(lines) == 2 + (start is not None)
    if start is not None:
        assert log[1]["loss"] == pytest.approx(start, abs=1e-3)
        assert lines[0].get_ydata()[0] == start


def test_means_of_micro_batch_means_would_be_another_loss():
    """What the test above would miss if lengths were equal: token means of unequal micro-batches do
    not average.
    """
    items = [(p.prompt_ids, p.chosen_ids) for p in random_pairs(8)]
    model, objective = fresh(), sft_objective()

    def mean(some):
        return objective.loss(objective.logps(model, some)).sum() / sum(map(objective.terms, some))

    whole, parts = mean(items), [mean(items[i : i + 2]) for i in range(0, 8, 2)]
    assert abs(whole.item() - (sum(parts) / 4).item()) > 1e-3


def test_a_batch_is_a_function_of_its_step_and_an_epoch_sees_every_item_once():
    epoch = [i for step in range(5) for i in batch_indices(20, step, 4, 1, 0)]
    assert sorted(epoch) == list(range(20))
    assert batch_indices(20, 2, 8, 1, 0)[:4] == epoch[16:20]  # batches may span epochs
    assert batch_indices(20, 3, 4, 1, 0) != batch_indices(20, 3, 4, 1, 1)
    assert sorted(batch_indices(3, 0, 9, 1, 0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {batch_indices(18, step, 6, 6, 0)[0] for step in range(3)} == {0, 6, 12}
    for step in (0, 1):
        first, *_ = together = batch_indices(18, step, 6, 6, 0)
        assert together == list(range(first, first + 6))
    epoch = [i for step in range(3) for i in batch_indices(17, step, 6, 6, 0)][:17]
    assert sorted(epoch) == list(range(17))  # the last block may be short


def test_a_completion_in_several_pairs_is_read_once_and_nothing_changes():
    a, b, c = [5, 0], [6, 7, 0], [8]
    pairs = [TokenizedPair([0, 1], *p) for p in ((a, b), (a, c), (c, b))]
    rows, index = different_rows([row for pair in pairs for row in pair.rows])
    assert len(rows) == 3 and [rows[i][1] for i in index.view(-1, 2)[2]] == [c, b]
    together = reference_logps(fresh(), pairs)
    apart = torch.cat([reference_logps(fresh(), [p]) for p in pairs])
    assert torch.allclose(together, apart, atol=1e-5)


def test_learning_rate_schedules():
    config = TrainingConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(s, config) for s in (0, 4, 9, 10, 60)] == [0.1, 0.5, 1.0, 1.0, 0.5]
    cosine = dataclasses.replace(config, schedule="cosine")
    assert learning_rate(60, cosine) == pytest.approx(0.5) and learning_rate(109, cosine) < 0.001
    assert learning_rate(109, dataclasses.replace(config, schedule="constant")) == 1.0


def test_the_reference_cache_knows_its_weights_and_tokens(tmp_path):
    model, pairs, cache = fresh(), random_pairs(4), tmp_path / "reference.safetensors"
    first = reference_logps(model, pairs, cache)
    assert torch.equal(first, reference_logps(model, pairs, cache))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    assert not torch.equal(first, reference_logps(other, pairs, cache))
    assert torch.equal(
        reference_logps(other, pairs[::-1], cache), reference_logps(other, pairs[::-1])
    )


def test_the_reference_cache_knows_its_precision(tmp_path):
    """A run in bfloat16 and then one without, in the same folder, begins at log 2."""
    train_preferences(
        fresh(), random_pairs(16), dataclasses.replace(CONFIG, bf16=True), output=tmp_path
    )
    log = train_preferences(fresh(), random_pairs(16), CONFIG, output=tmp_path)
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    other = reference_logps(fresh(), random_pairs(16), bf16=True)
    assert (other - reference_logps(fresh(), random_pairs(16))).abs().max() > 1e-3
    cache = tmp_path / "reference_logps.safetensors"
    single = reference_logps(fresh(), random_pairs(16), cache)
    assert not torch.equal(single, reference_logps(fresh().bfloat16(), random_pairs(16), cache))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other shape", "nan"])
def test_a_damaged_reference_cache_is_made_anew(tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, pairs, cache = fresh(), random_pairs(4), tmp_path / "reference.safetensors"
    first = reference_logps(model, pairs, cache)
    with safe_open(cache, "pt") as stored:
        metadata = stored.metadata()
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-8])
    elif damage in ("empty", "text"):
        cache.write_bytes(b"" if damage == "empty" else b"not a cache at all")
    else:
        logps = first[:2] if damage == "other shape" else first * math.nan
        save_file({"logps": logps.clone()}, cache, metadata)
    assert torch.equal(first, reference_logps(model, pairs, cache))
    with safe_open(cache, "pt") as stored:
        assert torch.equal(first, stored.get_tensor("logps"))


def test_a_model_in_train_mode_is_put_into_evaluation_mode():
    """With dropout on, policy and reference would differ before the first step."""

    def noisy():
        model = fresh()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        return model.train()

    log = train_preferences(noisy(), random_pairs(16), CONFIG)
    assert log == train_preferences(fresh(), random_pairs(16), CONFIG)
    assert log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    expected = reference_logps(fresh(), random_pairs(4))
    assert torch.equal(reference_logps(noisy(), random_pairs(4)), expected)
    log = train(noisy(), SFT_ITEMS, sft_objective(), CONFIG)
    assert log == train(fresh(), SFT_ITEMS, sft_objective(), CONFIG)


def test_sft_lowers_the_loss_of_the_completion_only():
    items = [(p.prompt_ids, p.chosen_ids) for p in random_pairs(8)]
    log = train(
        fresh(), items, sft_objective(), dataclasses.replace(CONFIG, steps=30, learning_rate=3e-3)
    )
    assert log[-1]["loss"] < 0.7 * log[1]["loss"]
    model = fresh()
    objective = sft_objective()
    loss = objective.loss(objective.logps(model, [([0, 5, 6], [7, 0])])).sum()
    logits = model(torch.tensor([[0, 5, 6, 7]])).logits[0].log_softmax(-1)
    assert loss.item() == pytest.approx(-(logits[2, 7] + logits[3, 0]).item(), abs=1e-5)


def test_the_log_probabilities_of_sft_are_those_of_the_definition(monkeypatch):
    """Also where the vocabulary is projected in chunks: long texts fit into memory."""
    model = fresh()
    expected = [alone(model, *item) for item in SFT_ITEMS]
    logits = []
    model.lm_head.register_forward_hook(lambda head, states, out: logits.append(out.numel()))
    for most in (fast_logprobs.LOGITS_AT_ONCE, 97 * 4):
        monkeypatch.setattr(fast_logprobs, "LOGITS_AT_ONCE", most)
        logits.clear()
        logps = sft_objective().logps(model, SFT_ITEMS)
        assert logps.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(logits) <= 97 * 4 and len(logits) > 1


def test_monitor_joins_the_log():
    log = train_preferences(
        fresh(), random_pairs(8), CONFIG, monitor=lambda model, log: {"kl": 1.5}
    )
    assert [r["step"] for r in log if "kl" in r] == [0, 3, 6]


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    pairs = random_pairs(16)
    undisturbed = fresh()
    log = train_preferences(undisturbed, pairs, CONFIG, output=tmp_path / "a")

    calls = []

    def dies_in_the_middle(model, log):
        calls.append(1)
        if len(calls) == 2:  # after step 3; the last checkpoint is that of step 2
            raise RuntimeError("killed")
        return {}

    with pytest.raises(RuntimeError, match="killed"):
        train_preferences(fresh(), pairs, CONFIG, output=tmp_path / "b", monitor=dies_in_the_middle)
    assert saved_step(tmp_path / "b" / "checkpoint.safetensors") == 2
    second = fresh()
    resumed = train_preferences(second, pairs, CONFIG, output=tmp_path / "b", resume=True)
    assert torch.equal(weights(undisturbed), weights(second))
    assert [r["loss"] for r in log[1:]] == [r["loss"] for r in resumed[1:]]


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from conftest import make_gpt2, random_pairs
from dpo_mini.settings import TrainingConfig
from dpo_mini.training import train_preferences
torch.manual_seed(0)
model = make_gpt2()
slow = float(sys.argv[2])
config = TrainingConfig(steps=30, batch_size=8, learning_rate=1e-3, warmup_steps=2,
                        checkpoint_every=1, monitor_every=1)
train_preferences(model, random_pairs(16), config, output=sys.argv[1],
                  resume="--resume" in sys.argv, monitor=lambda m, log: time.sleep(slow) or {{}})
torch.save([p.detach() for p in model.parameters()], sys.argv[1] + "/final.pt")
"""


def start(tmp_path, folder, *flags, slow=0.0):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, script, str(folder), str(slow), *flags], stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(folder, process, step=3):
    deadline = time.time() + 120
    while (saved_step(folder / "checkpoint.safetensors") or 0) < step:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_sigkill_at_any_moment_then_resume(tmp_path):
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    assert start(tmp_path, plain).wait() == 0
    for step in (3, 11, 19):  # killed three times over, wherever it happens to be
        process = start(tmp_path, broken, "--resume", slow=0.05)
        wait_for_checkpoint(broken, process, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert saved_step(broken / "checkpoint.safetensors") >= step
    assert start(tmp_path, broken, "--resume").wait() == 0
    for a, b in zip(torch.load(plain / "final.pt"), torch.load(broken / "final.pt")):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = start(tmp_path, folder, slow=0.05)
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume goes on from there" in stderr
    assert start(tmp_path, folder, "--resume").wait() == 0


def test_ctrl_c_stops_after_a_whole_step(tmp_path):
    def press(model):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    calls = []
    with pytest.raises(TrainingInterrupted, match="Stopped after step 4 of 6"):
        train_preferences(
            fresh(), random_pairs(8), CONFIG, output=tmp_path,
            monitor=lambda m, log: calls.append(1) or (press(m) if len(calls) == 2 else {}),
        )  # fmt: skip
    assert saved_step(tmp_path / "checkpoint.safetensors") == 4


def test_after_a_failure_ctrl_c_means_what_it_meant_before(tmp_path):
    def fails(model, log):
        if log[-1]["step"] == 3:
            raise RuntimeError("the monitor failed")
        return {}

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="the monitor failed") as error:
        train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, monitor=fails)
    assert signal.getsignal(signal.SIGINT) is before, error  # which still holds the traceback
    objective = sft_objective()._replace(loss=lambda logps: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        train(fresh(), SFT_ITEMS, objective, CONFIG)
    assert signal.getsignal(signal.SIGINT) is before, error


def test_a_callers_identity_is_part_of_the_runs(tmp_path):
    given = {"output": tmp_path, "resume": True}
    train_preferences(fresh(), random_pairs(8), CONFIG, identity={"prompts": 3}, **given)
    with pytest.raises(TrainingError, match="prompts was 3, is 4"):
        train_preferences(fresh(), random_pairs(8), CONFIG, identity={"prompts": 4}, **given)


def test_a_setting_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path):
    def without_the_schedule(tensors, metadata):
        identity = json.loads(metadata["identity"])
        del identity["schedule"]
        metadata["identity"] = json.dumps(identity)

    rewritten(interrupted_run(tmp_path), without_the_schedule)
    other = dataclasses.replace(CONFIG, schedule="cosine")
    with pytest.raises(TrainingError, match="schedule was linear, is cosine"):
        train(fresh(), SFT_ITEMS, sft_objective(), other, output=tmp_path, resume=True)
    log = train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path, resume=True)
    assert len(log) == 7


def test_another_runs_checkpoint_is_refused(tmp_path):
    train_preferences(fresh(), random_pairs(8), CONFIG, output=tmp_path)
    with pytest.raises(TrainingError, match="beta was 0.1, is 0.2"):
        train_preferences(fresh(), random_pairs(8), CONFIG, beta=0.2, output=tmp_path, resume=True)
    with pytest.raises(TrainingError, match="data was"):
        train_preferences(fresh(), random_pairs(8, seed=1), CONFIG, output=tmp_path, resume=True)


def test_sft_of_other_texts_or_another_model_is_refused(tmp_path):
    train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path)
    resumed = {"output": tmp_path, "resume": True}
    with pytest.raises(TrainingError, match="data was"):
        train(fresh(), SFT_ITEMS[::-1], sft_objective(), CONFIG, **resumed)
    other = fresh()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(TrainingError, match="model was"):
        train(other, SFT_ITEMS, sft_objective(), CONFIG, **resumed)
    assert len(train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, **resumed)) == 7


def interrupted_run(folder):
    """A checkpoint of step 2 of 6, with the optimiser's state."""

    def dies(model, log):
        if log[-1]["step"] == 3:
            raise RuntimeError("killed")
        return {}

    with pytest.raises(RuntimeError, match="killed"):
        train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, output=folder, monitor=dies)
    return folder / "checkpoint.safetensors"


def rewritten(path, change):
    """The checkpoint with its tensors and metadata changed, a sound file all the same."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        metadata = stored.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def without_a_weight(tensors, metadata):
    tensors.pop(next(name for name in tensors if name.startswith("model.")))


def without_a_moment(tensors, metadata):
    tensors.pop(next(name for name in tensors if name.endswith("exp_avg_sq")))


def without_a_state(tensors, metadata):
    for name in [name for name in tensors if name.startswith("optimizer.3.")]:
        tensors.pop(name)


def without_a_row(tensors, metadata):
    metadata["log"] = json.dumps([row for row in json.loads(metadata["log"]) if row["step"] != 1])


def of_another_shape(tensors, metadata):
    name = next(name for name in tensors if name.startswith("model.") and tensors[name].dim() == 2)
    tensors[name] = tensors[name][:-1].clone()


def moment_of_another_shape(tensors, metadata):
    name = next(name for name in tensors if name.endswith("exp_avg"))
    tensors[name] = tensors[name].flatten()[:-1].clone()


def without_metadata(tensors, metadata):
    metadata.clear()
    metadata["x"] = "y"


@pytest.mark.parametrize(
    "damage",
    [
        without_a_weight, without_a_moment, without_a_state, without_a_row, of_another_shape,
        moment_of_another_shape, without_metadata, "cut", "empty", "text",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_told_in_a_sentence_and_changes_nothing(tmp_path, damage):
    path = interrupted_run(tmp_path)
    if callable(damage):
        rewritten(path, damage)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"x" * 99}[damage])
    model, damaged = fresh(), path.read_bytes()
    before = weights(model).clone()
    with pytest.raises(TrainingError, match="is damaged.*--overwrite|holds other tensors.*Start"):
        train(model, SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path, resume=True)
    assert torch.equal(weights(model), before) and path.read_bytes() == damaged


def test_what_kills_left_behind_is_cleaned_at_the_next_start(tmp_path):
    interrupted_run(tmp_path)
    leftovers = [tmp_path / "checkpoint.safetensors.123.partial", tmp_path / ".tmpAb3xYz"]
    others = [tmp_path / "notes.txt", tmp_path / ".tmp", tmp_path / "pairs.jsonl"]
    for path in leftovers + others:
        path.write_text("half")
    train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path, resume=True)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)


def test_a_finished_runs_checkpoint_is_small_and_still_says_that_it_is_finished(tmp_path):
    path = interrupted_run(tmp_path)
    halfway = path.stat().st_size
    assert not finished(tmp_path) and not finished(tmp_path / "nothing")
    model = fresh()
    log = train(model, SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path, resume=True)
    assert finished(tmp_path) and path.stat().st_size < 0.4 * halfway  # no moments any more
    again = fresh()
    resumed = {"output": tmp_path, "resume": True}
    assert train(again, SFT_ITEMS, sft_objective(), CONFIG, **resumed) == log
    assert torch.equal(weights(again), weights(model))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = dataclasses.replace(
        CONFIG, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0, checkpoint_every=1
    )
    with pytest.raises(TrainingError, match="learning rate ten times smaller") as error:
        train_preferences(fresh(), random_pairs(16), config, output=tmp_path)
    step = saved_step(tmp_path / "checkpoint.safetensors")
    assert step >= 1 and f"step {step} is kept" in str(error.value)


def test_a_full_disk_keeps_the_last_checkpoint_whole(tmp_path, monkeypatch):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 4:  # the reference cache, steps 0 and 2, then no space is left
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TrainingError, match="No space left on device.*that of step 2 is whole"):
        train_preferences(fresh(), random_pairs(8), CONFIG, output=tmp_path)
    assert saved_step(tmp_path / "checkpoint.safetensors") == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_at_the_first_checkpoint_says_that_none_is_there(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TrainingError, match="no earlier one is there. Free some space"):
        train(fresh(), SFT_ITEMS, sft_objective(), CONFIG, output=tmp_path)


def test_senseless_settings_are_refused():
    with pytest.raises(TrainingError, match="beta must be above 0"):
        train_preferences(fresh(), random_pairs(4), CONFIG, beta=0.0)
    with pytest.raises(TrainingError, match="no pairs"):
        train_preferences(fresh(), [], CONFIG)


def test_lora_trains_adapters_alone_and_the_base_is_the_reference():
    peft = pytest.importorskip("peft")
    model = fresh()
    base = weights(model).clone()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    log = train_preferences(
        without_dropout(adapted),
        random_pairs(16),
        dataclasses.replace(CONFIG, learning_rate=1e-2),
        beta=0.5,
    )
    assert (
        log[1]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[-1]["loss"] < log[1]["loss"]
    )
    kept = torch.cat(
        [p.detach().flatten() for n, p in adapted.named_parameters() if "lora" not in n]
    )
    assert torch.equal(base, kept)


def with_adapters(rank=2, seed=0):
    peft = pytest.importorskip("peft")
    base = fresh()
    torch.manual_seed(seed)
    adapters = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, adapters)


def test_a_lora_run_repeats_itself_and_resumes_bit_for_bit(tmp_path):
    undisturbed, again = with_adapters(), with_adapters()
    pairs = random_pairs(16)
    log = train_preferences(undisturbed, pairs, CONFIG, output=tmp_path / "a")
    assert train_preferences(again, pairs, CONFIG) == log

    def press(model, log):
        if log[-1]["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(TrainingInterrupted, match="--resume goes on"):
        train_preferences(with_adapters(), pairs, CONFIG, output=tmp_path / "b", monitor=press)
    resumed = with_adapters()
    go_on = {"output": tmp_path / "b", "resume": True}
    assert train_preferences(resumed, pairs, CONFIG, **go_on) == log
    assert torch.equal(weights(undisturbed), weights(resumed))
    with pytest.raises(TrainingError, match="lora was 2, is 3"):
        train_preferences(with_adapters(rank=3), pairs, CONFIG, **go_on)
    with pytest.raises(TrainingError, match="lora was 2, is 0"):
        train_preferences(fresh(), pairs, CONFIG, **go_on)
    with pytest.raises(TrainingError, match="model was"):
        train_preferences(with_adapters(seed=1), pairs, CONFIG, **go_on)


# --- before and after ---


def test_pairs_of_one_prompt_stay_together_where_they_stand_together():
    def pairs(*runs):
        return [TokenizedPair([i], [5], [6]) for i, run in enumerate(runs) for _ in range(run)]

    assert shared_prompt_block(pairs(*[6] * 20)) == 6  # six pairs of four samples
    assert shared_prompt_block(pairs(*[6] * 20, 5)) == 6  # a tie was dropped
    assert shared_prompt_block(pairs(*[1] * 20)) == 1
    assert shared_prompt_block(pairs(6, 1, 3, 2, 6, 4)) == 1  # no one length
    assert shared_prompt_block(pairs(*[28] * 5)) == 7  # of eight samples: a batch has many prompts
    assert shared_prompt_block(pairs(*[11] * 5)) == 1
    assert shared_prompt_block([]) == 1
    apart = [pair for _ in range(6) for pair in pairs(*[1] * 20)]  # not neighbours
    assert shared_prompt_block(apart) == 1
    assert shared_prompt_block(unpaired(random_pairs(5))) == 2


def test_a_prompt_that_stays_together_is_read_once(monkeypatch):
    pairs = [
        TokenizedPair([0, prompt, 9, 9, 9, 9], [*chosen, 0], [*rejected, 0])
        for prompt in range(1, 9)
        for chosen, rejected in itertools.combinations([[5], [6], [7], [8]], 2)
    ]
    prompts = []
    real = training.completion_logps

    def counting(model, rows):
        prompts.append(len({tuple(prompt) for prompt, _ in rows}))
        return real(model, rows)

    monkeypatch.setattr(training, "completion_logps", counting)
    config = TrainingConfig(steps=8, batch_size=6, block_size=shared_prompt_block(pairs))
    train_preferences(fresh(), pairs, config)
    assert prompts == [1] * 8


@pytest.mark.parametrize("loss", [*LOSSES, *UNPAIRED, "sft"])
def test_a_run_that_blew_up_is_told_from_a_healthy_one(loss):
    def run(rate):
        config = TrainingConfig(steps=30, batch_size=8, learning_rate=rate)
        if loss == "sft":
            return train(fresh(), SFT_ITEMS, sft_objective(), config)
        return train_preferences(fresh(), random_pairs(16), config, loss=loss)

    assert diverged(run(1e-3)) is None
    said = diverged(run(4.0))
    assert said.startswith("The run failed: ") and "The rate was 4. Try one ten times" in said


def test_a_loss_far_above_the_first_is_a_failed_run_and_a_noisy_one_is_not():
    def log(*losses):
        rows = [{"step": i, "loss": x, "learning_rate": 0.1} for i, x in enumerate(losses, 1)]
        return [{"step": 0}, *rows]

    assert "went from 0.6931 to 1.424e+05" in diverged(log(0.6931, 0.7, 3.0, 142416.0))
    assert diverged(log(3.5, *[9.5] * 9)) is not None  # SFT, to a uniform distribution
    assert diverged(log(0.69, *[50.0] * 3, *[0.6] * 27)) is None  # it came back
    assert diverged(log(25.0, *[42.0, 10.0] * 10)) is None  # IPO's noise
    assert diverged(log(0.69, *[2.9] * 20)) is None  # DPO with a large beta
    assert diverged(log(0.5, *[0.45] * 20)) is None and diverged(log(-0.1, -250.0)) is None


def test_no_stored_run_of_the_course_is_called_failed_but_the_one_that_did():
    failed, looked_at = [], 0
    for path in sorted((Path(__file__).parents[1] / "notebooks" / "results").glob("*.json")):
        for run in studies.stored(path).get("runs", []):
            log = studies.rows(run["log"]) if isinstance(run.get("log"), dict) else []
            looked_at += any("loss" in row for row in log)
            failed += [run["setting"].get("name", path.stem)] if diverged(log) else []
    assert looked_at == 224 and failed == ["learning rate too high"]
    assert diverged([{"step": 0}]) is None


def test_a_checkpoint_holds_tensors_and_json_only(tmp_path):
    from safetensors import safe_open

    with safe_open(interrupted_run(tmp_path), "pt") as stored:
        assert json.loads(stored.metadata()["log"])[-1]["step"] == 2
        assert {key.split(".")[0] for key in stored.keys()} == {"model", "optimizer"}
