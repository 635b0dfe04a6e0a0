"""Samples come from the model's own distribution, whole and unpadded."""

import copy
from functools import partial

import pytest
import torch

from dpo_mini import sampling
from dpo_mini.evaluation import sequence_kl
from dpo_mini.models import load_model
from dpo_mini.rewards import load_prompts
from dpo_mini.sampling import continuations, inverse_cdf, sample_completions, through_first
from dpo_mini.settings import TrainingError
from dpo_mini.tokens import collate, tokenize_prompt


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


@pytest.mark.filterwarnings("error:.*which is slower")
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
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    drawn = inverse_cdf(probabilities.repeat(100_000, 1), u).squeeze(1)
    share = torch.bincount(drawn, minlength=6) / 100_000
    assert (share[probabilities == 0] == 0).all()
    error = (probabilities * (1 - probabilities) / 100_000).sqrt()
    assert ((share - probabilities).abs() <= 4 * error).all()


PROMPTS = [[0, 5, 9], [0, 4], [0, 5, 9], [0, 5, 9, 33, 2]]


def generated(model, prompts, tokens, end, **options):
    batch = collate([(ids, []) for ids in prompts], padding_side="left")
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, eos_token_id=end,
        pad_token_id=0, max_new_tokens=tokens, **options,
    )  # fmt: skip
    return [through_first(ids, end) for ids in output[:, batch.input_ids.shape[1] :].tolist()]


@pytest.mark.filterwarnings("error:.*which is slower")
def test_greedy_equals_generate_also_where_rows_end_early(any_model):
    """`end` is a token that some rows reach and others do not, so rows are dropped on the way."""
    u = torch.zeros(12, len(PROMPTS))
    free = continuations(any_model, PROMPTS, u, temperature=0)
    assert free == generated(any_model, PROMPTS, 12, None, do_sample=False)
    end = free[1][3]
    ended = continuations(any_model, PROMPTS, u, temperature=0, end=end)
    assert ended == generated(any_model, PROMPTS, 12, end, do_sample=False)
    assert len({len(ids) for ids in ended}) > 1


def test_a_row_does_not_depend_on_when_others_end(gpt2):
    """The random numbers are the row's own, so that dropping the ended ones changes no other."""
    u = torch.rand(10, 60, generator=torch.Generator().manual_seed(4))
    prompts = [PROMPTS[i % 4] for i in range(60)]
    free = continuations(gpt2, prompts, u)
    for end in (7, 11, 40):
        assert continuations(gpt2, prompts, u, end=end) == [through_first(x, end) for x in free]


def test_samples_are_distributed_as_generates(gpt2):
    """The third token of 4,000 samples, ours against `generate`'s: a chi-square on two samples."""
    n, end = 4000, 7
    torch.manual_seed(0)
    theirs = generated(gpt2, [PROMPTS[0]] * n, 3, end, do_sample=True, top_k=0)
    ours = continuations(gpt2, [PROMPTS[0]] * n, torch.rand(3, n), end=end)
    a, b = (
        torch.bincount(torch.tensor([x[2] if len(x) > 2 else end for x in drawn]), minlength=97)
        for drawn in (ours, theirs)
    )
    often = a + b >= 10
    chi_square = ((a - b)[often] ** 2 / (a + b)[often]).sum().item()
    freedom = often.sum().item()
    assert freedom > 30 and chi_square < freedom + 5 * (2 * freedom) ** 0.5


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A film?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_conversation_is_a_prompt_and_a_reward_reads_the_answer_alone(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    ((chat,), (text,)) = sample_completions(model, tokenizer, [MESSAGES, "A film?"], 1, 5)
    assert chat.prompt_ids == tokenize_prompt(tokenizer, MESSAGES) != text.prompt_ids
    assert chat.full_text == chat.text and chat.prompt == MESSAGES
    assert text.full_text == "A film?" + text.text


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(n=0), "n must be"), (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=63), "context of 64"), (dict(max_new_tokens=2**60), "max_new_tokens"),
        (dict(temperature=-1.0), "temperature"), (dict(temperature=float("nan")), "temperature"),
        (dict(batch_size=0), "batch_size"), (dict(prompts=["a\ud83d"]), "surrogate"),
        (dict(prompts=[[{"role": "user", "content": "a\ud83d"}]]), "surrogate"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused_in_a_sentence(tiny_folder, settings, said):
    model, tokenizer = load_model(tiny_folder)
    with pytest.raises(ValueError, match=said):
        sample_completions(model, tokenizer, **{"prompts": ["This film"], **settings})


def test_a_sample_may_fill_the_context_to_its_last_token(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    room = 64 - len(tokenize_prompt(tokenizer, "This"))
    assert sample_completions(model, tokenizer, ["This"], 1, room, temperature=0)


def test_a_tokenizer_without_eos_is_said(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.warns(UserWarning, match="no EOS"):
        ((completion,),) = sample_completions(model, without, ["This"], 1, 5)
    assert len(completion.ids) == 5


def test_generate_draws_the_same_tokens_and_keeps_no_settings_of_the_model(any_model):
    """The way for models that our own loop cannot read, on models that both can."""
    any_model.generation_config.update(repetition_penalty=9.0, forced_eos_token_id=3, top_k=2)
    before = any_model.generation_config
    u = torch.rand(9, 4, generator=torch.Generator().manual_seed(2))
    for temperature in (0, 0.7, 1.0):
        for end in (None, 12):
            arguments = (any_model, PROMPTS, u, temperature, end)
            own = sampling.continued(partial(sampling.Reader, arguments[0]), *arguments[1:])
            assert sampling.generated(*arguments) == own
    assert any_model.generation_config is before


def test_ids_of_another_models_tokenizer_are_refused(gpt2):
    with pytest.raises(ValueError, match="97 is unknown to the model, which knows 0 to 96"):
        continuations(gpt2, [[1, 97]], torch.zeros(2, 1))


def test_dropout_does_not_touch_a_sample(gpt2):
    u = torch.rand(8, 4, generator=torch.Generator().manual_seed(2))
    expected = continuations(gpt2, PROMPTS, u)
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert continuations(gpt2.train(), PROMPTS, u) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_blew_up_is_refused_in_a_sentence(gpt2, temperature):
    gpt2.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="learning rate"):
        continuations(gpt2, [[0, 1]], torch.full((3, 1), 0.5), temperature)


def test_bfloat16_changes_samples_and_kl_by_rounding_only():
    model, tokenizer = load_model()
    warmer = copy.deepcopy(model)
    warmer.transformer.ln_f.weight.data *= 0.7  # another policy, not far away
    prompts = load_prompts("held_out")[:64]
    likeliest = [
        [row[0].ids[0] for row in sample_completions(model, tokenizer, prompts, 1, 1, 0, bf16=on)]
        for on in (False, True)
    ]
    assert sum(a == b for a, b in zip(*likeliest)) >= 60
    drawn = [row[0] for row in sample_completions(warmer, tokenizer, prompts, 1, 8)]
    exact, rounded = (sequence_kl(warmer, model, drawn, bf16=on) for on in (False, True))
    assert 0 < (exact - rounded).abs().mean() < 0.02 * exact.mean()  # 0: nothing was rounded
