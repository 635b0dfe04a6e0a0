"""The fast path against the definition, in value and gradient, and what it reads."""

import copy

import pytest
import torch

from dpo_mini import fast_logprobs
from dpo_mini.exactness import is_body_then_head
from dpo_mini.fast_logprobs import (
    completion_logps,
    layout,
    of_like_length,
    packed_length,
    shares_prompts,
)
from dpo_mini.logprobs import sequence_logps
from dpo_mini.tokens import collate


def many_rows():
    """Prompts of several lengths with several completions each, one of them twice."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1, 97, (n,), generator=generator).tolist()

    prompts = [[0, *ids(1)], [0, *ids(5)], [0, *ids(9)]]
    rows = [(p, [*ids(1 + 3 * k), 0]) for p in prompts for k in range(3)]
    return [*rows, ([0, 4], [7]), rows[1]]


@pytest.mark.filterwarnings("error:.*slower way")  # which would be right, and not what is tested
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("padding", [0.0, 1.0])
@pytest.mark.parametrize("at_once", [2**25, 500])
def test_the_fast_path_equals_the_definition(any_model, share, padding, at_once, monkeypatch):
    """Values and gradients, with prompts shared or not, the lengths read apart or together, the
    vocabulary in one piece or in many.
    """
    monkeypatch.setattr(fast_logprobs, "MOST_PADDING", padding)
    monkeypatch.setattr(fast_logprobs, "shares_prompts", lambda rows: share)
    monkeypatch.setattr(fast_logprobs, "LOGITS_AT_ONCE", at_once)
    model, rows = any_model.double(), many_rows()
    weights = torch.randn(len(rows), dtype=torch.float64)
    slow, fast = sequence_logps(model, *collate(rows)), completion_logps(model, rows)
    assert torch.allclose(slow, fast, atol=1e-10, rtol=0)
    parameters = list(model.parameters())
    expected, found = (torch.autograd.grad((x * weights).sum(), parameters) for x in (slow, fast))
    for a, b in zip(expected, found):  # Llama's norms and rotations are in float32 always
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*more than its head")
def test_a_model_that_scales_its_logits_takes_the_plain_path(gpt2):
    """Cohere's and Granite's do; head(hidden) alone would be another distribution."""
    scaled, rows = copy.deepcopy(gpt2), many_rows()
    scaled.register_forward_hook(lambda module, inputs, output: halved(output))

    def halved(output):
        output.logits = output.logits / 2
        return output

    assert is_body_then_head(gpt2) and not is_body_then_head(scaled)
    assert torch.allclose(completion_logps(scaled, rows), sequence_logps(scaled, *collate(rows)))
    far = completion_logps(scaled, rows) - completion_logps(gpt2, rows)
    assert far.abs().min() > 1e-3


def test_a_shared_prompt_is_read_once_and_a_completions_last_token_never():
    rows = [([0, 1, 2], [5, 6, 0]), ([0, 1, 2], [7, 0]), ([0, 3], [8])]
    apart, together = layout(rows, False), layout(rows, True)
    assert apart.input_ids.shape == (3, 5) and apart.attends is None
    assert together.input_ids.tolist() == [[0, 1, 2, 5, 6, 7], [0, 3, 0, 0, 0, 0]]
    assert together.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3]
    assert together.attends[0].int().tolist()[5] == [1, 1, 1, 0, 0, 1]  # not the other completion
    for one in (apart, together):
        assert one.targets.tolist() == [5, 6, 0, 7, 0, 8]
        assert one.owners.tolist() == [0, 0, 0, 1, 1, 2]
    assert together.predictors.tolist() == [2, 3, 4, 2, 5, 7]
    assert shares_prompts(rows) is False
    assert shares_prompts([([0] * 50, [1, 2]), ([0] * 50, [3])]) is True


def test_rows_of_other_lengths_are_read_apart_and_padding_is_bounded():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(2, 60, (int(torch.randint(1, 20, (1,), generator=generator)),))
        rows = [([0, i], [1] * int(n)) for i, n in enumerate(lengths)]
        batches = of_like_length(rows, share=False)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
        for batch in batches:
            read = [packed_length(rows, [i]) for i in batch]
            assert read == sorted(read, reverse=True)
            assert sum(read) >= (1 - fast_logprobs.MOST_PADDING) * max(read) * len(read)
    alike = [([0, i], [1] * 30) for i in range(8)]
    assert len(of_like_length(alike, False)) == 1
    assert of_like_length([*alike, ([0, 9], [1] * 99)], False) == [[8], list(range(8))]


def test_one_gelu_for_eight_operations_changes_nothing(gpt2):
    from transformers.activations import NewGELUActivation

    from dpo_mini.models import fused_gelu

    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    before, kind = gpt2(input_ids=ids).logits, gpt2.config.activation_function
    assert any(isinstance(m, NewGELUActivation) for m in gpt2.modules())
    after = fused_gelu(gpt2)(input_ids=ids).logits
    assert not any(isinstance(m, NewGELUActivation) for m in gpt2.modules())
    assert torch.allclose(before, after, atol=1e-5) and gpt2.config.activation_function == kind


@pytest.mark.filterwarnings("error:.*slower way")
def test_a_shared_prompt_under_autocast(any_model, monkeypatch):
    """The mask is float32, the scores are bfloat16: both paths run, and differ by rounding only."""
    exact = completion_logps(any_model, many_rows()).detach()
    for share in (False, True):
        monkeypatch.setattr(fast_logprobs, "shares_prompts", lambda rows, share=share: share)
        with torch.autocast("cpu", torch.bfloat16):
            logps = completion_logps(any_model, many_rows())
        assert logps.dtype == torch.float32
        logps.sum().backward()
        assert (logps - exact).abs().max() < 0.02 * exact.abs().max()
