"""Log-probabilities and samples of the architectures that transformers builds, tiny and random.

The truth is computed here, by the model itself, one row at a time and without padding. Every
shortcut of the library must give the same, or the model must be refused in a sentence.
"""

import functools
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_mini import exactness, fast_logprobs
from dpo_mini.fast_logprobs import completion_logps, exact_reader, read_shared
from dpo_mini.hub import HubError
from dpo_mini.sampling import continuations

WINDOW = 16
# A configuration gets those of these names that it has.
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, head_dim=8,
    bos_token_id=0, eos_token_id=0, pad_token_id=None, is_decoder=True, is_encoder_decoder=False,
    n_embd=32, n_layer=2, n_head=4, n_positions=512, n_inner=48, emb_dim=32, rotary_dim=4,
    d_model=32, n_layers=2, n_heads=4, max_seq_len=512, num_layers=2, ffn_dim=48, dropout=0.0,
    decoder_layers=2, encoder_layers=1, decoder_attention_heads=4, encoder_attention_heads=4,
    decoder_ffn_dim=48, encoder_ffn_dim=48, embedding_size=32, num_kv_heads=2,
    num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_num_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, shared_intermediate_size=16, shared_expert_intermediate_size=16,
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, state_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, lru_width=32,
)  # fmt: skip
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
SOME_SLIDING = dict(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
CONVOLUTION = dict(layer_types=["conv", "full_attention"])
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4,
                original_max_position_embeddings=32)  # fmt: skip

# Attention to all before, positions learned or rotary: these share prompts.
SHARES = {
    name: (name.split("/")[0], {})
    for name in (
        "gpt2 gpt_bigcode gpt_neox codegen gptj opt xglm biogpt ctrl llama mistral/unbounded "
        "qwen2 qwen2_moe qwen3 qwen3_moe gemma phi phimoe stablelm persimmon olmo olmo2 olmoe "
        "falcon nemotron helium glm glm4 ernie4_5 seed_oss smollm3 diffllama arcee "
        "apertus hunyuan_v1_dense bitnet doge dots1 jetmoe minimax_m2 mixtral starcoder2 "
        "bert-generation"
    ).split()
}
SHARES["mistral/unbounded"] = ("mistral", dict(sliding_window=None))
SHARES["minimax/full"] = ("minimax", dict(layer_types=["full_attention"] * 2))
SHARES["deepseek_v3"] = ("deepseek_v3", dict(head_dim=4, num_key_value_heads=4))
# The same with windows that are longer than every row here.
SHARES |= {
    f"{kind}/wide": (kind, dict(sliding_window=500))
    for kind in ("mistral", "phi3", "gpt_oss", "olmo3", "gemma3_text", "exaone4")
}

# Windows shorter than the rows.
WINDOWS = {
    f"{kind}/window": (kind, dict(sliding_window=WINDOW))
    for kind in "mistral mixtral ministral ministral3 gemma2 phi3 starcoder2 gpt_oss".split()
}
WINDOWS |= {f"{kind}/window": (kind, SOME_SLIDING) for kind in ("qwen2", "qwen3")}
WINDOWS |= {
    f"{kind}/window": (kind, SLIDING) for kind in ("gemma3_text", "olmo3", "cohere2", "exaone4")
}
WINDOWS["gpt_neo/local"] = (
    "gpt_neo", dict(attention_types=[[["global", "local"], 1]], window_size=WINDOW),
)  # fmt: skip
WINDOWS["llama4_text/chunks"] = (
    "llama4_text",
    dict(attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"]),
)
WINDOWS["modernbert-decoder"] = (
    "modernbert-decoder",
    dict(SLIDING, pad_token_id=0, local_attention=WINDOW),
)

# Biases by distance, states that run through a row, positions of their own.
STATES = {
    "bloom": ("bloom", {}), "mpt": ("mpt", {}), "openai-gpt": ("openai-gpt", {}),
    "falcon/alibi": ("falcon", dict(alibi=True, new_decoder_architecture=False)),
    "mamba": ("mamba", {}), "falcon_mamba": ("falcon_mamba", {}), "rwkv": ("rwkv", {}),
    "mamba2": ("mamba2", dict(num_heads=8, head_dim=8, expand=2, n_groups=1, chunk_size=8)),
    "recurrent_gemma": (
        "recurrent_gemma", dict(num_hidden_layers=3, attention_window_size=WINDOW)),
    "bamba": ("bamba", dict(attn_layer_indices=[1])),
    "jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                            expert_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False)),
    "falcon_h1": ("falcon_h1", dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8)),
    "granitemoehybrid": ("granitemoehybrid", dict(layer_types=["mamba", "attention"])),
    "qwen3_next": ("qwen3_next", LINEAR), "qwen3_5_text": ("qwen3_5_text", LINEAR),
    "minimax": ("minimax", LINEAR), "lfm2": ("lfm2", CONVOLUTION), "lfm3": ("lfm3", CONVOLUTION),
    "lfm2_moe": ("lfm2_moe", dict(CONVOLUTION, num_dense_layers=1)),
    "olmo_hybrid": ("olmo_hybrid", LINEAR), "bart": ("bart", {}),
    "roberta": ("roberta", dict(pad_token_id=1)),
}  # fmt: skip

# Logits that are more than the head on the last hidden state, and positions of the batch.
HEADS = {name: (name, {}) for name in "cohere gemma2 vaultgemma nanochat bert".split()}
HEADS["phi3/longrope"] = ("phi3", dict(
    rope_parameters=LONGROPE, original_max_position_embeddings=32, max_position_embeddings=128,
))  # fmt: skip
HEADS["whisper"] = ("whisper", {})
TABLE = SHARES | WINDOWS | STATES | HEADS

# No completion has a log-probability under these.
REFUSED = {
    "bert/both ways": ("bert", dict(is_decoder=False)), "xlnet": ("xlnet", {}),
    "llama/dynamic": ("llama", dict(
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
        max_position_embeddings=32,
    )),
}  # fmt: skip
LACKS = {"falcon": {"head_dim"}, "xlnet": {"max_position_embeddings"}}  # SMALL's names, no setting


@functools.cache
def build(name):
    kind, special = (TABLE | REFUSED)[name]
    configuration = CONFIG_MAPPING[kind]
    known, lacks = configuration(), LACKS.get(kind, set())
    settings = {k: v for k, v in SMALL.items() if k not in lacks and hasattr(known, k)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(**(settings | special))).float()
    model.generation_config = GenerationConfig()
    return model


def some_ids(n, seed):
    return torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG, SHORT = some_ids(24, 1), some_ids(9, 2)
# A prompt longer than the window with short completions, and the reverse: 30 to 70 nats or more.
ROWS = [(LONG, some_ids(14, 3)), (LONG, some_ids(9, 4)), (LONG, some_ids(12, 5)),
        (SHORT, some_ids(30, 6)), (SHORT, some_ids(6, 7))]  # fmt: skip
WEIGHTS = torch.tensor([1.0, -0.5, 0.3, -1.0, 0.7])


def alone(model, rows):
    """log pi of each row by the model itself: one row, no padding, no masks, no positions."""
    logps = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1)[range(len(completion)), completion].sum())
    return torch.stack(logps)


def gradients(model, logps):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logps * WEIGHTS).sum(), parameters, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_log_probabilities_are_those_of_each_row_alone(name):
    """To 1e-4 of 50 nats, in value; gradients to 1e-3 of their largest."""
    model = build(name).eval()
    expected, found = alone(model, ROWS), completion_logps(model, ROWS)
    assert expected.abs().mean() > 30 and (expected - found).abs().max() < 5e-3
    for a, b in zip(gradients(model, expected), gradients(model, found), strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_greedy_samples_are_generates(name):
    """Of prompts of two lengths, one of them twice, past the window, against `generate` of each."""
    model, tokens, expected = build(name).eval(), 10, []
    for prompt in (LONG, SHORT):
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        expected.append(output[0, len(prompt) :].tolist())
    u = torch.zeros(tokens, 3)
    assert continuations(model, [LONG, SHORT, LONG], u, temperature=0) == [*expected, expected[0]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_log_probability_is_refused_in_a_sentence(name):
    with pytest.raises(HubError, match="reads tokens that come later|cannot be trusted beyond"):
        completion_logps(build(name), ROWS)


@pytest.mark.parametrize("name", SHARES)
def test_prompts_are_shared_wherever_that_is_exact(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exact_reader(build(name).eval(), ROWS) is read_shared


@pytest.mark.parametrize("name", {**WINDOWS, **STATES})
def test_the_table_sees_a_prompt_that_is_shared_where_it_may_not_be(name):
    """The fault put in: had these models shared, the numbers would be wrong, or none."""
    model = build(name).eval()
    try:
        with torch.no_grad():
            far = (read_shared(model, ROWS) - alone(model, ROWS)).abs().max()
    except (RuntimeError, ValueError, AttributeError):
        return
    assert far > 5e-3


def test_a_slower_way_is_said_once():
    exactness.SAID.pop(build("mistral/window"), None)
    with pytest.warns(UserWarning, match="Mistral.*window of 16.*slower way, which is exact"):
        completion_logps(build("mistral/window"), ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        completion_logps(build("mistral/window"), ROWS)


@pytest.mark.parametrize("name", ["mistral/window", "gpt_neo/local"])
def test_a_window_counts_the_whole_row_that_is_read(name):
    """Rows that fit into the window share; not so once a prompt and all its completions do not."""
    model, prompt = build(name).eval(), some_ids(8, 8)
    fits = [(prompt, some_ids(4, 9)), (prompt, some_ids(4, 10))]
    beyond = [*fits, (prompt, some_ids(8, 11))]
    assert exact_reader(model, fits) is read_shared
    assert exact_reader(model, beyond) is not read_shared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mistral/window", "gpt_neo/local", "mamba2", "recurrent_gemma"])
def test_a_trial_finds_what_a_configuration_does_not_say(name, monkeypatch):
    monkeypatch.setitem(exactness.AGAINST, "share", lambda model, packed, longest: "")
    model = build(name).eval()
    monkeypatch.setattr(exactness, "TRIALS", type(exactness.TRIALS)())
    assert exact_reader(model, ROWS) is not read_shared


def test_a_cap_is_seen_while_logits_are_small():
    """A softcap of 30 changes nothing at logits of 1e-3, and much once they have grown."""
    model = build("gemma2").eval()
    head = model.lm_head.weight.data
    kept = head.clone()
    try:
        head.mul_(1e-3)
        ids = torch.tensor([LONG])
        hidden = model.base_model(ids).last_hidden_state
        assert torch.allclose(model(ids).logits, model.lm_head(hidden), atol=1e-4)
        assert not exactness.is_body_then_head(model)
    finally:
        head.copy_(kept)
    assert exactness.is_body_then_head(build("gpt2"))


def test_a_configuration_is_asked_at_the_lengths_at_hand():
    model = build("mistral/window")
    assert "window of 16" in exactness.against_sharing(model, 17, 17)
    assert exactness.against_sharing(model, 16, 16) == ""


def test_trials_are_kept_by_size():
    """Exact for longer rows: so for shorter ones. Wrong for shorter ones: so for longer ones."""
    model, asked = torch.nn.Linear(1, 1), []
    model.device = torch.device("cpu")

    def outcome(size, reason):
        return exactness.tried(model, "share", size, lambda: asked.append(size) or reason)

    assert outcome((40, 30), "") == "" and outcome((40, 20), "") == "" == outcome((10, 10), "")
    assert outcome((80, 30), "wrong") == "wrong" == outcome((90, 50), "")
    assert outcome((60, 25), "") == "" == outcome((30, 35), "")  # longer in one of the two lengths
    assert asked == [(40, 30), (80, 30), (60, 25), (30, 35)]


def test_there_are_enough_architectures():
    assert len({kind for kind, _ in TABLE.values()}) >= 45


@pytest.mark.filterwarnings("ignore")
def test_rwkv_is_sampled_one_row_at_a_time():
    """transformers mixes up the states of several RWKV rows; a trial sees it."""
    model, rows = build("rwkv").eval(), [LONG, LONG[::-1]]
    u = torch.zeros(8, 2)
    one_by_one = [continuations(model, [row], u[:, :1], temperature=0)[0] for row in rows]
    assert continuations(model, rows, u, temperature=0) == one_by_one


def test_train_mode_with_dropout_changes_nothing(gpt2):
    expected = completion_logps(gpt2, ROWS[3:4]).detach()
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert torch.equal(completion_logps(gpt2.train(), ROWS[3:4]), expected)
    assert not gpt2.training


def test_ids_that_the_model_does_not_know_are_refused(gpt2):
    from dpo_mini.data import DataError

    for row in (([1, 97], [2]), ([1], [2, -1]), ([1], []), ([], [1])):
        with pytest.raises(DataError, match="token"):
            completion_logps(gpt2, [row])


def test_the_shortcuts_that_are_tried_are_those_that_are_read():
    assert set(fast_logprobs.READERS) <= set(exactness.AGAINST)
