"""Samples come from the model's own distribution, whole and unpadded."""

import torch

from dpo_mini.data import tokenize_prompt
from dpo_mini.models import load_model
from dpo_mini.sampling import inverse_cdf, sample_completions, through_first


def test_first_tokens_follow_the_softmax_tail_included(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    n = 6000
    ((*completions,),) = sample_completions(
        model, tokenizer, ["This"], n, 1, seed=3, batch_size=2000
    )
    prompt = torch.tensor([tokenize_prompt(tokenizer, "This")])
    probabilities = model(prompt).logits[0, -1].softmax(-1).detach()
    order = probabilities.argsort(descending=True)
    bins = torch.tensor_split(
        order, 40
    )  # a top_k of 50 would leave all but the first of these empty
    drawn = torch.bincount(
        torch.tensor([c.ids[0] for c in completions]), minlength=len(probabilities)
    )
    expected = torch.stack([probabilities[b].sum() * n for b in bins])
    observed = torch.stack([drawn[b].sum() for b in bins])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 39 + 5 * (2 * 39) ** 0.5, chi_square


def test_a_prompt_of_another_length_in_the_batch_changes_nothing(tiny_folder):
    """Left padding must not shift positions: greedy-like sampling at low temperature agrees with a
    batch of one.
    """
    model, tokenizer = load_model(tiny_folder)
    alone = sample_completions(model, tokenizer, ["This"], 1, 8, temperature=1e-4)[0][0]
    together = sample_completions(
        model, tokenizer, ["This", "I saw this film with a friend"], 1, 8, temperature=1e-4
    )[0][0]
    assert alone.ids == together.ids


def test_eos_is_kept_once_and_a_cut_sample_has_none(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.lm_head.weight.zero_()[0] = 1
        model.transformer.ln_f.bias.fill_(
            8.2 / 16
        )  # EOS has a chance of e^8.2 / (e^8.2 + 8191), about 0.3, everywhere
    rows = sample_completions(model, tokenizer, ["This", "That"], 50, 6)
    completions = [c for row in rows for c in row]
    ended = [c for c in completions if c.ids[-1] == 0]
    assert ended and all(c.ids.count(0) == 1 for c in ended)
    assert all(0 not in c.ids and len(c.ids) == 6 for c in completions if c not in ended)
    assert all("endoftext" not in c.text for c in completions)
    assert through_first([3, 0, 0, 4], 0) == [3, 0] and through_first([3, 4], 0) == [3, 4]


def test_seeded_and_leaves_the_random_state_alone(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = sample_completions(model, tokenizer, ["This", "That"], 3, 5, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == sample_completions(model, tokenizer, ["This", "That"], 3, 5, seed=1)
    assert first != sample_completions(model, tokenizer, ["This", "That"], 3, 5, seed=2)


def test_inverse_cdf_draws_each_token_as_often_as_it_should():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = inverse_cdf(probabilities.repeat(100_000, 1)).squeeze(1)
    share = torch.bincount(drawn, minlength=6) / 100_000
    assert (share[probabilities == 0] == 0).all()
    error = (probabilities * (1 - probabilities) / 100_000).sqrt()
    assert ((share - probabilities).abs() <= 4 * error).all()
