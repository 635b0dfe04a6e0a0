"""Runs that take longer than a notebook should, and the one run that all of them repeat.

    python -m dpo_mini.course.studies beta_sweep

Every finished run is kept in runs/studies, so that a study that was stopped goes on where it was;
the whole is written to notebooks/results/NAME.json, with the command that made it.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from dpo_mini import curation
from dpo_mini.checkpoints import written_aside
from dpo_mini.curation import sampled_pairs
from dpo_mini.data import PreferencePair, preference_pairs, read_rows, write_jsonl
from dpo_mini.demo import DEMO_CONFIG, sample_monitor
from dpo_mini.evaluation import evaluate
from dpo_mini.losses import dpo_loss
from dpo_mini.models import context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.settings import TrainingConfig, TrainingError, check_whole
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import preference_objective, train

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Setting:
    """One DPO run of the embedded model, whole: the same setting gives the same run."""

    name: str = "healthy"
    seed: int = 0  # of samples, order and evaluation
    prompts: int = 1100  # of each four completions, six pairs
    labels: str = "reward"  # see `curated`
    noise: float = 0.0  # share of labels turned round
    keep: str = "all"  # see `curated`
    reference: str = "fixed"  # "none": its log-probabilities are taken as 0
    beta: float = 0.45
    learning_rate: float = DEMO_CONFIG.learning_rate
    schedule: str = DEMO_CONFIG.schedule
    steps: int = DEMO_CONFIG.steps
    watch_every: int = 25
    watched_prompts: int = 64  # held-out prompts sampled while it trains
    evaluated_prompts: int = 256  # and after it


def curated(pairs: list[PreferencePair], setting: Setting) -> list[PreferencePair]:
    """The pairs as `setting` labels, disturbs and keeps them."""
    relabelled = {
        "reward": lambda: pairs,
        "opposite": lambda: [curation.swapped(pair) for pair in pairs],
        "judge": lambda: curation.relabel(pairs, load_judge()),
        "bradley-terry": lambda: curation.draw_labels(pairs, setting.seed),
    }[setting.labels]()
    kept = {
        "all": lambda: relabelled,
        "clear": lambda: curation.clear_pairs(relabelled, gap=1.0),
        "unclear": lambda: [p for p in relabelled if curation.reward_gap(p) < 0.5],
        "best-worst": lambda: curation.best_and_worst(relabelled),
    }[setting.keep]()
    return curation.flip_labels(kept, setting.noise, setting.seed) if setting.noise else kept


def labelled_pairs(prompts: list[str], seed: int, folder: Path | None = None):
    """Pairs of the reference's samples, all six of each prompt's four, labelled by the reward; kept
    in `folder` for the next setting of the same study.
    """
    mark = hashlib.sha256(json.dumps([prompts, MAX_NEW_TOKENS]).encode()).hexdigest()[:8]
    path = folder and folder / f"pairs-{seed}-{mark}.jsonl"
    if path and path.exists():
        return preference_pairs(read_rows(path))
    pairs, _ = sampled_pairs(
        *load_model(), prompts, load_reward(), 4, MAX_NEW_TOKENS, seed=seed, progress=False
    )
    if path:
        with written_aside(path) as partial:
            write_jsonl(partial, pairs)
    return pairs


def run(setting: Setting, folder: Path | None = None) -> dict:
    """Train as `setting` says and evaluate: {"setting", "log", "report"}, the log as columns.

    A run that training stopped (its loss was no longer a number) has the sentence as "error", and
    the log up to the last time that it was watched.
    """
    (policy, tokenizer), (reference, _) = load_model(), load_model()
    reward, judge, held_out = load_reward(), load_judge(), load_prompts("held_out")
    length = context_length(policy)
    pairs = labelled_pairs(load_prompts("train")[: setting.prompts], setting.seed, folder)
    pairs = tokenize_pairs(curated(pairs, setting), tokenizer, length)
    watched = held_out[: setting.watched_prompts]
    unseen = tokenize_pairs(labelled_pairs(watched[:32], 1000, folder), tokenizer, length)
    config = TrainingConfig(
        steps=setting.steps,
        batch_size=DEMO_CONFIG.batch_size,
        block_size=DEMO_CONFIG.block_size if setting.keep != "best-worst" else 1,
        learning_rate=setting.learning_rate,
        schedule=setting.schedule,
        warmup_steps=DEMO_CONFIG.warmup_steps,
        monitor_every=setting.watch_every,
        seed=setting.seed,
    )
    watch = sample_monitor(
        reference, tokenizer, watched, reward, judge, unseen, setting.beta, MAX_NEW_TOKENS
    )
    log_so_far = []

    def monitor(model, log):
        values = watch(model, log)
        log_so_far[:] = [*log[:-1], {**log[-1], **values}]
        return values

    result = {"setting": asdict(setting), "pairs": len(pairs)}
    cache = folder and folder / f"reference-{setting.seed}-{len(pairs)}.safetensors"
    logps = reference_logps(reference, pairs, cache)
    if setting.reference == "none":
        logps = torch.zeros_like(logps)
    objective = preference_objective(lambda logps: dpo_loss(logps, setting.beta), setting.beta)
    try:
        items = list(zip(pairs, logps.tolist()))
        log = train(policy, items, objective, config, monitor=monitor)
    except TrainingError as error:
        return result | {"log": columns(log_so_far), "error": str(error)}
    report, rows = evaluate(
        policy, reference, tokenizer, held_out[: setting.evaluated_prompts], reward, judge,
        max_new_tokens=MAX_NEW_TOKENS, seed=setting.seed + 1,
    )  # fmt: skip
    samples = [row["policy"] for row in rows[:3]]
    return result | {"log": columns(log), "report": rounded(report), "samples": samples}


def columns(log: list[dict]) -> dict[str, list]:
    """A log as one list a number, None where a row lacks it."""
    names = dict.fromkeys(name for row in log for name in row)
    return rounded({name: [row.get(name) for row in log] for name in names})


def rows(columns: dict[str, list]) -> list[dict]:
    """The inverse of `columns`: a log as `training_figure` draws it."""
    table = zip(*columns.values())
    return [{k: v for k, v in zip(columns, row) if v is not None} for row in table]


def rounded(value):
    """Numbers with five digits, inside lists and dictionaries too."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- the studies ---

BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
SHORT = Setting(prompts=560, steps=140, watch_every=20)
FAILURES = (
    SHORT,
    replace(SHORT, name="learning rate too high", learning_rate=5e-3),
    replace(SHORT, name="learning rate too low", learning_rate=2e-6),
    replace(SHORT, name="beta too low", beta=0.01),
    replace(SHORT, name="noisy labels", noise=0.45),
    replace(SHORT, name="duplicated pairs", prompts=12),
    replace(SHORT, name="labels swapped", labels="opposite"),
    replace(SHORT, name="no reference", reference="none"),
)
UNSEEN = tuple(
    replace(setting, seed=1, **changes)
    for setting, changes in zip(
        FAILURES,
        (
            {},
            {"learning_rate": 2e-3},
            {"learning_rate": 5e-6},
            {"beta": 0.02},
            {"noise": 0.5},
            {"prompts": 8},
            {},
            {},
        ),
    )
)
BARE = replace(SHORT, watch_every=SHORT.steps)
CURATIONS = (
    replace(BARE, name="all pairs"),
    replace(BARE, name="22% of labels turned round", noise=0.22),
    replace(BARE, name="40% of labels turned round", noise=0.4),
    replace(BARE, name="Bradley-Terry labels", labels="bradley-terry"),
    replace(BARE, name="gap of 1 or more", keep="clear"),
    replace(BARE, name="gap under 0.5", keep="unclear"),
    replace(BARE, name="best and worst of four", keep="best-worst"),
    replace(BARE, name="the second judge's labels", labels="judge"),
)
LONG = Setting(
    name="too long", prompts=400, beta=0.1, steps=400, schedule="constant", watch_every=50
)


def seeds(settings, count: int) -> list[Setting]:
    """Every setting with the seeds 0 to `count` - 1."""
    return [replace(setting, seed=seed) for seed in range(count) for setting in settings]


SWEEP = tuple(Setting(name=f"beta {beta:g}", beta=beta, watch_every=55) for beta in BETAS)
STUDIES = {
    "beta_sweep": seeds(SWEEP, 5),
    "failures": FAILURES,
    "unseen": UNSEEN,
    "curation": seeds(CURATIONS, 5),
    "too_long": seeds([LONG], 5),
}


def study(name: str, settings, run, folder: Path, workers: int = 1) -> list[dict]:
    """The results of `run(setting, folder)` for all settings, in order; those already in `folder`
    are read. Each run has a process of its own, so that its memory is its own too; `workers` of
    them run at once.
    """
    check_whole("workers", workers, 1, 1000, "Try 1.")
    paths = {setting: folder / f"{name}-{mark(setting)}.json" for setting in settings}
    todo = [setting for setting, path in paths.items() if kept_result(path) is None]
    threads = max(1, torch.get_num_threads() // workers)
    with ThreadPoolExecutor(workers) as pool:  # a thread waits for each process
        jobs = {pool.submit(in_a_process, threads, run, one, folder): one for one in todo}
        try:
            for i, job in enumerate(as_completed(jobs), start=1):
                setting, result = jobs[job], job.result()
                with written_aside(paths[setting]) as partial:
                    partial.write_text(json.dumps(result), encoding="utf-8")
                print(f"{i} of {len(todo)}: {setting.name}, seed {setting.seed}: {brief(result)}")
        finally:  # after Ctrl-C or an error no further run begins
            pool.shutdown(wait=False, cancel_futures=True)
    return [kept_result(path) for path in paths.values()]


def kept_result(path: Path) -> dict | None:
    """A run's result; None where there is none that can be read, so that it is made anew."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def in_a_process(threads: int, work, *arguments):
    """What `work(*arguments)` returns, computed in a new process that ends with this one."""
    with ProcessPoolExecutor(1, get_context("spawn"), start_worker, (threads,)) as pool:
        return pool.submit(work, *arguments).result()


def start_worker(threads: int) -> None:
    """Set up a worker: its threads, and a watch on its parent, without which it ends at once."""
    torch.set_num_threads(threads)

    def end_with_the_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def mark(setting: Setting) -> str:
    return hashlib.sha256(json.dumps(asdict(setting)).encode()).hexdigest()[:12]


def brief(result: dict) -> str:
    report = result.get("report")
    if not report:
        return result.get("error", "done")
    means = {k: report[k]["mean"] for k in ("reward_policy", "judge_policy", "kl")}
    return "P(positive) {reward_policy:.3f}, judge {judge_policy:.3f}, KL {kl:.2f}".format(**means)


def stored(path) -> dict:
    """A study's file as `main` wrote it."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def store(name: str, module: str, results: list[dict], output: Path) -> None:
    """Write a study's results to `output`/NAME.json, with the command that made them."""
    made = {
        "command": f"python -m {module} {name}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    with written_aside(output / f"{name}.json") as partial:
        partial.write_text(json.dumps(made | {"runs": results}), "utf-8")


def study_parser(module: str, description: str, names) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {module}", description=description)
    parser.add_argument("name", choices=names)
    parser.add_argument("--output", default="notebooks/results", help="folder for NAME.json")
    parser.add_argument("--folder", default="runs/studies", help="folder for the runs")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    return parser


def main(argv=None) -> None:
    module = "dpo_mini.course.studies"
    args = study_parser(module, __doc__, STUDIES).parse_args(argv)
    settings, folder = STUDIES[args.name], Path(args.folder)
    for setting in settings:  # sampled once, before several processes want the same pairs
        labelled_pairs(load_prompts("train")[: setting.prompts], setting.seed, folder)
    results = study(args.name, settings, run, folder, args.workers)
    store(args.name, module, results, Path(args.output))


if __name__ == "__main__":
    main()
