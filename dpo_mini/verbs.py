"""The verbs of the command line: for each a dataclass of its options, and `run`.

`run` returns the result that --json prints. What takes long to import is imported where it runs.
"""

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import ClassVar, Literal

from dpo_mini.console import command, comparison, one_line, say
from dpo_mini.data import DataError
from dpo_mini.options import Options, TrainingOptions, option
from dpo_mini.outputs import (
    MODEL_FILES,
    PRETRAINING_FILES,
    TRAINING_FILES,
    base_model,
    empty_of_earlier_run,
    is_main_process,
    pairs_of_run,
    prepare_file,
    prepare_folder,
    refuse_own_input,
    save_report,
    shown_name,
    weights_digest,
)
from dpo_mini.settings import LOSS_NAMES, SettingsError, TrainingError
from dpo_mini.sources import as_asked, chosen_prompts, has_test_split, texts_of

MODEL = "the embedded one, a folder, or a name on the Hub such as gpt2"
DATASET = "Hub name, a file such as JSONL, or folder"
LORA = "rank of LoRA adapters; 0 trains all weights"
DROP_LONG = "drop what is longer than the model's context, and say how many"
OUTPUT = "where the results go"
BETA = "strength of the KL constraint: larger stays closer to the reference"
# Train's options that are arguments of losses: no loss takes all of them.
LOSS_OPTIONS = ("beta", "label_smoothing", "gamma", "alpha", "desirable_weight",
                "undesirable_weight")  # fmt: skip
# Where policy and reference are one:
LOG_2_AT_FIRST = ("dpo", "cdpo", "robust", "dpo-norm", "dpo-positive", "chi-po")


# --- options that verbs share ---


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    output: str = option("runs", "where the results go")
    overwrite: bool = option(False, "replace what an earlier run wrote there")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    model: str = option("embedded", MODEL)
    chat: bool = option(
        False, "prompts are a user's messages, put through the model's chat template"
    )
    samples: int = option(3, "completions of each prompt", at_most=10_000)
    max_new_tokens: int = option(40, "longest completion", at_most=10**6)
    bf16: bool | None = option(
        None, "products in bfloat16 (by default from 20 million parameters on, where it is faster)"
    )
    reward: str = option("embedded", "the embedded reward, or a text classifier (Hub name, folder)")
    positive: str | None = option(
        None, "the label of --reward that counts as positive, if none is named so", metavar="LABEL"
    )


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SamplingOptions):
    prompts: str | None = option(
        None, "a text file, one prompt a line (default: the embedded prompts)", metavar="FILE"
    )
    dataset: str | None = option(
        None, f"take 2-8 token beginnings of this data set's texts ({DATASET})"
    )
    n_prompts: int = option(1000, "how many prompts")

    def __post_init__(self):
        super().__post_init__()
        if self.prompts and self.dataset:
            raise SettingsError("--prompts and --dataset are two sources of prompts: choose one.")


# --- the main job ---


@dataclass(frozen=True, kw_only=True)
class Demo(TrainingOptions, OutputOptions):
    """align a model, the embedded one by default: sample, label, train, evaluate (minutes)"""

    model: str = option("embedded", MODEL)
    n_prompts: int | None = option(None, "training prompts (default: 1100; of a real model 256)")
    held_out: int | None = option(
        None, "held-out prompts to evaluate on (default: 256; of a real model 128)"
    )
    beta: float | None = option(None, f"{BETA} (default: 0.45; of a real model 0.1)", above=0)
    output: str = option("runs/demo", OUTPUT)
    DERIVED: ClassVar = dict.fromkeys(
        ("steps", "batch_size", "block_size", "learning_rate", "monitor_every"),
        "by the model's size",
    )
    WITHOUT: ClassVar = ()

    def run(self) -> dict:
        from dpo_mini.data import read_rows
        from dpo_mini.demo import DEMO_CONFIG, REAL_DEMO_CONFIG, demo
        from dpo_mini.models import SMALL, load_model

        folder = training_output(self)
        model, _ = load_model(self.model)
        if model.num_parameters() < SMALL:
            usual = {"prompts": 1100, "held_out": 256, "beta": 0.45, "max_new_tokens": 32}
            config = self.config(**{**asdict(DEMO_CONFIG), "seed": self.seed})
        else:
            usual = {"prompts": 256, "held_out": 128, "beta": 0.1, "max_new_tokens": 40}
            precision = in_bfloat16_where_it_pays(self, model)
            config = self.config(**{**asdict(REAL_DEMO_CONFIG), "seed": self.seed, **precision})
        given = {"prompts": self.n_prompts, "held_out": self.held_out, "beta": self.beta}
        usual |= {name: value for name, value in given.items() if value is not None}
        if not self.resume:
            empty_of_earlier_run(folder, MODEL_FILES + TRAINING_FILES)
        say(self, "Sampling completions, labelling pairs, training with DPO, evaluating.")
        report = demo(
            folder, model=self.model, **usual, config=config, resume=self.resume,
            progress=not self.json,
        )  # fmt: skip
        if not self.json:
            rows = read_rows(folder / "samples.jsonl")
            say(self, comparison(report, rows, "held-out prompts", "held-out pairs"))
            say(self, next_steps(self.output, self.output))
        return report


@dataclass(frozen=True, kw_only=True)
class Sft(TrainingOptions, OutputOptions):
    """supervised fine-tuning on texts, the stage before preferences"""

    model: str = option("embedded", MODEL)
    dataset: str = option("stanfordnlp/imdb", DATASET)
    split: str = option("train", "which split of --dataset")
    max_length: int = option(256, "tokens of a text that are read", at_least=2)
    lora: int = option(0, LORA, at_least=0)
    output: str = option("runs/sft", OUTPUT)
    DEFAULTS: ClassVar = {"warmup_steps": 50}
    DERIVED: ClassVar = {"steps": "one pass over the texts"}

    def run(self) -> dict:
        from dpo_mini.models import context_length, load_model, with_lora
        from dpo_mini.tokens import text_items
        from dpo_mini.training import sft_objective, train

        folder = training_output(self)
        model, tokenizer = load_model(self.model)
        texts, part = texts_of(self.dataset, self.split, held_out=False)
        say(self, f"{len(texts)} texts of {part}.")
        items = text_items(texts, tokenizer, min(self.max_length, context_length(model)))
        batch_size = self.config().batch_size
        steps = max(1, len(items) // batch_size)
        config = self.config(steps=steps, **in_bfloat16_where_it_pays(self, model))
        base = shown_name(self.model), weights_digest(model)
        model = with_lora(model, self.lora, self.seed)
        if not self.resume:
            empty_of_earlier_run(folder, MODEL_FILES + TRAINING_FILES, [self.dataset])
        log = train(
            model, items, sft_objective(), config, identity={"objective": "sft"},
            output=folder, resume=self.resume, progress=not self.json,
        )  # fmt: skip
        settings = {"lora": self.lora, **asdict(config)}
        return finish_training(self, model, tokenizer, log, self.dataset, base, settings)


@dataclass(frozen=True, kw_only=True)
class Pairs(PromptOptions, OutputOptions):
    """sample completions and label pairs of them -> JSONL"""

    split: str = option("train", "which split of --dataset")
    samples: int = option(4, "completions of each prompt", at_least=2, at_most=10_000)
    labels: Literal["best", "bradley-terry"] = option(
        "best", "prefer the higher reward, or draw the winner by Bradley-Terry"
    )
    server: str | None = option(
        None, "sample from this server (OpenAI's protocol, such as vLLM's) instead of here",
        metavar="URL",
    )  # fmt: skip
    served_model: str | None = option(None, "the model's name on --server (default: --model)")
    output: str = option("runs/pairs.jsonl", OUTPUT, metavar="FILE")

    def run(self) -> dict:
        from dpo_mini.curation import labelled_pairs, sampled_pairs
        from dpo_mini.data import write_jsonl
        from dpo_mini.models import load_model
        from dpo_mini.rewards import load_reward

        output = prepare_file(self.output, self.overwrite)
        model, tokenizer = load_model(self.model)
        reward = load_reward(self.reward, self.positive)
        prompts, _ = chosen_prompts(self, tokenizer, self.split, held_out=False)
        prompts = as_asked(self, prompts, model, tokenizer)
        if self.server:
            from dpo_mini.served import served_completions

            samples = served_completions(
                self.server, self.served_model or self.model, tokenizer, prompts, self.samples,
                self.max_new_tokens, seed=self.seed,
            )  # fmt: skip
            pairs, ties = labelled_pairs(samples, reward, self.labels, self.seed, tokenizer)
        else:
            pairs, ties = sampled_pairs(
                model, tokenizer, prompts, reward, self.samples, self.max_new_tokens,
                self.labels, self.seed, not self.json, precision(self, model),
            )  # fmt: skip
        if not pairs:
            raise DataError(
                f"all {ties} comparisons are ties, so that there is no pair to write: ask for "
                "more --n-prompts, or longer completions (--max-new-tokens)."
            )
        write_jsonl(output, pairs)
        counts = {"pairs": len(pairs), "prompts": len(prompts), "ties_dropped": ties}
        say(self, f"{len(pairs)} pairs of {len(prompts)} prompts; {ties} ties dropped.")
        say(self, "Next: " + command("train", "--model", self.model, "--pairs", self.output))
        return counts | {"output": self.output}


@dataclass(frozen=True, kw_only=True)
class Train(TrainingOptions, OutputOptions):
    """train on preference pairs, with DPO or another loss"""

    model: str = option("embedded", "the model to train; as it is now it is also the reference")
    pairs: str = option(
        "", "file, folder or Hub data set with prompt, chosen, rejected; for kto also with prompt, "
        "completion, label", required=True,
    )  # fmt: skip
    split: str = option("train", "which split of --pairs, where it has splits")
    drop_long: bool = option(False, DROP_LONG)
    loss: Literal[LOSS_NAMES] = option("dpo", "the preference loss")
    beta: float | None = option(None, f"{BETA} (default: the loss's)")
    label_smoothing: float | None = option(
        None, "cdpo, robust: the chance that a label is wrong (default: the loss's)"
    )
    gamma: float | None = option(None, "simpo: the margin to reach (default: the loss's)")
    alpha: float | None = option(
        None, "cpo, rpo, unlikelihood, dpo-positive: weight of the second term; r-dpo: reward per "
        "token that the labels pay (default: the loss's)",
    )  # fmt: skip
    desirable_weight: float | None = option(
        None, "kto: weight of desirable completions (default: the loss's)", at_least=0
    )
    undesirable_weight: float | None = option(
        None, "kto: weight of undesirable completions (default: the loss's)", at_least=0
    )
    lora: int = option(0, LORA, at_least=0)
    output: str = option("runs/train", OUTPUT)
    DERIVED: ClassVar = {"block_size": "found in the pairs"}

    def loss_options(self) -> dict:
        """The loss's own arguments. Raises TrainingError for one that it does not take."""
        from dpo_mini.training import loss_arguments

        given = {name: getattr(self, name) for name in LOSS_OPTIONS}
        return loss_arguments(self.loss, **given)

    def tokenized(self, model, tokenizer) -> list:
        """The pairs as token ids; for KTO as labelled completions, which may also come as such."""
        from dpo_mini.data import are_labelled, preference_pairs, read_rows
        from dpo_mini.models import context_length
        from dpo_mini.tokens import tokenize_labelled, tokenize_pairs, unpaired

        rows, length = read_rows(self.pairs, self.split), context_length(model)
        if self.loss == "kto" and are_labelled(rows):
            return tokenize_labelled(rows, tokenizer, length, self.drop_long)
        pairs = tokenize_pairs(preference_pairs(rows), tokenizer, length, self.drop_long)
        return unpaired(pairs, length) if self.loss == "kto" else pairs

    def run(self) -> dict:
        from dpo_mini.course.plots import monitor_figure, training_figure
        from dpo_mini.models import load_model, with_lora
        from dpo_mini.training import shared_prompt_block, train_preferences

        options = self.loss_options()  # a wrong one is told before any work
        folder = training_output(self)
        model, tokenizer = load_model(self.model)
        pairs = self.tokenized(model, tokenizer)
        block_size = shared_prompt_block(pairs)
        config = self.config(block_size=block_size, **in_bfloat16_where_it_pays(self, model))
        base = shown_name(self.model), weights_digest(model)
        model = with_lora(model, self.lora, self.seed)
        if not self.resume:
            empty_of_earlier_run(folder, MODEL_FILES + TRAINING_FILES, [self.pairs])
        log = train_preferences(
            model, pairs, config, loss=self.loss, loss_options=options,
            output=folder, resume=self.resume, progress=not self.json,
        )  # fmt: skip
        if is_main_process():
            start = math.log(2) if self.loss in LOG_2_AT_FIRST else None
            training_figure(log, start=start).savefig(folder / "training.png", dpi=110)
            monitor_figure(log).savefig(folder / "monitor.png", dpi=110)
        settings = {"loss": self.loss, **options, "lora": self.lora, **asdict(config)}
        settings["completions" if self.loss == "kto" else "pairs"] = len(pairs)
        report = finish_training(self, model, tokenizer, log, self.pairs, base, settings)
        evaluation = command("evaluate", "--model", self.output, "--reference", self.model)
        say(self, f"Next: {evaluation}")
        return report


@dataclass(frozen=True, kw_only=True)
class Evaluate(PromptOptions, OutputOptions):
    """compare a policy with its reference on held-out prompts"""

    model: str = option("embedded", "the policy")
    reference: str | None = option(
        None, "what it was trained from (default: what the policy's card says)"
    )
    pairs: str | None = option(None, "held-out pairs for the preference accuracy")
    drop_long: bool = option(False, DROP_LONG)
    beta: float = option(0.1, "of the implicit reward", above=0)
    split: str | None = option(
        None, "which split of --dataset and --pairs (default: test; where there is none, texts "
        "that `pairs` never takes)",
    )  # fmt: skip
    n_prompts: int = option(256, "how many prompts")
    samples: int = option(2, "completions of each prompt", at_most=10_000)
    output: str = option("runs/evaluate", OUTPUT)

    def pair_accuracy(self, policy, reference, tokenizer, bf16: bool) -> dict:
        from dpo_mini.data import preference_pairs, read_rows
        from dpo_mini.evaluation import held_out_accuracy
        from dpo_mini.models import ANY_LENGTH, context_length
        from dpo_mini.reference import reference_logps
        from dpo_mini.tokens import tokenize_pairs

        split = self.split or ("test" if has_test_split(self.pairs) else "train")
        pairs, length = preference_pairs(read_rows(self.pairs, split)), context_length(policy)
        tokenized = tokenize_pairs(pairs, tokenizer, ANY_LENGTH if self.drop_long else length)
        fits = [max(len(p) + len(c) for p, c in ids.rows) <= length for ids in tokenized]
        if not any(fits):
            raise DataError(f"all {len(pairs)} pairs are longer than the context of {length}.")
        if not all(fits):
            say(self, f"{fits.count(False)} pairs longer than the context of {length} are dropped.")
        pairs, tokenized = list(compress(pairs, fits)), list(compress(tokenized, fits))
        logps = [reference_logps(model, tokenized, bf16=bf16) for model in (policy, reference)]
        return held_out_accuracy(*logps, pairs, self.beta)

    def run(self) -> dict:
        from dpo_mini.data import write_jsonl
        from dpo_mini.evaluation import evaluate
        from dpo_mini.rewards import load_judge, load_reward, shown_as

        folder = prepare_folder(self.output, overwrite=self.overwrite)
        policy, reference, tokenizer = policy_and_reference(self)
        reward = load_reward(self.reward, self.positive)
        # The judge too reads the sentiment of reviews: of another reward it would say nothing.
        judge = load_judge() if self.reward == "embedded" else None
        prompts, heading = chosen_prompts(self, tokenizer, self.split, held_out=True)
        prompts = as_asked(self, prompts, policy, tokenizer)
        bf16 = precision(self, policy, "Evaluating")
        accuracy = self.pair_accuracy(policy, reference, tokenizer, bf16) if self.pairs else {}
        report, rows = evaluate(
            policy, reference, tokenizer, prompts, reward, judge, self.samples,
            self.max_new_tokens, self.seed, not self.json, bf16,
        )  # fmt: skip
        report |= {"reward_shown_as": shown_as(reward), "bf16": bf16, **accuracy}
        write_jsonl(folder / "samples.jsonl", rows)
        save_report(folder, report)
        if not self.json:  # only now: whatever a console may refuse, the results are kept
            say(self, comparison(report, rows, heading, reward=shown_as(reward)))
            say(self, next_steps(self.output, self.model))
        return report


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingOptions):
    """complete prompts and show each completion's reward: P(positive) of the embedded one"""

    prompt: tuple[str, ...] = option((), "may be given more than once")
    temperature: float = option(1.0, "1 is the model's own distribution", at_least=0)
    strength: float | None = option(
        None, "mix the policy with its reference, without training: 0 is the reference, 1 the "
        "policy, 0.5 what twice its beta would give, above 1 goes further, below 0 the other way",
        at_least=-100, at_most=100,
    )  # fmt: skip
    reference: str | None = option(
        None, "of --strength (default: what the policy's card says it was trained from)"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reference is not None and self.strength is None:
            raise SettingsError(
                "--reference is the other model of a mixture: say how much of the policy to take "
                "with --strength, such as 0.5."
            )

    def sampler(self):
        """A model, its tokenizer, and the function of (tokenizer, prompts, ...) that samples."""
        from dpo_mini.models import load_model
        from dpo_mini.sampling import sample_completions, sample_mixture

        if self.strength is None:
            model, tokenizer = load_model(self.model)
            return model, tokenizer, partial(sample_completions, model)
        policy, reference, tokenizer = policy_and_reference(self)
        mixture = partial(sample_mixture, policy, reference, strength=self.strength)
        return policy, tokenizer, mixture

    def run(self) -> dict:
        from dpo_mini.rewards import RAW_REWARD, load_reward, shown_as, shown_values

        model, tokenizer, sample = self.sampler()
        reward = load_reward(self.reward, self.positive)
        asked = self.prompt or ("This movie", "I watched this", "The acting")
        prompts = as_asked(self, asked, model, tokenizer)
        drawn = sample(
            tokenizer, prompts, n=self.samples, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, seed=self.seed, bf16=precision(self, model),
        )  # fmt: skip
        completions = [c for row in drawn for c in row]
        texts = [c.full_text for c in completions]  # of a chat the answer alone, without markup
        numbers = shown_values(reward, reward(texts)).tolist()
        if self.reward != "embedded":
            say(self, f"In brackets: {shown_as(reward)} by {shown_name(self.reward)}.")
        for text, number in zip(texts, numbers):
            say(self, f"[{number:.2f}] {one_line(text)}")
        key = "reward" if shown_as(reward) == RAW_REWARD else "positive"
        return {
            "samples": [
                {"prompt": c.prompt, "text": c.text, key: number}
                for c, number in zip(completions, numbers)
            ]
        }


# --- making models ---


@dataclass(frozen=True, kw_only=True)
class Cool(OutputOptions):
    """divide a model's logits by a temperature, inside the model: a surer reference, less varied"""

    model: str = option("embedded", MODEL)
    temperature: float = option(0.8, "below 1 is surer, above 1 more varied", above=0, at_most=100)
    output: str = option("runs/cool", OUTPUT)

    def run(self) -> dict:
        from dpo_mini.models import cooled, load_model, model_card, save_model

        folder = prepare_folder(self.output, overwrite=self.overwrite, model=True)
        refuse_own_input(folder, self.model)
        model, tokenizer = load_model(self.model)
        base, digest = shown_name(self.model), weights_digest(model)
        model = cooled(model, self.temperature)
        empty_of_earlier_run(folder, MODEL_FILES + TRAINING_FILES + PRETRAINING_FILES)
        settings = {"temperature": self.temperature}
        save_model(model, tokenizer, folder, model_card(base, "none", settings, None, digest))
        say(self, f"{base} with all logits divided by {self.temperature:g} is in {self.output}.")
        say(self, "Next: " + command("sample", "--model", self.output))
        return {"output": self.output, **settings}


@dataclass(frozen=True, kw_only=True)
class Pretrain(OutputOptions):
    """make the embedded model: tokenizer and GPT-2 from random weights"""

    dataset: str = option("stanfordnlp/imdb", DATASET)
    splits: str = option("train,unsupervised", "splits to read, with commas between")
    layers: int = option(4, "transformer blocks", at_most=1000)
    width: int = option(256, "of the residual stream", at_most=100_000)
    heads: int = option(4, "of attention", at_most=1000)
    vocabulary: int = option(8192, "tokens of the byte-level BPE", at_least=257, at_most=10**6)
    context: int = option(128, "tokens", at_least=2, at_most=10**6)
    steps: int = option(2860, "optimiser steps")
    batch_size: int = option(32, "windows per step", at_most=10**6)
    minutes: float | None = option(
        None, "end this stretch after so long; the same command goes on", above=0
    )
    output: str = option("runs/pretrain", "where the model goes; an interrupted run there goes on")

    def run(self) -> dict:
        from dpo_mini.embedded.card import embedded_card
        from dpo_mini.embedded.pretraining import pretrain
        from dpo_mini.models import load_model

        folder = prepare_folder(self.output, overwrite=self.overwrite, resume=True, model=True)
        splits = [split.strip() for split in self.splits.split(",")]
        if Path(self.dataset).is_file():
            splits = ["train"]  # it has no splits: reading it once is enough
        texts = [t for split in splits for t in texts_of(self.dataset, split, False)[0]]
        held_out, held_out_name = texts_of(self.dataset, None, True)
        if self.overwrite:
            patterns = MODEL_FILES + TRAINING_FILES + PRETRAINING_FILES
            empty_of_earlier_run(folder, patterns, [self.dataset])
        names = "layers width heads vocabulary context steps batch_size seed".split()
        shape = {name: getattr(self, name) for name in names}
        seconds = self.minutes and self.minutes * 60
        report = pretrain(texts, held_out[::50], folder, **shape, stop_after=seconds)
        if report is None:
            say(self, "The stretch is over; the same command goes on from here.")
            return {"finished": False, "output": self.output}
        card = embedded_card(*load_model(self.output), texts, report)
        (folder / "README.md").write_text(card, encoding="utf-8")
        say(self, f"{report['bits_per_byte']:.4f} bits per byte on {held_out_name}.")
        say(self, f"The model and its card are in {self.output}.")
        return {"finished": True, **report}


@dataclass(frozen=True, kw_only=True)
class Judges(OutputOptions):
    """make the embedded reward and second judge from IMDb's train split"""

    model: str = option("embedded", "whose body the reward reads with")
    dataset: str = option("stanfordnlp/imdb", DATASET)
    steps: int = option(1400, "optimiser steps of the reward, twice")
    every: int = option(5, "test on every so many reviews of the test split")
    output: str = option("runs/judges", OUTPUT)

    def run(self) -> dict:
        from dpo_mini.embedded import judges

        folder = prepare_folder(self.output, overwrite=self.overwrite)
        fitted_on, tested_on = self.labelled("train"), self.labelled("test")
        reward = judges.fit_reward(
            *fitted_on, model_folder=self.model, steps=self.steps, seed=self.seed
        )
        judge = judges.fit_judge(*fitted_on, seed=self.seed)
        test = [column[:: self.every] for column in tested_on]
        report = {
            "reward": judges.judge_quality(reward, *test),
            "judge": judges.judge_quality(judge, *test),
        }
        judges.save_reward(reward, folder)
        judges.save_judge(judge, folder)
        return save_report(folder, report, "judges.json")

    def labelled(self, split) -> tuple[list[str], list[int]]:
        """Texts and their labels, 1 for positive. Raises DataError for too few or other rows."""
        from dpo_mini.data import read_rows

        rows = read_rows(self.dataset, split)
        for i, row in enumerate(rows, start=1):
            if not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
                raise DataError(
                    f"row {i} of {self.dataset}: expected a text in the column 'text', and 0 or 1 "
                    "in 'label'."
                )
        if {row["label"] for row in rows} != {0, 1} or len(rows) < 100:
            raise DataError(f"{self.dataset}: expected 100 texts or more, of both labels.")
        return [row["text"].replace("<br />", " ") for row in rows], [row["label"] for row in rows]


@dataclass(frozen=True, kw_only=True)
class Prompts(OutputOptions):
    """make the embedded prompts: beginnings that the model itself writes"""

    model: str = option("embedded", MODEL)
    training: int = option(2000, "training prompts")
    held_out: int = option(400, "held-out prompts")
    output: str = option("runs/prompts", OUTPUT)

    def run(self) -> dict:
        from dpo_mini.embedded.prompts import sample_prompts, save_prompts
        from dpo_mini.models import load_model

        folder = prepare_folder(self.output, overwrite=self.overwrite)
        prompts = sample_prompts(*load_model(self.model), self.training, self.held_out, self.seed)
        save_prompts(prompts, folder)
        counts = {split: len(rows) for split, rows in prompts.items()}
        say(self, "{train} training and {held_out} held-out prompts.".format(**counts))
        return counts


@dataclass(frozen=True, kw_only=True)
class Export(OutputOptions):
    """hand a finished run over to another tool, or a trained model to those who run models"""

    of: str = option("runs/train", "the --output of train or demo", metavar="FOLDER")
    to: Literal["trl", "llama-factory", "axolotl", "unsloth", "ollama", "hub"] = option(
        "trl", "which tool"
    )
    model: str | None = option(None, "what the run was trained from (default: as its card says)")
    pairs: str | None = option(None, "the pairs it was trained on (default: as its card says)")
    split: str = option("train", "which split of --pairs, where it has splits")
    tool_version: str | None = option(None, "write for this version (default: the installed one)")
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = option("q8_0", "ollama: numbers of the GGUF")
    converter: str | None = option(
        None, "ollama: llama.cpp's convert_hf_to_gguf.py", metavar="FILE"
    )
    chat: bool = option(
        False, "ollama: what is typed is a user's message, put through the model's chat template"
    )
    push_to_hub: str | None = option(None, "hub: send it there, as user/name", metavar="NAME")
    output: str = option("runs/export", OUTPUT)

    def run(self) -> dict:
        from dpo_mini import export, publish

        folder = prepare_folder(self.output, overwrite=self.overwrite)
        refuse_own_input(folder, self.of)
        base = self.model or base_model(self.of)[0]
        if self.to in export.VERSIONS:
            pairs = self.pairs or pairs_of_run(self.of)
            run = export.read_run(self.of, base, pairs, self.split)
            report = export.export(run, self.to, folder, self.tool_version)
            if report.get("other_ids"):
                say(self, f"{report['other_ids']} of {report['pairs']} pairs get other token ids "
                          f"in {self.to}: see README.md there.")  # fmt: skip
            say(self, f"Next: cd {self.output} && {report['run']}")
        elif self.to == "ollama":
            report = publish.for_ollama(self.of, folder, self.outtype, self.converter, self.chat)
            say(self, f"Next: cd {self.output} && {report['run']}")
        else:
            report = publish.for_hub(self.of, folder, base, self.push_to_hub)
            say(self, report["said"])
        return report | {"output": self.output}


# --- round about ---


@dataclass(frozen=True, kw_only=True)
class Lab(Options):
    """open the course in JupyterLab"""

    def run(self) -> dict:
        from importlib.util import find_spec

        page = Path("notebooks") / "00_start_here.ipynb"
        if not page.is_file():
            raise FileNotFoundError(
                "there is no folder notebooks/ with the course here: run dpo-mini lab in the "
                "folder that you cloned the project into"
            )
        if find_spec("jupyterlab") is None:
            raise FileNotFoundError("JupyterLab is not installed: pip install '.[lab]'")
        status = subprocess.call([sys.executable, "-m", "jupyterlab", str(page)])
        if status:
            raise OSError(f"JupyterLab ended with status {status}")
        return {"opened": str(page)}


@dataclass(frozen=True, kw_only=True)
class Env(Options):
    """versions and hardware, for bug reports"""

    def run(self) -> dict:
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
            say(self, f"{key:14s} {value}")
        return report


@dataclass(frozen=True, kw_only=True)
class Fetch(Options):
    """download a real model, SmolLM2-135M-Instruct, once: then --model smollm2 names it"""

    model: str = option("smollm2", "which one; there is smollm2")

    def run(self) -> dict:
        from dpo_mini.fetch import fetch

        return {"folder": str(fetch(self.model, lambda text: say(self, text)))}


VERBS = {
    "demo": Demo, "sft": Sft, "pairs": Pairs, "train": Train, "evaluate": Evaluate,
    "sample": Sample, "export": Export, "fetch": Fetch, "cool": Cool, "lab": Lab, "env": Env,
    "pretrain": Pretrain, "judges": Judges, "prompts": Prompts,
}  # fmt: skip


# --- what the verbs share: two models ---


def policy_and_reference(options):
    """Models and tokenizer of --model and --reference. Raises DataError where the two do not belong
    together.
    """
    from dpo_mini.models import load_model, same_tokenizer

    policy, tokenizer = load_model(options.model)
    name, digest = options.reference, None
    if name is None:
        at_home = options.model == "embedded"
        name, digest = ("embedded", None) if at_home else base_model(options.model)
        say(options, f"The reference is {name}, which {options.model} was trained from.")
    reference, other = load_model(name)
    if digest and weights_digest(reference) != digest:
        raise DataError(
            f"{name} is not the model that {options.model} was trained from: its weights are "
            "others. Give --reference."
        )
    if not same_tokenizer(tokenizer, other):
        raise DataError(
            f"{options.model} and {name} have different tokenizers, so that their probabilities "
            "are not of the same things: give the --reference that the policy was trained from."
        )
    return policy, reference, tokenizer


# --- what the verbs share: training ---


def training_output(options) -> Path:
    """The folder of a verb that trains a model, checked before any work."""
    refuse_own_input(options.output, options.model)
    return prepare_folder(
        options.output, overwrite=options.overwrite, resume=options.resume, can_resume=True,
        model=True,
    )  # fmt: skip


def in_bfloat16_where_it_pays(options, model) -> dict:
    """The precision of a verb that trains. A resumed run keeps the precision of its checkpoint: a
    second timing may end otherwise.
    """
    bf16 = options.settings.get("bf16")
    if bf16 is None and options.resume:
        bf16 = saved_precision(Path(options.output))
    return {"bf16": precision(options, model, "Training", bf16)}


def precision(options, model, doing: str = "Sampling", bf16: bool | None = None) -> bool:
    """Whether to take products in bfloat16: as asked, else for a model that is not small, where
    the processor is faster in it. Said in a line, since the numbers differ by rounding.
    """
    from dpo_mini.models import SMALL, bfloat16_pays

    asked = getattr(options, "bf16", None) if bf16 is None else bf16
    if asked is not None:
        return asked
    pays = model.num_parameters() >= SMALL and bfloat16_pays(model.device.type)
    if pays:
        say(options, f"{doing} in bfloat16, which is faster here (--no-bf16: float32).")
    return pays


def saved_precision(folder: Path) -> bool | None:
    """Whether the checkpoint in `folder` was trained in bfloat16; None where none can be read."""
    from dpo_mini.checkpoints import CHECKPOINT, read_metadata

    try:
        return json.loads(read_metadata(folder / CHECKPOINT)["identity"])["bf16"]
    except (LookupError, ValueError, TypeError):  # the loop says what is wrong with the file
        return None


def finish_training(options, model, tokenizer, log, data, base, settings) -> dict:
    """Save model, card, log and report of a run. Raises TrainingError for one that diverged.

    `data`: what it was trained on; `base`: name and `weights_digest` of what it was trained from.
    """
    from dpo_mini.checkpoints import diverged
    from dpo_mini.data import write_jsonl
    from dpo_mini.models import merged, model_card, save_model

    folder, losses = Path(options.output), f"{log[1]['loss']:.4f} -> {log[-1]['loss']:.4f}"
    report = {"loss_first": log[1]["loss"], "loss_last": log[-1]["loss"], "settings": settings}
    failed = diverged(log)
    if is_main_process():
        write_jsonl(folder / "log.jsonl", log)
        save_report(folder, report)
        if not failed:
            card = model_card(base[0], shown_name(data), settings, base_weights=base[1])
            save_model(merged(model), tokenizer, folder, card)
    if failed:
        raise TrainingError(
            f"the run failed, loss {losses}: {failed} Its log is in {options.output}; no model "
            "was saved."
        )
    say(options, f"Loss {losses}. The model, its card and its log are in {options.output}.")
    return report


def next_steps(folder, model) -> str:
    sample = command("sample", "--model", model, "--prompt", "The plot")
    return f"\nEverything is in {folder}. Look at it, then talk to the model:\n  {sample}"
