"""Which model: the embedded default, a folder, or a name on the Hub. Safetensors only; remote code
is never run.
"""

import os
import threading
from pathlib import Path

import torch

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


class ModelError(RuntimeError):
    """A model or data set cannot be had; the message says why and what to try."""


def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub answers, decided within `timeout` seconds and without retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout)
            answered.set()
        except Exception:  # any failure means the same here: not reachable
            pass

    # In a thread of its own, since looking up a name can outlast every time-out on a broken
    # network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def local_or_hub(name, kind: str = "model") -> dict:
    """Keyword arguments for `from_pretrained`: no network for a folder or a cached model, else the
    Hub.

    Raises ModelError at once where the name is no folder, not cached, and the Hub cannot be
    reached.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return {"local_files_only": True}
    if kind == "model":
        try:
            if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
                return {"local_files_only": True}
        except ValueError as error:  # not a repository's name at all, so a folder that is not there
            raise ModelError(
                f"{str(name)!r} is neither a folder nor a model's name on the Hub."
            ) from error
    if not hub_is_reachable():
        raise ModelError(
            f"{kind} {str(name)!r} is no local folder, is not in the cache, and the Hub cannot be reached. "
            f"Give a folder's path, connect and try again, or leave the {kind} out to use the embedded default."
        )
    return {}


def load_model(name=EMBEDDED, auto_class=None):
    """A causal language model and its tokenizer, float32, without dropout, in evaluation mode.

    `name`: "embedded", a folder in the Hub's format, or a name on the Hub. `auto_class`: another
    `AutoModelFor...`. Raises ModelError where it cannot be had or holds no safetensors weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = EMBEDDED_FOLDER / "model" if name == EMBEDDED else name
    where = local_or_hub(folder)
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(
                f"{path} holds no model: expected config.json and model.safetensors in it."
            )
        if not list(path.glob("*.safetensors")):
            raise ModelError(
                f"{path} has no weights in safetensors format; other formats can run code and are not read."
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        model = (auto_class or AutoModelForCausalLM).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **where
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{str(name)!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    return without_dropout(model).to(pick_device()), tokenizer


def without_dropout(model):
    """The model in evaluation mode, every dropout set to 0: one policy, not a random one at each
    step.

    With dropout on, policy and reference differ before the first step and the initial loss is not
    log 2.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def context_length(model) -> int:
    """How many tokens the model can read at once."""
    return getattr(model.config, "max_position_embeddings", None) or model.config.n_positions


def pick_device() -> str:
    """ "cuda", "mps" or "cpu", the first that is there. DPO_MINI_DEVICE in the environment
    overrides it.
    """
    if os.environ.get("DPO_MINI_DEVICE"):
        return os.environ["DPO_MINI_DEVICE"]
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def save_model(model, tokenizer, folder, card: str) -> None:
    """Write weights (safetensors), tokenizer and model card (README.md) to `folder`, in the Hub's
    format.
    """
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
            if isinstance(value, dict) and "mean" in value
        ]
    return "\n".join(lines) + "\n"
