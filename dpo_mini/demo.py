"""The main job in one function: sample, label, train with DPO, evaluate."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from dpo_mini.data import (
    pairs_from_samples,
    preference_pairs,
    read_rows,
    tokenize_pairs,
    write_jsonl,
)
from dpo_mini.evaluation import evaluate, held_out_accuracy, mean_interval, sequence_kl
from dpo_mini.models import EMBEDDED, context_length, load_model, model_card, save_model
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.sampling import sample_completions
from dpo_mini.training import TrainingConfig, reference_logps, train_preferences

DEMO_CONFIG = TrainingConfig(
    steps=150, batch_size=32, learning_rate=5e-5, warmup_steps=10, monitor_every=30
)


def sampled_pairs(
    model, tokenizer, prompts, reward, n=4, max_new_tokens=40, labels="best", seed=0, progress=False
):
    """Sample `n` completions of each prompt and label all their pairs: (pairs, exact ties dropped)."""
    samples = sample_completions(
        model, tokenizer, prompts, n, max_new_tokens, seed=seed, progress=progress
    )
    rewards = reward([c.full_text for row in samples for c in row])
    return pairs_from_samples(samples, rewards, labels, seed)


def sample_monitor(reference, tokenizer, prompts, reward, max_new_tokens=40, seed=7):
    """A monitor for `train`: mean P(positive) and sequence KL of fresh samples of the model being
    trained.
    """

    def monitor(model) -> dict:
        drawn = sample_completions(model, tokenizer, prompts, 1, max_new_tokens, seed=seed)
        completions = [row[0] for row in drawn]
        return {
            "reward": reward([c.full_text for c in completions]).sigmoid().mean().item(),
            "kl": mean_interval(sequence_kl(model, reference, completions)).mean,
        }

    return monitor


def demo(
    output="runs/demo",
    *,
    model=EMBEDDED,
    prompts: int = 1000,
    held_out: int = 256,
    samples: int = 4,
    max_new_tokens: int = 40,
    beta: float = 0.1,
    config: TrainingConfig = DEMO_CONFIG,
    resume: bool = False,
    progress: bool = True,
) -> dict:
    """Turn a model that writes any review into one that writes positive reviews; returns the
    report.

    Writes to `output`: pairs.jsonl and held_out_pairs.jsonl, the trained model, report.json,
    samples.jsonl, log.jsonl and training.png. With `resume` what an interrupted run has already
    written there is used.
    """
    from dpo_mini.course.plots import training_figure

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    policy, tokenizer = load_model(model)
    reference, _ = load_model(model)
    reward, judge = load_reward(), load_judge()
    training_prompts, test_prompts = (
        load_prompts("train")[:prompts],
        load_prompts("held_out")[:held_out],
    )

    pairs, ties = {}, {}
    for name, chosen_prompts, seed in (
        ("pairs", training_prompts, config.seed),
        ("held_out_pairs", test_prompts, 1000),
    ):
        path = output / f"{name}.jsonl"
        if resume and path.exists():
            pairs[name] = preference_pairs(read_rows(path))
            continue
        pairs[name], ties[name] = sampled_pairs(
            reference,
            tokenizer,
            chosen_prompts,
            reward,
            samples,
            max_new_tokens,
            seed=seed,
            progress=progress,
        )
        write_jsonl(path, pairs[name])
    tokenized = {
        name: tokenize_pairs(p, tokenizer, context_length(policy)) for name, p in pairs.items()
    }

    monitor = sample_monitor(reference, tokenizer, test_prompts[:96], reward, max_new_tokens)
    log = train_preferences(
        policy,
        tokenized["pairs"],
        config,
        beta=beta,
        output=output,
        resume=resume,
        monitor=monitor,
        progress=progress,
    )
    report, rows = evaluate(
        policy,
        reference,
        tokenizer,
        test_prompts,
        reward,
        judge,
        2,
        max_new_tokens,
        progress=progress,
    )
    logps = [reference_logps(m, tokenized["held_out_pairs"]) for m in (policy, reference)]
    report |= held_out_accuracy(*logps, pairs["held_out_pairs"], beta)
    report = {
        "loss_first": log[1]["loss"],
        "loss_last": sum(r["loss"] for r in log[-10:]) / 10,
        **report,
        "settings": {
            "model": str(model), "beta": beta, "prompts": len(training_prompts), "samples": samples,
            "max_new_tokens": max_new_tokens, "training_pairs": len(pairs["pairs"]), "ties_dropped": ties.get("pairs"),
            **asdict(config), "torch": torch.__version__,
        },
    }  # fmt: skip
    save_model(
        policy, tokenizer, output, model_card(str(model), "pairs.jsonl", report["settings"], report)
    )
    write_jsonl(output / "samples.jsonl", rows)
    write_jsonl(output / "log.jsonl", log)
    training_figure(log).savefig(output / "training.png", dpi=110)
    (output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report
