"""Which model: the embedded default, a folder, or a name on the Hub. Safetensors, never code."""

import copy
import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dpo_mini.data import DataError
from dpo_mini.hub import HubError, local_or_hub
from dpo_mini.settings import SettingsError, check_whole

EMBEDDED = "embedded"
SMALL = 20_000_000  # parameters; the embedded model has five million, GPT-2 124 million
MOST_RANK = 2**14
ANY_LENGTH = 2**31  # tokens; more than any row has
# Where configurations state their context: most of them, GPT-2, MPT, RWKV, Whisper.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
                 "max_target_positions")  # fmt: skip
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def named_folder(name: str) -> Path | None:
    """Where a model with a name of ours lies, None for any other: "embedded" ships, "smollm2" is in
    the user's cache once `dpo-mini fetch smollm2` has put it there.
    """
    cache = Path(os.environ.get("DPO_MINI_CACHE", "~/.cache/dpo_mini")).expanduser()
    return {EMBEDDED: EMBEDDED_FOLDER / "model", "smollm2": cache / "smollm2"}.get(str(name))


def load_model(name=EMBEDDED, auto_class=None):
    """A causal language model and its tokenizer, float32, without dropout, in evaluation mode.

    `name`: "embedded", a folder in the Hub's format, or a name on the Hub. A folder that holds an
    adapter (peft) gives its base model with the adapter added in. `auto_class`: another
    `AutoModelFor...`. Raises HubError where the model cannot be had, or is damaged: every weight
    must be there, have its shape and come from a safetensors file.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar a tensor is no news
    folder = named_folder(name) or name
    if folder != name and not folder.is_dir():
        raise HubError(f"{name} is not on this computer yet: `dpo-mini fetch {name}` brings it.")
    auto_class = auto_class or AutoModelForCausalLM
    if (Path(folder) / "adapter_config.json").exists():
        model, tokenizer = load_adapted(Path(folder), auto_class)
    else:
        where = local_or_hub(folder)
        if Path(folder).is_dir():
            check_folder(Path(folder))
        tokenizer = load_tokenizer(folder, where)
        model = load_weights(folder, where, auto_class)
    return fused_gelu(without_dropout(model)).to(pick_device(model.num_parameters())), tokenizer


def check_folder(folder: Path) -> None:
    """Raises HubError for a folder that is no model, or whose files lead out of it."""
    if not (folder / "config.json").exists():
        raise HubError(
            f"{folder} holds no model: expected config.json and model.safetensors in it."
        )
    if not list(folder.glob("*.safetensors")):
        raise HubError(
            f"{folder} has no weights in safetensors format; other formats can run code and are "
            "not read."
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise damaged(folder, error, index.name) from error
        for shard in shards:
            if Path(str(shard)).name != shard or not (folder / shard).is_file():
                raise HubError(
                    f"{index} names {shard!r}, which is no file in its folder. Download the model "
                    "again."
                )


def load_tokenizer(folder, where: dict):
    """The tokenizer of a folder or a name on the Hub. Raises HubError where it is damaged."""
    from transformers import AutoTokenizer

    with damage_in_a_sentence(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)


def load_weights(folder, where: dict, auto_class):
    """The model of a folder or a name on the Hub, float32, every weight read from its files.

    transformers gives random numbers to weights that are missing, and says so in a log that few
    read. Here a missing or misshapen weight is an error.
    """
    from transformers import AutoConfig

    with damage_in_a_sentence(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **where)
        # transformers' own choice: a configuration can name a kernel's repository, whose code would
        # be fetched and run.
        config._attn_implementation = None
        if hasattr(config, "rescale_every"):  # RWKV halves weights in place, for float16 alone
            config.rescale_every = 0
        if Path(folder).is_dir():
            check_size(Path(folder), config, auto_class)
        model, loading = auto_class.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            **where,
        )  # fmt: skip
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(key[0]) for key in loading["mismatched_keys"])
    # A weight of a numbered layer that was not built: without it this is another model.
    spare = [k for k in loading["unexpected_keys"] if re.search(r"\.\d+\..*weight$", f".{k}")]
    for keys, fault in (
        (missing, "are missing in its files"),
        (mismatched, "have another shape than its configuration says"),
        (sorted(spare), "have no place in the model that its configuration describes"),
    ):
        if keys:
            raise HubError(
                f"{str(folder)!r} is not whole: {len(keys)} weights {fault}, the first is "
                f"{keys[0]!r}. Was it saved as a {type(model).__name__}? Download or save it again."
            )
    return model


def check_size(folder: Path, config, auto_class) -> None:
    """Raises HubError where a configuration describes more than the folder's files hold.

    Asked before the model is built: what a damaged number describes could fill all memory.
    """
    from safetensors import safe_open

    sizes = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            sizes += [math.prod(weights.get_slice(k).get_shape()) for k in weights.keys()]
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(sizes):
        raise HubError(
            f"{str(folder)!r} is not whole: config.json says {layers!r} layers, and its files hold "
            f"{len(sizes)} weights. Download or save it again."
        )
    if getattr(config, "quantization_config", None):
        return  # several numbers are packed into one
    with torch.device("meta"):  # shapes without memory
        described = auto_class.from_config(config).num_parameters()
    if described > 2 * sum(sizes):  # fewer are found, and named, when the weights are read
        raise HubError(
            f"{str(folder)!r} is not whole: config.json describes {described:,} parameters, and "
            f"its files hold {sum(sizes):,}. Download or save it again."
        )


@contextmanager
def damage_in_a_sentence(folder):
    """Turns whatever transformers raises over a damaged folder into a HubError."""
    try:
        yield
    except (HubError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers' own panics are no Exceptions
        raise damaged(folder, error) from error


def damaged(folder, error: BaseException, file: str = "") -> HubError:
    said = " ".join(str(error).split()) or type(error).__name__
    which = f"{str(folder)!r}, file {file}," if file else repr(str(folder))
    return HubError(f"{which} cannot be loaded: {said[:200]}. Download or save it again.")


def load_adapted(folder: Path, auto_class):
    """The base model of an adapter's folder with the adapter added into its weights, and the
    folder's tokenizer, or the base's where it has none.
    """
    peft = import_peft()
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    if not (folder / "adapter_model.safetensors").exists():
        raise HubError(f"{folder} has no adapter_model.safetensors; other formats can run code.")
    with damage_in_a_sentence(folder):
        config = peft.PeftConfig.from_pretrained(folder)
        base = str(config.base_model_name_or_path)
    if (Path(base) / "adapter_config.json").exists():
        raise HubError(
            f"the base model of {folder}, {base!r}, is an adapter itself: merge it first."
        )
    model, tokenizer = load_model(base, auto_class)
    with damage_in_a_sentence(folder):
        adapted = peft.get_peft_model(model, config)
        weights = load_peft_weights(folder, device="cpu")
        loading = set_peft_model_state_dict(adapted, weights)
    adapters = {name for name, _ in adapted.named_parameters() if config.peft_type.lower() in name}
    missing = sorted(adapters & set(loading.missing_keys)) + sorted(loading.unexpected_keys)
    if missing:
        raise HubError(
            f"{str(folder)!r} is not whole: the adapter's weight {missing[0]!r} is missing, or not "
            f"for {base!r}. Save it again."
        )
    if (folder / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(folder, {"local_files_only": True})
    return merged(adapted), tokenizer


def without_dropout(model):
    """The model in evaluation mode, every dropout set to 0.

    With dropout on, policy and reference differ before the first step: no initial loss of log 2.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def fused_gelu(model):
    """The model with GPT-2's `gelu_new`, eight operations in transformers, as torch's one."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
    return model


def with_lora(model, rank: int, seed: int = 0):
    """The model with trainable low-rank adapters on its linear layers; itself where rank is 0.

    The same `seed` gives the same adapters. torch's global random state stays as it was. Raises
    SettingsError for a rank out of range, HubError where peft is not installed.
    """
    check_whole("the LoRA rank", rank, 0, MOST_RANK, "Try 8; 0 trains all weights.")
    if not rank:
        return model
    peft = import_peft()
    adapters = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, adapters).eval()


def import_peft():
    try:
        import peft
    except ImportError:
        raise HubError("LoRA needs peft: pip install '.[lora]' in the project's folder.") from None
    return peft


def merged(model):
    """The model with its adapters, if any, added into its weights: it loads like any other."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def prompt_prefix(model) -> str:
    """What every plain prompt of this model begins with: "" for most, kept in its configuration."""
    return getattr(model.config, "prompt_prefix", "")


def context_length(model) -> int:
    """How many tokens the model can read at once; ANY_LENGTH where its configuration sets no limit
    (recurrent models, and attention biased by distance: Mamba, Bloom).
    """
    stated = model.config.get_text_config(decoder=True).to_dict()
    lengths = [stated[name] for name in CONTEXT_NAMES if isinstance(stated.get(name), int)]
    embeddings = getattr(model.base_model, "embeddings", None)
    before = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    unused = 0 if before is None else before + 1  # RoBERTa's first position is the third of 514
    return lengths[0] - unused if lengths else ANY_LENGTH


def check_ids(model, ids: Sequence[int]) -> None:
    """Raises DataError where there are no ids, or one that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    if not ids:
        raise DataError("a prompt or a completion has no tokens: nothing to predict from, or of.")
    if min(ids) < 0 or max(ids) >= known:
        raise DataError(
            f"the token id {min(ids) if min(ids) < 0 else max(ids)} is unknown to the model, which "
            f"knows 0 to {known - 1}. Were the ids made with another model's tokenizer?"
        )


def same_tokenizer(one, other) -> bool:
    """Do two tokenizers give the same ids? Only then can two models be compared token by token.

    Compares the vocabularies, BOS, EOS and the ids of a text of many kinds.
    """
    return all(
        read(one) == read(other)
        for read in (
            lambda t: (t.bos_token_id, t.eos_token_id),
            lambda t: t(PROBE)["input_ids"],
            lambda t: t.get_vocab(),
        )
    )


PROBE = (
    "It's 12,345.67 — naïve Café déjà vu!  Two  spaces,\na line\tand a tab; это, 日本語 🙂 <b>x</b>"
)


def pick_device(parameters: float = math.inf) -> str:
    """Where a model of so many parameters goes: the first that is there of CUDA (each process its
    own GPU), MPS and CPU; the CPU for one below SMALL, which would hardly be faster elsewhere, and
    whose numbers the course asserts. DPO_MINI_DEVICE in the environment overrides it.
    """
    if os.environ.get("DPO_MINI_DEVICE"):
        return os.environ["DPO_MINI_DEVICE"]
    if parameters < SMALL:
        return "cpu"
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def in_bfloat16(model, on: bool = True):
    """A context in which the model's products are taken in bfloat16, by autocast; `on` False:
    nothing changes. bfloat16 has float32's range: no gradient needs scaling.

    Weights are cast once in the context, so leave it before they change.
    """
    return torch.autocast(model.device.type, torch.bfloat16, enabled=on)


def bfloat16_pays(device: str = "cpu") -> bool:
    """Whether a matrix product is faster in bfloat16 than in float32, by a trial of some 10 ms.

    A CPU without instructions for bfloat16 emulates them, a hundred times slower.
    """
    if str(device).startswith("cuda"):
        return torch.cuda.is_bf16_supported()

    def seconds(dtype):
        factor = torch.ones(256, 256, dtype=dtype, device=device)
        times = []
        for _ in range(4):  # the first one also chooses the kernel
            start = time.perf_counter()
            factor @ factor
            times.append(time.perf_counter() - start)
            if times[-1] > 0.01:
                break
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def save_model(model, tokenizer, folder, card: str) -> None:
    """Write weights (safetensors), tokenizer and card (README.md) to `folder`, as the Hub does."""
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    base: str, data: str, settings: dict, report: dict | None = None, base_weights: str = ""
) -> str:
    """README.md of a trained model: data, base model, settings and what was measured.

    `base_weights`: a hash of the base model's weights, by which it is known again.
    """
    lines = [
        "---", f"base_model: {json.dumps(base)}",
        *([f"base_weights: {json.dumps(base_weights)}"] if base_weights else []),
        "library_name: transformers", "tags: [dpo, dpo_mini]", "---", "",
        f"# {base}, trained with dpo_mini", "",
        f"Base model: `{base}`. Data: `{data}`.", "", "| setting | value |", "|---|---|",
        *(f"| {key} | {value} |" for key, value in settings.items()),
    ]  # fmt: skip
    if report:
        lines += ["", "| measured | mean | 95% interval |", "|---|---|---|"]
        lines += [
            f"| {key} | {value['mean']:.3f} | {value['low']:.3f} to {value['high']:.3f} |"
            for key, value in report.items()
            if isinstance(value, dict) and value.get("low") is not None  # None: of one prompt
        ]
    return "\n".join(lines) + "\n"


def cooled(model, temperature: float):
    """A copy of the model whose logits are all divided by `temperature`, inside its weights.

    Sampling, log-probabilities and KL then all mean the one distribution softmax(logits / T). Right
    for models whose logits are head(norm(hidden)), scaled or softly capped or not: the last norm is
    divided by T. A trial compares the logits, as they are and a thousand times larger; raises
    HubError where they are not as they should be.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise SettingsError(f"temperature must be a finite number above 0, got {temperature}.")
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(16, device=model.device).view(2, 8) * 7) % vocabulary
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        for shift in (0.0, 1.0):
            trials = {t: with_last_norm_divided(model, ids, t, shift) for t in (1e-3, temperature)}
            if all(m and close(m(input_ids=ids).logits * t, logits) for t, m in trials.items()):
                return trials[temperature]
    raise HubError(
        f"the logits of a {model.config.model_type} model are not its head's of a last norm, so "
        "that they cannot be divided by a temperature in its weights; sample with --temperature."
    )


def close(a, b) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def with_last_norm_divided(model, ids, temperature: float, shift: float):
    """A copy whose norm before the head gives its output divided by `temperature`; None where no
    norm gives what the head reads. `shift`: the norm multiplies by weight + shift; Gemma's is 1.
    """
    model = copy.deepcopy(model)
    head, outputs, read = model.get_output_embeddings(), [], []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))]
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            hooks.append(module.register_forward_hook(lambda m, _, out: outputs.append((m, out))))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    norms = [m for m, output in outputs if m.weight.ndim == 1 and torch.equal(output, read[-1])]
    if not norms:
        return None
    norm, text_config = norms[-1], model.config.get_text_config()
    norm.weight.data = (norm.weight + shift) / temperature - shift
    for module in (norm, head):
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias / temperature
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap:  # cap tanh(l / cap) / T = (cap / T) tanh((l / T) / (cap / T))
        text_config.final_logit_softcapping = cap / temperature
    return model
