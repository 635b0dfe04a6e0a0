"""The command line: a verb for each stage, thin layers over what the notebooks call."""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

# Only light modules here: --help answers at once, and torch is loaded by the verb that needs it.

DESCRIPTION = """\
Direct Preference Optimization, small enough to read.

Start with `dpo-mini demo`: in a few minutes on a laptop's CPU, and with no network, a small model
that writes movie reviews learns to write positive ones. The verbs below are its stages, and take
other models and data by name:

  sft -> pairs -> train -> evaluate -> sample
"""


LOSS_NAMES = (
    "dpo", "cdpo", "robust", "dpo-norm", "ipo", "ipo-token", "hinge", "apo-zero", "apo-down",
    "simpo", "cpo", "orpo", "preferred-ft", "unlikelihood", "kto",
)  # fmt: skip
LOG_2_AT_FIRST = ("dpo", "cdpo", "robust", "dpo-norm")  # where policy and reference are one


def main(argv=None) -> int:
    """Run a command line; returns 0, 1 after an error told in a sentence, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    from dpo_mini.checkpoints import TrainingError
    from dpo_mini.data import DataError
    from dpo_mini.hub import HubError

    try:
        result = args.run(args)
    except (DataError, HubError, TrainingError) as error:
        print(f"dpo-mini {args.verb}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"dpo-mini {args.verb}: {error}. What was written before is unharmed.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped.'}", file=sys.stderr)
        return 130
    if args.json and is_main_process():
        print(json.dumps(result, indent=1))
    return 0


def quiet_libraries() -> None:
    """Keep other libraries' advice off the screen; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


# --- verbs ---


def run_demo(args) -> dict:
    from dpo_mini.demo import DEMO_CONFIG, demo

    prepare_output(args)
    say(args, "Sampling completions, labelling pairs, training with DPO, evaluating.")
    config = training_config(args, default=DEMO_CONFIG)
    report = demo(
        args.output, prompts=args.n_prompts, held_out=args.held_out, beta=args.beta,
        config=config, resume=args.resume, progress=not args.json,
    )  # fmt: skip
    if not args.json:
        print_comparison(Path(args.output), report, args.output)
    return report


def run_pretrain(args) -> dict:
    from dpo_mini.data import read_texts
    from dpo_mini.embedded.card import embedded_card
    from dpo_mini.embedded.pretraining import pretrain
    from dpo_mini.models import load_model

    texts = [text for split in args.splits.split(",") for text in read_texts(args.dataset, split)]
    held_out = read_texts(args.dataset, "test")[::50]
    names = "layers width heads vocabulary context steps batch_size seed".split()
    shape = {name: getattr(args, name) for name in names}
    report = pretrain(texts, held_out, args.output, **shape)
    card = embedded_card(*load_model(args.output), texts, report)
    (Path(args.output) / "README.md").write_text(card, encoding="utf-8")
    say(args, f"{report['bits_per_byte']:.4f} bits per byte on the test split.")
    say(args, f"The model and its card are in {args.output}.")
    return report


def run_judges(args) -> dict:
    from dpo_mini.data import read_rows
    from dpo_mini.embedded import judges

    def labelled(split):
        rows = read_rows(args.dataset, split)
        return [row["text"].replace("<br />", " ") for row in rows], [row["label"] for row in rows]

    prepare_output(args)
    fitted_on, tested_on = labelled("train"), labelled("test")
    reward = judges.fit_reward(*fitted_on, model_folder=args.model, steps=args.steps)
    judges.save_reward(reward, args.output)
    judge = judges.fit_judge(*fitted_on)
    judges.save_judge(judge, args.output)
    sample = slice(None, None, args.every)
    test = [column[sample] for column in tested_on]
    report = {
        "reward": judges.judge_quality(reward, *test),
        "judge": judges.judge_quality(judge, *test),
    }
    return save_report(args, report, "judges.json")


def run_prompts(args) -> dict:
    from dpo_mini.embedded.prompts import sample_prompts, save_prompts
    from dpo_mini.models import load_model

    prepare_output(args)
    prompts = sample_prompts(*load_model(args.model), args.training, args.held_out, args.seed)
    save_prompts(prompts, args.output)
    say(args, f"{len(prompts['train'])} training and {len(prompts['held_out'])} held-out prompts.")
    return {split: len(rows) for split, rows in prompts.items()}


def run_sft(args) -> dict:
    from dpo_mini.data import read_texts
    from dpo_mini.models import (
        context_length,
        load_model,
        merged,
        model_card,
        save_model,
        with_lora,
    )
    from dpo_mini.tokens import text_items
    from dpo_mini.training import sft_objective, train

    prepare_output(args)
    model, tokenizer = load_model(args.model)
    texts = read_texts(args.dataset, args.split)
    items = text_items(texts, tokenizer, min(args.max_length, context_length(model)))
    steps = args.steps or max(1, len(items) // args.batch_size)
    config = training_config(args, model, steps=steps)
    model = with_lora(model, args.lora)
    log = train(
        model, items, sft_objective(), config, identity={"base": args.model},
        output=args.output, resume=args.resume, progress=not args.json,
    )  # fmt: skip
    settings = asdict(config)
    if is_main_process():
        card = model_card(args.model, args.dataset, settings)
        save_model(merged(model), tokenizer, args.output, card)
    say(args, f"Loss {log[1]['loss']:.4f} -> {log[-1]['loss']:.4f}. The model is in {args.output}.")
    report = {"loss_first": log[1]["loss"], "loss_last": log[-1]["loss"], "settings": settings}
    return save_report(args, report)


def run_pairs(args) -> dict:
    from dpo_mini.curation import sampled_pairs
    from dpo_mini.data import write_jsonl
    from dpo_mini.models import load_model
    from dpo_mini.rewards import load_reward

    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists: choose another --output, or add --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model)
    prompts = chosen_prompts(args, tokenizer)
    pairs, ties = sampled_pairs(
        model, tokenizer, prompts, load_reward(args.reward), args.samples, args.max_new_tokens,
        args.labels, args.seed, not args.json,
    )  # fmt: skip
    write_jsonl(output, pairs)
    counts = {"pairs": len(pairs), "prompts": len(prompts), "ties_dropped": ties}
    say(args, "{pairs} pairs of {prompts} prompts; {ties_dropped} ties dropped.".format(**counts))
    say(args, f"Next: dpo-mini train --model {args.model} --pairs {output}")
    return counts | {"output": str(output)}


def run_train(args) -> dict:
    from dpo_mini.course.plots import training_figure
    from dpo_mini.data import preference_pairs, read_rows, write_jsonl
    from dpo_mini.models import (
        context_length,
        load_model,
        merged,
        model_card,
        save_model,
        with_lora,
    )
    from dpo_mini.tokens import tokenize_labelled, tokenize_pairs
    from dpo_mini.training import loss_arguments, train_preferences

    names = ("beta", "label_smoothing", "gamma", "alpha")
    given = {name: getattr(args, name, None) for name in names}
    options = loss_arguments(args.loss, **given)  # a wrong one is told before any work
    prepare_output(args)
    model, tokenizer = load_model(args.model)
    rows, length = read_rows(args.pairs), context_length(model)
    if args.loss == "kto" and "completion" in rows[0]:
        pairs = tokenize_labelled(rows, tokenizer, length)
    else:
        pairs = tokenize_pairs(preference_pairs(rows, tokenizer), tokenizer, length)
    config = training_config(args, model)
    model = with_lora(model, args.lora)
    log = train_preferences(
        model, pairs, config, loss=args.loss, loss_options=options,
        output=args.output, resume=args.resume, progress=not args.json,
    )  # fmt: skip
    settings = {"loss": args.loss, **options, **asdict(config)}
    settings["pairs"] = len(pairs)
    report = {"loss_first": log[1]["loss"], "loss_last": log[-1]["loss"], "settings": settings}
    if is_main_process():
        card = model_card(args.model, args.pairs, settings)
        save_model(merged(model), tokenizer, args.output, card)
        write_jsonl(Path(args.output) / "log.jsonl", log)
        start = math.log(2) if args.loss in LOG_2_AT_FIRST else None
        figure = training_figure(log, start=start)
        figure.savefig(Path(args.output) / "training.png", dpi=110)
    say(args, f"Loss {log[1]['loss']:.4f} -> {log[-1]['loss']:.4f}.")
    say(args, f"Model, log and training.png are in {args.output}.")
    say(args, f"Next: dpo-mini evaluate --model {args.output} --reference {args.model}")
    return save_report(args, report)


def run_evaluate(args) -> dict:
    from dpo_mini.data import preference_pairs, read_rows, write_jsonl
    from dpo_mini.evaluation import evaluate, held_out_accuracy
    from dpo_mini.models import context_length, load_model
    from dpo_mini.reference import reference_logps
    from dpo_mini.rewards import load_judge, load_reward
    from dpo_mini.tokens import tokenize_pairs

    prepare_output(args)
    policy, tokenizer = load_model(args.model)
    reference, _ = load_model(args.reference)
    prompts, reward = chosen_prompts(args, tokenizer, "held_out"), load_reward(args.reward)
    report, rows = evaluate(
        policy, reference, tokenizer, prompts, reward, load_judge(), args.samples,
        args.max_new_tokens, args.seed, not args.json,
    )  # fmt: skip
    if args.pairs:
        pairs = preference_pairs(read_rows(args.pairs), tokenizer)
        tokenized = tokenize_pairs(pairs, tokenizer, context_length(policy))
        report |= held_out_accuracy(
            *(reference_logps(m, tokenized) for m in (policy, reference)), pairs, args.beta
        )
    write_jsonl(Path(args.output) / "samples.jsonl", rows)
    if not args.json:
        print_comparison(Path(args.output), report, args.model)
    return save_report(args, report)


def run_sample(args) -> dict:
    from dpo_mini.models import load_model
    from dpo_mini.rewards import load_reward
    from dpo_mini.sampling import sample_completions

    model, tokenizer = load_model(args.model)
    prompts = args.prompt or ["This movie", "I watched this", "The acting"]
    drawn = sample_completions(
        model, tokenizer, prompts, args.samples, args.max_new_tokens, args.temperature, args.seed
    )
    completions = [c for row in drawn for c in row]
    chances = load_reward(args.reward)([c.full_text for c in completions]).sigmoid().tolist()
    for completion, chance in zip(completions, chances):
        say(args, f"[{chance:.2f}] {one_line(completion.full_text)}")
    return {
        "samples": [
            {"prompt": c.prompt, "text": c.text, "positive": p}
            for c, p in zip(completions, chances)
        ]
    }


def run_env(args) -> dict:
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    import torch

    from dpo_mini.hub import hub_is_reachable
    from dpo_mini.models import pick_device

    names = "dpo-mini torch transformers datasets accelerate peft jupyterlab ipywidgets sympy"
    report = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": pick_device(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "hub": "reachable" if hub_is_reachable() else "not reachable (no default needs it)",
        **{name: installed(name) for name in names.split()},
    }
    for key, value in report.items():
        say(args, f"{key:14s} {value}")
    return report


# --- what the verbs share ---


def prepare_output(args) -> None:
    """Make the output folder, or say at once why it cannot be used, before any work is done."""
    folder = Path(args.output)
    if not is_main_process():
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; --output must name a folder")
    welcome = args.overwrite or getattr(args, "resume", False)
    if folder.is_dir() and any(folder.iterdir()) and not welcome:
        resume = "--resume to go on with the run in it, " if hasattr(args, "resume") else ""
        raise FileExistsError(
            f"{folder} exists and is not empty: add {resume}--overwrite to replace it, or choose "
            "another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        said = f"{folder} cannot be written: {error.strerror}; choose another --output"
        raise OSError(said) from error


def training_config(args, model=None, default=None, **changes):
    """A TrainingConfig of the options given on the command line; the rest as in `default`, but
    bfloat16 where `model` is on a CUDA GPU.
    """
    from dpo_mini.settings import TrainingConfig

    values = asdict(default or TrainingConfig())
    values |= {
        f.name: getattr(args, f.name)
        for f in fields(TrainingConfig)
        if getattr(args, f.name, None) is not None
    }
    if args.bf16 is None:
        values["bf16"] = model is not None and model.device.type == "cuda"
    return TrainingConfig(**(values | changes))


def chosen_prompts(args, tokenizer, split="train") -> list[str]:
    """Prompts from a file (one a line), from a data set's texts, or the embedded ones."""
    from dpo_mini.curation import prefixes
    from dpo_mini.data import read_texts
    from dpo_mini.rewards import load_prompts

    if args.prompts:
        prompts = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    elif args.dataset:
        texts = read_texts(args.dataset, "test" if split == "held_out" else args.split)
        return prefixes(texts, tokenizer, args.n_prompts, seed=args.seed)
    else:
        prompts = load_prompts(split)
    return prompts[: args.n_prompts]


def save_report(args, report: dict, name: str = "report.json") -> dict:
    if is_main_process():
        (Path(args.output) / name).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def say(args, text: str) -> None:
    if not args.json and is_main_process():
        print(text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def interval(estimate: dict) -> str:
    if estimate["low"] is None:
        return "one prompt: no interval"
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def print_comparison(folder: Path, report: dict, model: str) -> None:
    """The before/after table, with samples side by side."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    print(f"\n{'held-out prompts':<34}{'before':>9}{'after':>9}   95% interval after")
    for title, key in (
        ("P(positive), the reward", "reward"),
        ("P(positive), the second judge", "judge"),
        ("tokens", "length"),
    ):
        before, after = report[f"{key}_reference"], report[f"{key}_policy"]
        print(f"{title:<34}{before['mean']:>9.3f}{after['mean']:>9.3f}   {interval(after)}")
    before, after = report["distinct_2_reference"], report["distinct_2_policy"]
    print(f"{'distinct word pairs':<34}{before:>9.3f}{after:>9.3f}")
    for title, key in (
        ("win rate against the reference", "win_rate"),
        ("KL from the reference (nats)", "kl"),
        ("held-out pairs ranked rightly", "preference_accuracy"),
        ("  those half a logit apart or more", "preference_accuracy_clear"),
    ):
        if key in report:
            print(f"{title:<43}{report[key]['mean']:>9.3f}   {interval(report[key])}")
    print("\nThe same prompts, before and after, with P(positive):")
    for row in map(json.loads, lines[:4]):
        print(f"\n  {row['prompt']} ...")
        for name, label in (("reference", "before"), ("policy", "after")):
            print(f"    {label:<7}{row['reward_' + name]:.2f}  {one_line(row[name])}")
    print(f"\nEverything is in {folder}. Look at it, then talk to the model:")
    print(f"  dpo-mini sample --model {model} --prompt 'The plot'")


# --- options ---


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "dpo-mini", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, help, output=None):
        p = verbs.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        p.set_defaults(run=run)
        p.add_argument(
            "--json", action="store_true", help="print the result as JSON and nothing else"
        )
        p.add_argument(
            "--seed", type=int, default=0, help="of sampling and of the order of the data"
        )
        if output:
            p.add_argument("--output", default=output, help="where the results go")
            p.add_argument(
                "--overwrite", action="store_true", help="write into an output that exists already"
            )
        return p

    def model_option(p, help="the embedded one, a folder, or a name on the Hub such as gpt2"):
        p.add_argument("--model", default="embedded", help=help)

    def training_options(p, **defaults):
        def number(name, kind, help):
            p.add_argument(
                name, type=kind, default=defaults.get(name[2:].replace("-", "_")), help=help
            )

        p.add_argument("--resume", action="store_true", help="go on with the run in --output")
        number("--steps", int, "optimiser steps")
        number("--batch-size", int, "pairs or texts per step, over all processes")
        number(
            "--micro-batch-size",
            int,
            "pairs or texts in memory at once (fewer: less memory, same result)",
        )
        number("--learning-rate", float, "peak learning rate of AdamW")
        number("--warmup-steps", int, "steps of linear warm-up")
        p.add_argument(
            "--schedule",
            choices=("constant", "linear", "cosine"),
            help="learning rate after the warm-up",
        )
        number("--checkpoint-every", int, "steps between checkpoints")
        p.add_argument(
            "--bf16",
            action=argparse.BooleanOptionalAction,
            help="bfloat16 autocast (by default on a CUDA GPU only)",
        )

    def sampling_options(p, samples, n_prompts):
        p.add_argument(
            "--prompts", help="a text file, one prompt a line (default: the embedded prompts)"
        )
        p.add_argument(
            "--dataset",
            help="take 2-8 token beginnings of this data set's texts (Hub name, JSONL or folder)",
        )
        p.add_argument("--split", default="train", help="which split of --dataset")
        p.add_argument("--n-prompts", type=int, default=n_prompts, help="how many prompts")
        p.add_argument("--samples", type=int, default=samples, help="completions of each prompt")
        p.add_argument("--max-new-tokens", type=int, default=40, help="longest completion")
        p.add_argument(
            "--reward",
            default="embedded",
            help="the embedded reward, or a text classifier (Hub name or folder)",
        )

    def dataset_option(p):
        p.add_argument(
            "--dataset",
            default="stanfordnlp/imdb",
            help="Hub name, JSONL file or folder of parquet files",
        )

    p = verb(
        "demo",
        run_demo,
        "align the embedded model: sample, label, train, evaluate (minutes, no network)",
        "runs/demo",
    )
    p.add_argument("--n-prompts", type=int, default=1100, help="training prompts")
    p.add_argument("--held-out", type=int, default=256, help="held-out prompts to evaluate on")
    p.add_argument(
        "--beta",
        type=float,
        default=0.45,
        help="strength of the KL constraint: larger stays closer to the reference",
    )
    training_options(p)

    p = verb(
        "sft", run_sft, "supervised fine-tuning on texts, the stage before preferences", "runs/sft"
    )
    model_option(p)
    dataset_option(p)
    p.add_argument("--split", default="train", help="which split of --dataset")
    p.add_argument("--max-length", type=int, default=256, help="tokens of a text that are read")
    p.add_argument(
        "--lora", type=int, default=0, help="rank of LoRA adapters; 0 trains all weights"
    )
    training_options(p, learning_rate=5e-5, batch_size=32, warmup_steps=50)

    p = verb(
        "pairs",
        run_pairs,
        "sample completions and label pairs of them -> JSONL",
        "runs/pairs.jsonl",
    )
    model_option(p)
    sampling_options(p, samples=4, n_prompts=1000)
    p.add_argument(
        "--labels",
        choices=("best", "bradley-terry"),
        default="best",
        help="prefer the higher reward, or draw the winner by Bradley-Terry",
    )

    p = verb(
        "train", run_train, "train on preference pairs, with DPO or another loss", "runs/train"
    )
    model_option(p, "the model to train; as it is now it is also the reference")
    p.add_argument(
        "--pairs",
        required=True,
        help="JSONL file, folder or Hub data set with prompt, chosen, rejected; for kto also with "
        "prompt, completion, label",
    )
    p.add_argument("--loss", choices=LOSS_NAMES, default="dpo", help="the preference loss")
    for name, help in (
        ("beta", "strength of the KL constraint: larger stays closer to the reference"),
        ("label-smoothing", "cdpo, robust: the chance that a label is wrong"),
        ("gamma", "simpo: the margin to reach"),
        ("alpha", "cpo, unlikelihood: weight of the second term"),
    ):
        p.add_argument(
            f"--{name}", type=float, default=argparse.SUPPRESS, help=help + " (default: the loss's)"
        )
    p.add_argument(
        "--lora", type=int, default=0, help="rank of LoRA adapters; 0 trains all weights"
    )
    training_options(p)

    p = verb(
        "evaluate",
        run_evaluate,
        "compare a policy with its reference on held-out prompts",
        "runs/evaluate",
    )
    model_option(p, "the policy")
    p.add_argument("--reference", default="embedded", help="what it was trained from")
    p.add_argument("--pairs", help="held-out pairs (JSONL) for the preference accuracy")
    p.add_argument("--beta", type=float, default=0.1, help="of the implicit reward")
    sampling_options(p, samples=2, n_prompts=256)

    p = verb("sample", run_sample, "complete prompts and show P(positive)")
    model_option(p)
    p.add_argument("--prompt", action="append", help="may be given more than once")
    p.add_argument("--samples", type=int, default=3, help="completions of each prompt")
    p.add_argument("--max-new-tokens", type=int, default=40, help="longest completion")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="1 is the model's own distribution"
    )
    p.add_argument(
        "--reward",
        default="embedded",
        help="the embedded reward, or a text classifier (Hub name or folder)",
    )

    verb("env", run_env, "versions and hardware, for bug reports")

    p = verb(
        "pretrain", run_pretrain, "make the embedded model: tokenizer and GPT-2 from random weights"
    )
    p.add_argument(
        "--output",
        default="runs/pretrain",
        help="where the model goes; an interrupted run there goes on",
    )
    dataset_option(p)
    p.add_argument(
        "--splits", default="train,unsupervised", help="splits to read, with commas between"
    )
    for name, default, help in (
        ("layers", 4, "transformer blocks"),
        ("width", 256, "of the residual stream"),
        ("heads", 4, "of attention"),
        ("vocabulary", 8192, "tokens of the byte-level BPE"),
        ("context", 128, "tokens"),
        ("steps", 2860, "optimiser steps"),
        ("batch-size", 32, "windows per step"),
    ):
        p.add_argument(f"--{name}", type=int, default=default, help=help)

    p = verb(
        "judges",
        run_judges,
        "make the embedded reward and second judge from IMDb's train split",
        "runs/judges",
    )
    model_option(p, "whose body the reward reads with")
    dataset_option(p)
    p.add_argument("--steps", type=int, default=1400, help="optimiser steps of the reward, twice")
    p.add_argument(
        "--every", type=int, default=5, help="test on every so many reviews of the test split"
    )

    p = verb(
        "prompts",
        run_prompts,
        "make the embedded prompts: beginnings that the model itself writes",
        "runs/prompts",
    )
    model_option(p)
    p.add_argument("--training", type=int, default=2000, help="training prompts")
    p.add_argument("--held-out", type=int, default=400, help="held-out prompts")
    return top
