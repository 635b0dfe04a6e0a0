"""Hand a finished run over to another tool: its pairs, its settings in the tool's names, its log.

A tool trains the same only where it reads the same token ids in the same order, with the same loss
and the same rates. Each writer makes a folder that holds what it needs for that, and says in its
README what the tool does otherwise. Whoever trains there compares with `expected.jsonl`.
"""

import json
import pprint
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from dpo_mini.checkpoints import CHECKPOINT, read_checkpoint
from dpo_mini.data import DataError, preference_pairs, read_rows, write_jsonl
from dpo_mini.family import LOSSES
from dpo_mini.models import context_length, load_model, named_folder, save_model
from dpo_mini.reference import data_fingerprint
from dpo_mini.settings import TrainingConfig, TrainingError
from dpo_mini.tokens import TokenizedPair, tokenize_pairs
from dpo_mini.training import batch_indices

# TRL's was compared step by step; of the others notebook 19 says how far they were checked.
VERSIONS = {
    "trl": ("1.16.0",),
    "llama-factory": ("0.9.5",),
    "axolotl": ("0.19.0",),
    "unsloth": ("2026.10.9",),
}
PACKAGES = {"llama-factory": "llamafactory"}  # where the package has another name than the tool
SCRIPTS = Path(__file__).parent / "exported"
# TRL's `loss_type` of our losses. Its "ipo" divides by lengths; there is none for our "ipo".
TRL_LOSSES = {
    "dpo": "sigmoid", "robust": "robust", "dpo-norm": "sigmoid_norm", "ipo-token": "ipo",
    "hinge": "hinge", "apo-zero": "apo_zero", "apo-down": "apo_down",
}  # fmt: skip
LLAMA_FACTORY_LOSSES = {
    "dpo": "sigmoid", "cdpo": "sigmoid", "ipo-token": "ipo", "hinge": "hinge", "simpo": "simpo",
    "orpo": "orpo",
}  # fmt: skip


class FinishedRun(NamedTuple):
    """What a run's folder says of it, and the pairs that it was trained on."""

    config: TrainingConfig
    loss: str
    options: dict  # the loss's own arguments
    lora: int  # rank of the adapters, 0 for none
    base: str  # what it was trained from: a name that `load_model` loads
    pairs: list[TokenizedPair]
    tokenizer: object
    log: list[dict]  # a row for each step


def read_run(folder, base: str, pairs: str, split: str = "train") -> FinishedRun:
    """The run whose checkpoint is in `folder`. `base` and `pairs`: where its model and pairs are.

    Raises DataError where the pairs are not those of the run, TrainingError for a run of another
    kind than preference training on pairs.
    """
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        raise DataError(
            f"{folder} holds no checkpoint, so that its settings are not known. Give the --output "
            "of `dpo-mini train` or `dpo-mini demo`."
        )
    metadata = read_checkpoint(path)[1]
    identity, log = json.loads(metadata["identity"]), json.loads(metadata["log"])
    loss = identity.get("loss", identity.get("objective"))
    if loss not in LOSSES:
        raise TrainingError(
            f"{folder} was trained with {loss}. What can be exported is preference training on "
            f"pairs: {', '.join(LOSSES)}."
        )
    model, tokenizer = load_model(base)
    rows = preference_pairs(read_rows(pairs, split))
    tokenized = tokenize_pairs(rows, tokenizer, context_length(model), drop_long=True)
    if data_fingerprint(tokenized) != identity["data"]:
        raise DataError(
            f"{pairs} has not the pairs of {folder}, or {base} another tokenizer than its base. "
            "Give the --pairs and the --model that it was trained with."
        )
    names = {f.name for f in fields(TrainingConfig)}
    config = TrainingConfig(**{k: v for k, v in identity.items() if k in names})
    options = {
        k: identity[k] for k in ("beta", "label_smoothing", "gamma", "alpha") if k in identity
    }
    return FinishedRun(config, loss, options, identity["lora"], base, tokenized, tokenizer, log[1:])


def known_version(tool: str, asked: str | None = None) -> str:
    """The version to write for: the one asked for, else the installed one, else the newest known.

    Raises DataError for a version that nobody checked.
    """
    package, known = PACKAGES.get(tool, tool), VERSIONS[tool]
    try:
        wanted = asked or version(package)
    except PackageNotFoundError:
        wanted = known[-1]
    if wanted not in known:
        raise DataError(
            f"{tool} {wanted} was not checked against this library; {', '.join(known)} was. A "
            f"setting may mean another thing there. Try: pip install {package}=={known[-1]}, or "
            f"--tool-version {known[-1]}."
        )
    return wanted


def export(run: FinishedRun, tool: str, folder, asked: str | None = None) -> dict:
    """Write the folder for one of VERSIONS; returns what was written, for people to read."""
    tool_version = known_version(tool, asked)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = model_for(run, folder)
    write = {"trl": write_script, "unsloth": write_script, "llama-factory": write_llama_factory,
             "axolotl": write_axolotl}[tool]  # fmt: skip
    report = {"tool": tool, "version": tool_version, "pairs": len(run.pairs)}
    report |= write(run, tool, folder, model)
    (folder / "README.md").write_text(readme(run, report), encoding="utf-8")
    return report


def model_for(run: FinishedRun, folder: Path) -> str:
    """What the tool is to load: a name on the Hub, or "base", a copy in `folder` of what is not on
    the Hub.
    """
    if not (named_folder(run.base) or Path(run.base).is_dir()):
        return run.base
    model, tokenizer = load_model(run.base)
    save_model(model, tokenizer, folder / "base", f"# The reference, {Path(run.base).name}\n")
    return "base"


# --- settings ---


def micro_batch(config: TrainingConfig) -> tuple[int, int]:
    """Pairs at once, and how often the gradient is added up before a step.

    Raises DataError where the parts are unequal: a tool's mean of means is then another loss.
    """
    size = config.micro_batch_size or config.batch_size
    if config.batch_size % size:
        raise DataError(
            f"a batch of {config.batch_size} in parts of {size} has unequal parts, whose means the "
            "tools average without their sizes. Train with a --micro-batch-size that divides it."
        )
    return size, config.batch_size // size


def trl_loss(run: FinishedRun) -> dict:
    """The loss in TRL's words. Raises DataError for a loss that its DPOTrainer has not.

    TRL ignores `label_smoothing` for "sigmoid". With L and L' DPO's loss of the label and of its
    opposite, "robust" is ((1 - eps) L - eps L') / (1 - 2 eps), so that conservative DPO is a
    weighted sum of the two:

        (1 - eps) L + eps L'  =  2 (1 - eps) sigmoid - (1 - 2 eps) robust
    """
    eps = run.options.get("label_smoothing", 0.0)
    if run.loss == "cdpo" and eps:
        weights = [2 * (1 - eps), -(1 - 2 * eps)]
        named = {"loss_type": ["sigmoid", "robust"], "loss_weights": weights}
        return {**named, "label_smoothing": eps, "beta": run.options["beta"]}
    name = "dpo" if run.loss == "cdpo" else run.loss
    if name not in TRL_LOSSES:
        raise DataError(
            f"TRL's DPOTrainer has no loss that equals {run.loss}; it has those of "
            f"{', '.join([*TRL_LOSSES, 'cdpo'])}."
        )
    more = {"label_smoothing": eps} if name == "robust" else {}
    return {"loss_type": [TRL_LOSSES[name]], "beta": run.options["beta"], **more}


def trl_arguments(run: FinishedRun) -> dict:
    """The run's settings as arguments of TRL's DPOConfig, with all that it would do by itself."""
    config, (size, times) = run.config, micro_batch(run.config)
    return {
        **trl_loss(run),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": times,
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,  # TRL's default is True
        "seed": config.seed,
        "max_length": None,  # TRL's default cuts at 1024 tokens
        "disable_dropout": True,
        "gradient_checkpointing": False,  # TRL's default is True: the same numbers, more time
        "precompute_ref_log_probs": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }


def lora_arguments(run: FinishedRun) -> dict | None:
    """`models.with_lora`'s adapters as arguments of peft's LoraConfig."""
    if not run.lora:
        return None
    adapters = {"r": run.lora, "lora_alpha": 2 * run.lora, "lora_dropout": 0.0}
    return {**adapters, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# --- TRL and Unsloth: a script ---

UNSLOTH_MODEL = '''
def load_model():
    """Policy and tokenizer, made by Unsloth. Unsloth must be imported before TRL."""
    from unsloth import FastLanguageModel

    name, seed = SETTINGS["model"], SETTINGS["arguments"]["seed"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(HERE / name) if (HERE / name).is_dir() else name,
        max_seq_length=SETTINGS["longest"], dtype=None, load_in_4bit=False,
        full_finetuning=not SETTINGS["lora"],
    )
    if SETTINGS["lora"]:
        adapters = {k: v for k, v in SETTINGS["lora"].items() if k != "task_type"}
        model = FastLanguageModel.get_peft_model(
            model, **adapters, bias="none", random_state=seed, use_gradient_checkpointing=False
        )
    return model, tokenizer


'''


def write_script(run: FinishedRun, tool: str, folder: Path, model: str) -> dict:
    """train.py for TRL or Unsloth, pairs.jsonl with token ids, order.json, expected.jsonl."""
    config = run.config
    settings = {
        "tool": tool, "versions": list(VERSIONS[tool]), "model": model,
        "arguments": trl_arguments(run), "schedule": config.schedule,
        "warmup_steps": config.warmup_steps, "lora": lora_arguments(run), "longest": longest(run),
    }  # fmt: skip
    text = (SCRIPTS / "trl_dpo.py").read_text(encoding="utf-8")
    if tool == "unsloth":
        before, rest = text.split("# --- the model ---\n")
        text = before + "# --- the model ---\n" + UNSLOTH_MODEL + "# --- the trainer ---"
        text += rest.split("# --- the trainer ---")[1]
    written = f"SETTINGS = {pprint.pformat(settings, width=96, sort_dicts=False)}"
    (folder / "train.py").write_text(text.replace("SETTINGS = {}", written, 1), encoding="utf-8")
    write_jsonl(folder / "pairs.jsonl", [as_ids(pair, run.tokenizer) for pair in run.pairs])
    (folder / "order.json").write_text(json.dumps(order(run)), encoding="utf-8")
    write_jsonl(folder / "expected.jsonl", run.log)
    return {"files": ["train.py", "pairs.jsonl", "order.json", "expected.jsonl"],
            "settings": settings["arguments"], "run": "python train.py"}  # fmt: skip


def longest(run: FinishedRun) -> int:
    """Tokens of the longest row of any pair."""
    return max(len(p) + len(c) for pair in run.pairs for p, c in pair.rows)


def order(run: FinishedRun) -> list[int]:
    """Which pairs the steps read, one batch after the other."""
    config = run.config
    where = config.batch_size, config.block_size, config.seed
    steps = (batch_indices(len(run.pairs), step, *where) for step in range(config.steps))
    return [i for indices in steps for i in indices]


def as_ids(pair: TokenizedPair, tokenizer) -> dict:
    """A row in the columns that TRL's collator reads, and its texts for people."""
    texts = literal(pair, tokenizer)
    return {**vars(pair), "text": texts}


# --- LLaMA-Factory and Axolotl: a configuration, and rows of text ---


def literal(pair: TokenizedPair, tokenizer) -> dict[str, str]:
    """Prompt and answers as texts in which BOS, EOS and markup are written out."""

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return {name.removesuffix("_ids"): text(ids) for name, ids in vars(pair).items()}


def reads_apart(tokenizer, texts: dict[str, str]) -> list[list[int]]:
    """The ids of prompt, chosen and rejected where a tool tokenises each by itself."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.values()]


def reads_joined(tokenizer, texts: dict[str, str]) -> list[list[int]]:
    """The ids where a tool tokenises prompt and answer in one piece, as TRL does of a text, and
    ends every answer with EOS.
    """
    eos, opening = tokenizer.eos_token, without_bos(tokenizer, texts["prompt"])
    answers = [text if text.endswith(eos) else text + eos for text in list(texts.values())[1:]]
    prompt = tokenizer(opening)["input_ids"]
    whole = [tokenizer(opening + answer)["input_ids"] for answer in answers]
    return [prompt, *(ids[len(prompt) :] for ids in whole)]


def without_bos(tokenizer, text: str) -> str:
    """The text without a BOS that the tokenizer adds by itself: it would be there twice."""
    adds = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds else text


def same_ids(run: FinishedRun, reads) -> list[bool]:
    """Of each pair: does the tool make the run's ids of its literal texts?"""
    return [
        reads(run.tokenizer, literal(pair, run.tokenizer)) == list(vars(pair).values())
        for pair in run.pairs
    ]


def in_order(run: FinishedRun) -> Sequence[TokenizedPair]:
    return [run.pairs[i] for i in order(run)]


def write_llama_factory(run: FinishedRun, tool: str, folder: Path, model: str) -> dict:
    """train.yaml, dataset_info.json, and pairs.json, the rows of all steps in order.

    The template "empty" adds nothing, and the texts carry BOS, EOS and markup as the run had them.
    """
    config, (size, times) = run.config, micro_batch(run.config)
    if run.loss not in LLAMA_FACTORY_LOSSES:
        raise DataError(
            f"LLaMA-Factory has no pref_loss that equals {run.loss}; it has those of "
            f"{', '.join(LLAMA_FACTORY_LOSSES)}."
        )
    rows = []
    for pair in in_order(run):
        texts = literal(pair, run.tokenizer)
        rows.append({"instruction": texts.pop("prompt"), "input": "", **texts})
    (folder / "pairs.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")
    columns = {
        "prompt": "instruction",
        "query": "input",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    info = {"dpo_mini": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    settings = {
        "stage": "dpo", "do_train": True, "model_name_or_path": model, "template": "empty",
        "dataset": "dpo_mini", "dataset_dir": ".", "cutoff_len": longest(run) + 1,
        "disable_shuffling": True, "overwrite_cache": True, "output_dir": "trained",
        "pref_loss": LLAMA_FACTORY_LOSSES[run.loss], "pref_beta": run.options["beta"],
        "pref_ftx": 0.0, "dpo_label_smoothing": run.options.get("label_smoothing", 0.0),
        **({"simpo_gamma": run.options["gamma"]} if run.loss == "simpo" else {}),
        "finetuning_type": "lora" if run.lora else "full",
        **({"lora_rank": run.lora, "lora_alpha": 2 * run.lora, "lora_dropout": 0.0,
            "lora_target": "all"} if run.lora else {}),
        "per_device_train_batch_size": size, "gradient_accumulation_steps": times,
        **trainer_settings(config), "max_steps": config.steps, "bf16": config.bf16,
        "disable_gradient_checkpointing": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none",
    }  # fmt: skip
    (folder / "train.yaml").write_text(as_yaml(settings), encoding="utf-8")
    write_jsonl(folder / "expected.jsonl", run.log)
    return {"files": ["train.yaml", "dataset_info.json", "pairs.json", "expected.jsonl"],
            "settings": settings, "other_ids": same_ids(run, reads_apart).count(False),
            "run": "llamafactory-cli train train.yaml"}  # fmt: skip


def write_axolotl(run: FinishedRun, tool: str, folder: Path, model: str) -> dict:
    """train.yaml and pairs.jsonl, the rows of all steps in order."""
    config, (size, times) = run.config, micro_batch(run.config)
    loss = trl_loss(run)
    rows = [literal(pair, run.tokenizer) for pair in in_order(run)]
    rows = [{**row, "prompt": without_bos(run.tokenizer, row["prompt"])} for row in rows]
    write_jsonl(folder / "pairs.jsonl", rows)
    settings = {
        "base_model": model, "rl": "dpo", "rl_beta": loss["beta"],
        "dpo_loss_type": loss["loss_type"],
        **({"dpo_loss_weights": loss["loss_weights"]} if "loss_weights" in loss else {}),
        **({"dpo_label_smoothing": loss["label_smoothing"]} if "label_smoothing" in loss else {}),
        "datasets": [{"path": "pairs.jsonl", "ds_type": "json", "split": "train",
                      "type": {"field_prompt": "prompt", "field_chosen": "chosen",
                               "field_rejected": "rejected"}}],
        "sequence_len": longest(run) + 1, "sample_packing": False, "val_set_size": 0.0,
        "shuffle_merged_datasets": False,
        "remove_unused_columns": False, "precompute_ref_log_probs": True, "dataset_num_proc": 1,
        **({"adapter": "lora", "lora_r": run.lora, "lora_alpha": 2 * run.lora, "lora_dropout": 0.0,
            "lora_target_linear": True} if run.lora else {}),
        "micro_batch_size": size, "gradient_accumulation_steps": times, "max_steps": config.steps,
        "num_epochs": 1, **trainer_settings(config), "lr_scheduler": config.schedule,
        "optimizer": "adamw_torch_fused",
        "bf16": config.bf16, "tf32": False, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "output_dir": "trained",
    }  # fmt: skip
    for name in ("lr_scheduler_type", "optim"):  # Axolotl's names of these two are others
        del settings[name]
    (folder / "train.yaml").write_text(as_yaml(settings), encoding="utf-8")
    write_jsonl(folder / "expected.jsonl", run.log)
    return {"files": ["train.yaml", "pairs.jsonl", "expected.jsonl"], "settings": settings,
            "other_ids": same_ids(run, reads_joined).count(False),
            "run": "axolotl train train.yaml"}  # fmt: skip


def trainer_settings(config: TrainingConfig) -> dict:
    """What every tool on transformers' Trainer calls by the same names."""
    return {
        "learning_rate": config.learning_rate, "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps, "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm, "optim": "adamw_torch_fused", "seed": config.seed,
    }  # fmt: skip


def as_yaml(settings: dict) -> str:
    """A YAML file, one setting a line. JSON's values are YAML's too, but for 1e-05: a text there,
    and a number as 1.0e-05.
    """
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return re.sub(r"(?m)(: -?\d+)(e[-+]\d+)$", r"\1.0\2", "\n".join(lines)) + "\n"


# --- the page beside it ---

SCRIPT_TRAPS = (
    "Token ids are handed over, not texts. TRL would end every text with EOS, a sample that was "
    "cut too, and makes no BOS of its own.",
    "The order is the run's (order.json). TRL would shuffle again.",
    "The rates are the run's. transformers' warm-up begins at 0, one step behind.",
    "All weights decay. transformers leaves out biases and norms.",
    "max_length is None. TRL's default cuts at 1024 tokens.",
    "bf16 is as in the run. TRL's default is True.",
    "The reference's log-probabilities are taken before the first step, of the base without "
    "adapters.",
)
CONFIG_TRAPS = (
    "Rows lie in the file in the order of the steps. LLaMA-Factory reads them so; Axolotl shuffles "
    "them by itself, so that its steps cannot be compared one by one.",
    "The texts carry BOS, EOS and markup as the run had them, and the template adds nothing, where "
    "the tool can be told so.",
    "transformers' warm-up begins at 0: its rate at step k is the run's at step k - 1. Without "
    "warm-up the two are the same.",
    "transformers lets biases and norms not decay. With weight_decay 0 this is the same.",
    "The tool writes losses with few digits in its log.",
)


def readme(run: FinishedRun, report: dict) -> str:
    """README.md of an export: the command, each setting in both names, and what to know."""
    ours = {"loss": run.loss, **run.options, "lora": run.lora}
    ours |= {f.name: getattr(run.config, f.name) for f in fields(run.config)}
    traps = SCRIPT_TRAPS if "train.py" in report["files"] else CONFIG_TRAPS
    lines = [f"# A run of dpo_mini for {report['tool']} {report['version']}", "",
             f"`{report['run']}` in this folder, with {report['tool']} {report['version']} "
             "installed.", ""]  # fmt: skip
    if report.get("other_ids"):
        lines += [f"**{report['other_ids']} of {report['pairs']} pairs get other token ids here** "
                  "than in the run: this tool reads texts, and cannot be told to leave them as "
                  "they are.", ""]  # fmt: skip
    lines += ["| dpo_mini | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in ours.items()]
    lines += ["", f"| {report['tool']} | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["settings"].items()]
    lines += ["", "What to know:", "", *(f"- {trap}" for trap in traps)]
    return "\n".join(lines) + "\n"
