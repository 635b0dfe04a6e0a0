"""Which model: the embedded default, a folder, or a name on the Hub. Safetensors, never code."""

import copy
import json
import math
import os
import time
from pathlib import Path

import torch

from dpo_mini.hub import HubError, local_or_hub
from dpo_mini.settings import SettingsError

EMBEDDED = "embedded"
SMALL = 20_000_000  # parameters; the embedded model has five million, GPT-2 124 million
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def load_model(name=EMBEDDED, auto_class=None):
    """A causal language model and its tokenizer, float32, without dropout, in evaluation mode.

    `name`: "embedded", a folder in the Hub's format, or a name on the Hub. `auto_class`: another
    `AutoModelFor...`. Raises HubError where it cannot be had or holds no safetensors weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar a tensor is no news
    folder = EMBEDDED_FOLDER / "model" if name == EMBEDDED else name
    where = local_or_hub(folder)
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise HubError(
                f"{path} holds no model: expected config.json and model.safetensors in it."
            )
        if not list(path.glob("*.safetensors")):
            raise HubError(
                f"{path} has no weights in safetensors format; other formats can run code and are "
                "not read."
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        model = (auto_class or AutoModelForCausalLM).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **where
        )
    except (OSError, ValueError, KeyError) as error:
        raise HubError(
            f"{str(name)!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    return fused_gelu(without_dropout(model)).to(pick_device(model.num_parameters())), tokenizer


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


def with_lora(model, rank: int):
    """The model with trainable low-rank adapters on its linear layers; itself where rank is 0."""
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise HubError("LoRA needs peft: pip install '.[lora]' in the project's folder.") from None
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapters)


def merged(model):
    """The model with its adapters, if any, added into its weights: it loads like any other."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def context_length(model) -> int:
    """How many tokens the model can read at once."""
    return getattr(model.config, "max_position_embeddings", None) or model.config.n_positions


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
