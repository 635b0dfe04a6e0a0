"""Where a command writes: tested before any work, emptied of an earlier run's files, named."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from dpo_mini.data import DataError

# What the verbs write, and what of it a later load would read as part of a model.
MODEL_FILES = (
    "README.md", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
TRAINING_FILES = (
    "checkpoint.safetensors*", "reference_logps.safetensors*", "log.jsonl", "report.json",
    "samples.jsonl", "training.png", "monitor.png", "before_after.png",
)  # fmt: skip
PRETRAINING_FILES = ("pretraining.json", "corpus.*", "checkpoint.pt", "checkpoint.tmp")


def is_main_process() -> bool:
    """Whether this process prints and writes files, by the launcher's environment variable.

    It also answers before the processes have joined; `processes.is_main` is right only after that.
    """
    return os.environ.get("RANK", "0") == "0"


def prepare_folder(folder, *, overwrite=False, resume=False, can_resume=False, model=False) -> Path:
    """Make the output folder, or say at once why it cannot be used. Nothing in it changes yet.

    A folder that is not empty is accepted with `overwrite` or `resume`. `can_resume`: the verb has
    --resume, so that the error's advice may name it. `model`: a model is going to be written there,
    so that another program's is not to be mixed with it. Raises OSError with a sentence.
    """
    folder = Path(folder)
    if not is_main_process():
        return folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; --output must name a folder")
    full = folder.is_dir() and any(folder.iterdir())
    if full and not (overwrite or resume):
        go_on = "--resume to go on with the run in it, " if can_resume else ""
        raise FileExistsError(
            f"{folder} exists and is not empty: add {go_on}--overwrite to replace it, or choose "
            "another --output"
        )
    foreign = matching(folder, MODEL_FILES) if full and model and not is_ours(folder) else []
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0].name}, which dpo-mini did not write; choose another "
            "--output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        said = f"{folder} cannot be written: {error.strerror}; choose another --output"
        raise OSError(said) from error
    return folder


def prepare_file(path, overwrite: bool) -> Path:
    """The same for an output that is one file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --output must name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --output, or add --overwrite")
    prepare_folder(path.parent, overwrite=True)
    if path.exists():
        path.open("a").close()  # it may be read-only where its folder is not
    return path


def is_ours(folder: Path) -> bool:
    """Whether a run of ours wrote what is in the folder, or was about to."""
    from safetensors import SafetensorError, safe_open

    if (folder / "pretraining.json").exists() or "dpo_mini" in front_matter(folder):
        return True
    try:
        with safe_open(folder / "checkpoint.safetensors", "pt") as stored:
            return {"identity", "log"} <= (stored.metadata() or {}).keys()
    except (OSError, SafetensorError):  # none, or no safetensors file
        return False


def matching(folder: Path, patterns) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def empty_of_earlier_run(folder: Path, patterns, inputs=()) -> None:
    """Delete what an earlier run wrote: a template, an adapter or a shard that stayed would be
    used with the new model. A folder that is not ours stays as it is, and so do files that no run
    of ours writes and this run's inputs.
    """
    if not (is_main_process() and is_ours(folder)):
        return
    kept = {Path(path).resolve() for path in inputs if path}
    for path in matching(folder, patterns):
        if path.is_file() and path.resolve() not in kept:
            path.unlink()


def refuse_own_input(folder, model: str) -> None:
    """Raise FileExistsError where the output is the very model that is to be read."""
    if Path(model).is_dir() and Path(model).resolve() == Path(folder).resolve():
        raise FileExistsError(f"{folder} is the model to read: it would be written over; choose "
                              "another --output")  # fmt: skip


def save_report(folder, report: dict, name: str = "report.json") -> dict:
    if is_main_process():
        (Path(folder) / name).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


# --- what a run came from ---


def shown_name(source) -> str:
    """A name on the Hub as it is; of a path only the last part, so that a card shows no folder of
    yours.
    """
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else str(source)


def weights_digest(model) -> str:
    """A short hash of a model's weights, of some thousand numbers of each tensor.

    Quick, and enough to tell a model from what was trained from it: training changes nearly every
    number of a tensor that it trains (with LoRA, of the adapted tensors). Where any change counts,
    as for a checkpoint, `reference.weights_fingerprint` hashes every number.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        numbers = p.detach().flatten()[:: max(1, p.numel() // 4096)].float().cpu().numpy()
        digest.update(f"{name} {tuple(p.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()[:16]


def front_matter(folder) -> str:
    """What stands between the two --- lines of a folder's model card; "" where there is none."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    return found[1] if found else ""


def base_model(folder: str) -> tuple[str, str | None]:
    """What the model in `folder` was trained from, as its card says: a name that loads, and the
    hash of its weights.

    The card has the base's name alone: a folder of that name is looked for beside `folder`, then
    here. Raises DataError where it is not to be found.
    """
    found = re.search(r"^base_model: (.+)$", front_matter(folder), flags=re.M)
    if not found:
        raise DataError(
            f"{folder} has no card that says what it was trained from: give --reference."
        )
    name = found[1].strip("\"'")
    digest = re.search(r'^base_weights: "?(\w+)"?$', front_matter(folder), flags=re.M)
    beside = [Path(folder).resolve().parent / name, Path(name)]
    places = [str(path) for path in beside if (path / "config.json").exists()]
    return (places or [name])[0], digest and digest[1]


def pairs_of_run(folder: str) -> str:
    """The pairs that the run in `folder` was trained on, as its card says: a name that can be read.

    The card has the last part of a path: it is looked for in `folder`, beside it, then here. Raises
    DataError where the card says nothing.
    """
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^Base model: .*Data: `(.+)`\.$", text, flags=re.M)
    if not found:
        raise DataError(f"{folder} has no card that says what it was trained on: give --pairs.")
    name = found[1]
    places = [Path(folder) / name, Path(folder).resolve().parent / name, Path(name)]
    return next((str(path) for path in places if path.exists()), name)
