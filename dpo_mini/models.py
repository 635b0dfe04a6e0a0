"""Which model: the embedded default, a folder, or a name on the Hub. Safetensors, never code."""

import math
import os
import time
from pathlib import Path

import torch

from dpo_mini.hub import HubError, local_or_hub

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


def model_card(base: str, data: str, settings: dict, report: dict | None = None) -> str:
    """README.md of a trained model: data, base model, settings and what was measured."""
    lines = [
        "---", "library_name: transformers", "tags: [dpo, dpo_mini]", "---", "",
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
