"""The main job in one function: sample, label, train with DPO, evaluate."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from dpo_mini.checkpoints import written_aside
from dpo_mini.curation import sampled_pairs
from dpo_mini.data import PreferencePair, preference_pairs, read_rows, write_jsonl
from dpo_mini.evaluation import distinct_n, evaluate, held_out_accuracy, sequence_kl
from dpo_mini.losses import PairLogps, dpo_loss, preference_metrics
from dpo_mini.models import (
    EMBEDDED,
    context_length,
    load_model,
    model_card,
    prompt_prefix,
    save_model,
)
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.sampling import sample_completions
from dpo_mini.settings import (
    MOST_ITEMS,
    MOST_TOKENS,
    TrainingConfig,
    TrainingError,
    check_real,
    check_whole,
)
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import train_preferences

# Four prompts a step, with the six pairs of each prompt's four samples: a small model, so a
# learning rate far above a large one's, and a beta that keeps the KL under ten nats with it.
DEMO_CONFIG = TrainingConfig(
    steps=275, batch_size=24, block_size=6, learning_rate=2e-4, warmup_steps=10, monitor_every=55
)
# A model of a hundred million parameters learns from fewer pairs, at a rate four times smaller.
REAL_DEMO_CONFIG = TrainingConfig(
    steps=64, batch_size=24, block_size=6, learning_rate=5e-5, warmup_steps=10, monitor_every=32
)


def sample_monitor(
    reference, tokenizer, prompts, reward, judge=None, pairs=(), beta=0.1, max_new_tokens=40,
    seed=7, bf16=False,
):  # fmt: skip
    """A monitor for `train`: what fresh samples of the model are like, and, for held-out `pairs`
    (tokenized), its DPO loss and how many it ranks rightly.

    The same random numbers every time, so that what changes is the model.
    """
    reference_pairs = reference_logps(reference, pairs) if pairs else None

    def monitor(model, log) -> dict:
        drawn = sample_completions(
            model, tokenizer, prompts, 1, max_new_tokens, seed=seed, bf16=bf16
        )
        completions = [row[0] for row in drawn]
        texts = [c.full_text for c in completions]
        values = {
            "reward": reward(texts).sigmoid().mean().item(),
            "kl": sequence_kl(model, reference, completions, bf16=bf16).mean().item(),
            "distinct_2": distinct_n([c.text for c in completions]),
        }
        if judge:
            values["judge"] = judge(texts).sigmoid().mean().item()
        if pairs:
            logps = PairLogps(*reference_logps(model, pairs).unbind(1), *reference_pairs.unbind(1))
            metrics = preference_metrics(logps, beta)
            values["held_out/loss"] = dpo_loss(logps, beta).mean().item()
            values["held_out/accuracies"] = metrics["rewards/accuracies"].mean().item()
        return values

    return monitor


def demo(
    output="runs/demo", *,
    model=EMBEDDED, prompts=1100, held_out=256, samples=4, max_new_tokens=32, beta=0.45,
    config=DEMO_CONFIG, resume=False, progress=True,
) -> dict:  # fmt: skip
    """Turn a model that writes any review into one that writes positive ones; returns the report.

    `model`: as in `load_model`. The prompts are the embedded ones, behind the model's own prefix.

    Writes to `output`: the pairs, the trained model, report.json, samples.jsonl, log.jsonl,
    training.png, monitor.png and before_after.png. With `resume`, what an interrupted run wrote is
    used. With `config.bf16` all of it, not the training alone, is in bfloat16.
    Raises SettingsError for a number out of range, before any work.
    """
    check_demo(prompts, held_out, samples, max_new_tokens, beta)
    output = Path(output)
    (policy, tokenizer), (reference, _) = load_model(model), load_model(model)
    reward, judge = load_reward(), load_judge()
    prefix = prompt_prefix(reference)
    train_prompts = [prefix + prompt for prompt in load_prompts("train")[:prompts]]
    test_prompts = [prefix + prompt for prompt in load_prompts("held_out")[:held_out]]

    def kept_pairs(name: str, its_prompts: list[str], seed: int) -> list[PreferencePair]:
        path = output / f"{name}.jsonl"
        if not (resume and path.exists()):
            pairs, _ = sampled_pairs(
                reference, tokenizer, its_prompts, reward, samples, max_new_tokens,
                seed=seed, progress=progress, bf16=config.bf16,
            )  # fmt: skip
            with written_aside(path) as partial:  # --resume would use a file half written
                write_jsonl(partial, pairs)
        return pairs_of_prompts(path, its_prompts)

    pairs = kept_pairs("pairs", train_prompts, config.seed)
    test_pairs = kept_pairs("held_out_pairs", test_prompts, config.seed + 1000)
    log = train_preferences(
        policy, tokenize_pairs(pairs, tokenizer, context_length(policy)), config, beta=beta,
        output=output, resume=resume, progress=progress,
        identity={"prompts": len(train_prompts), "held_out": len(test_prompts)},
        monitor=sample_monitor(
            reference, tokenizer, test_prompts[:64], reward, judge,
            max_new_tokens=max_new_tokens, bf16=config.bf16,
        ),
    )  # fmt: skip
    report, rows = evaluate(
        policy, reference, tokenizer, test_prompts, reward, judge, 1, max_new_tokens,
        progress=progress, bf16=config.bf16,
    )  # fmt: skip
    report |= accuracy_of(policy, reference, tokenizer, test_pairs, beta, config.bf16)
    settings = {
        "beta": beta, "prompts": len(train_prompts), "samples": samples, "pairs": len(pairs),
        "max_new_tokens": max_new_tokens, **asdict(config), "torch": torch.__version__,
    }  # fmt: skip
    losses = {"loss_first": log[1]["loss"], "loss_last": log[-1]["loss"]}
    report = losses | report | {"settings": settings}
    base = Path(model).name if Path(model).is_dir() else model  # no paths in a card
    save_model(policy, tokenizer, output, model_card(base, "pairs.jsonl", settings, report))
    write_results(output, report, rows, log)
    return report


def check_demo(prompts, held_out, samples, max_new_tokens, beta) -> None:
    """Raise SettingsError for a number that `demo` cannot run with."""
    check_whole("prompts", prompts, 1, MOST_ITEMS, "Try 1100.")
    check_whole("held_out", held_out, 1, MOST_ITEMS, "Try 256.")
    check_whole("samples", samples, 2, MOST_ITEMS, "Try 4: a pair needs two.")
    check_whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS, "Try 32.")
    check_real("beta", beta, 0, "Try 0.45.", above=True)


def pairs_of_prompts(path: Path, prompts: list[str]) -> list[PreferencePair]:
    """The pairs in a file. Raises TrainingError for one of a prompt that is not in `prompts`.

    A prompt may have none: where the reward cannot tell its completions apart, all of them tie.
    """
    pairs = preference_pairs(read_rows(path))
    if not {pair.prompt for pair in pairs} <= set(prompts):
        raise TrainingError(
            f"{path} has the pairs of another run's prompts. Start in another folder."
        )
    return pairs


def accuracy_of(policy, reference, tokenizer, pairs, beta: float, bf16: bool) -> dict:
    """How many held-out pairs the policy ranks rightly: see `held_out_accuracy`."""
    tokenized = tokenize_pairs(pairs, tokenizer, context_length(policy))
    logps = [reference_logps(model, tokenized, bf16=bf16) for model in (policy, reference)]
    return held_out_accuracy(*logps, pairs, beta)


def write_results(output: Path, report: dict, rows: list[dict], log: list[dict]) -> None:
    """The report first, and the figures last: what fails later loses nothing."""
    from dpo_mini.course.plots import before_after_figure, monitor_figure, training_figure

    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    write_jsonl(output / "samples.jsonl", rows)
    write_jsonl(output / "log.jsonl", log)
    training_figure(log).savefig(output / "training.png", dpi=110)
    monitor_figure(log).savefig(output / "monitor.png", dpi=110)
    before_after_figure(rows).savefig(output / "before_after.png", dpi=110)
