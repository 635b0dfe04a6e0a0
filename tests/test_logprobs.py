"""Sequence log-probabilities against a brute-force chain rule, and the traps that this catches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_gpt2

from dpo_mini.logprobs import sequence_logps, token_logps
from dpo_mini.tokens import collate

SEQUENCES = [
    ([0, 5, 9], [11, 3, 0]),
    ([0], [7, 0]),
    ([0, 4], [8, 8, 8, 21, 60, 0]),
    ([0, 5, 9, 33, 2], [90]),
]


def chain_rule(model, prompt, completion):
    """log pi(y | x), one forward pass per token, a single unpadded row each."""
    total, ids = 0.0, list(prompt)
    for token in completion:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += (logits - logits.exp().sum().log())[token].item()
        ids.append(token)
    return total


@torch.no_grad()
def check(function, model, tolerance=1e-5):
    expected = torch.tensor([chain_rule(model, *s) for s in SEQUENCES], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [1]):
        for side in ("right", "left"):
            batch = collate([SEQUENCES[i] for i in order], side)
            assert torch.allclose(
                function(model, *batch).double(), expected[order], atol=tolerance, rtol=0
            ), (order, side)


def test_equals_the_chain_rule(any_model):
    check(sequence_logps, any_model)


def test_equals_the_chain_rule_in_float64(any_model):
    check(sequence_logps, any_model.double(), 1e-10)


def test_completions_of_all_lengths_sum_to_one(gpt2):
    """exp(sequence log-probability) is a distribution: over all two-token sequences of a small
    vocabulary it sums to 1.
    """
    model = make_gpt2(vocabulary=5)
    rows = [([0], [a, b]) for a in range(5) for b in range(5)]
    with torch.no_grad():
        assert sequence_logps(model, *collate(rows)).exp().sum().item() == pytest.approx(
            1, abs=1e-5
        )


def mean_for_sum(model, ids, mask, completion):
    return sequence_logps(model, ids, mask, completion) / completion.sum(1)


def prompt_counted(model, ids, mask, completion):
    return (token_logps(model, ids, mask) * mask[:, 1:]).sum(1)


def mask_not_shifted(model, ids, mask, completion):
    return (token_logps(model, ids, mask) * completion[:, :-1]).sum(1)


def logits_not_shifted(model, ids, mask, completion):
    logps = (
        model(ids, attention_mask=mask).logits.log_softmax(-1).gather(2, ids[:, :, None]).squeeze(2)
    )
    return (logps * completion).sum(1)


def no_position_ids(model, ids, mask, completion):
    logits = model(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[
        :, :-1
    ]
    logps = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (logps * completion[:, 1:]).sum(1)


def eos_dropped(model, ids, mask, completion):
    return (token_logps(model, ids, mask) * completion[:, 1:] * (ids[:, 1:] != 0)).sum(1)


def padding_counted(model, ids, mask, completion):
    after = completion.cumsum(1).clamp(max=1)
    return (token_logps(model, ids, mask) * after[:, 1:]).sum(1)


def softmax_in_bfloat16(model, ids, mask, completion):
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logps = (
        model(ids, attention_mask=mask, position_ids=position_ids)
        .logits[:, :-1]
        .bfloat16()
        .log_softmax(-1)
    )
    return (logps.gather(2, ids[:, 1:, None]).squeeze(2) * completion[:, 1:]).float().sum(1)


TRAPS = [mean_for_sum, prompt_counted, mask_not_shifted, logits_not_shifted, no_position_ids,
         eos_dropped, padding_counted, softmax_in_bfloat16]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS, ids=lambda f: f.__name__)
def test_each_trap_is_caught(trap, gpt2):
    with pytest.raises(AssertionError):
        check(trap, gpt2)


def test_dropout_is_a_trap_that_loading_removes(tiny_folder, gpt2):
    from dpo_mini.models import load_model, without_dropout

    batch = collate(SEQUENCES)
    noisy = copy.deepcopy(gpt2)
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    noisy.train()
    assert not torch.equal(sequence_logps(noisy, *batch), sequence_logps(noisy, *batch))
    quiet = without_dropout(noisy).train()
    assert torch.equal(sequence_logps(quiet, *batch), sequence_logps(quiet, *batch))
    model, _ = load_model(tiny_folder)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
