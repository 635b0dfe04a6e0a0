"""Chapter 16's stored runs: cures for displacement, rankings, and a task in which length tempts.

    python -m dpo_mini.course.cures displacement
    python -m dpo_mini.course.cures length

About a quarter of an hour and ten minutes on one core. Completions are sampled once; each seed has
prompts of its own. Every finished run is kept in runs/studies; what was stopped goes on where it was.
"""

import itertools
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from dpo_mini.checkpoints import written_aside
from dpo_mini.course.studies import columns, kept_result, mark, seeds, store, study_parser
from dpo_mini.evaluation import distinct_n, mean_interval, sequence_kl
from dpo_mini.family import LOSSES, plackett_luce_loss
from dpo_mini.models import context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.sampling import Completion, sample_completions
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair
from dpo_mini.training import preference_objective, ranking_objective, sft_objective, train

SAMPLES, SEEDS = 4, 5
PLACKETT_LUCE = "plackett-luce"


@dataclass(frozen=True)
class Run:
    """One run, whole: the same settings give the same run."""

    method: str  # a name in LOSSES, or plackett-luce
    beta: float
    alpha: float | None = None  # of the losses that take one
    task: str = "sentiment"  # or "length": the labels pay PER_TOKEN for every token as well
    seed: int = 0
    prompts: int = 30  # of each four completions
    max_new_tokens: int = 32
    steps: int = 24
    learning_rate: float = 2e-4
    watch_every: int = 3
    watched_prompts: int = 40

    @property
    def name(self) -> str:
        return f"{self.method} {self.beta:g}" + (f" {self.alpha:g}" if self.alpha else "")


PER_TOKEN = 0.05  # what the labeller of the length task pays for a token, in logits
BASE = Run("dpo", 0.1)
DISPLACEMENT = (  # two of them are slow: more steps, so that their KL comes near DPO's
    BASE,
    replace(BASE, method="rpo", alpha=1.0, steps=48),
    replace(BASE, method="dpo-positive", alpha=5.0, steps=48),
    replace(BASE, method="dpo-norm", beta=3.0),
    replace(BASE, method="chi-po"),
    replace(BASE, method=PLACKETT_LUCE),
)
LONG = replace(
    BASE, task="length", max_new_tokens=112, prompts=24, steps=20, watch_every=5,
    watched_prompts=32,
)  # fmt: skip
LENGTH = (
    LONG,
    replace(LONG, method="r-dpo", alpha=PER_TOKEN),
    replace(LONG, method="dpo-norm", beta=5.0),
)
STUDIES = {"displacement": seeds(DISPLACEMENT, SEEDS), "length": seeds(LENGTH, SEEDS)}


# --- the data ---


def short_reviews(completions: list[Completion], tokenizer) -> list[tuple[list[int], list[int]]]:
    """SFT rows (prompt ids, completion ids) of reviews that end after one to four sentences."""
    rows, stops = [], {tokenizer.encode(mark)[0] for mark in (".", "!", "?")}
    for i, completion in enumerate(completions):
        ends = [k for k, token in enumerate(completion.ids) if token in stops]
        if ends:
            end = ends[min(i % 4, len(ends) - 1)]
            rows.append((completion.prompt_ids, [*completion.ids[: end + 1], 0]))
    return rows


@cache
def reference_model(task: str):
    """The embedded model; for the length task after SFT on short reviews, so that it ends them."""
    model, tokenizer = load_model()
    if task == "length":
        prompts = load_prompts("train")[600:840]
        drawn = sample_completions(model, tokenizer, prompts, 1, 110, seed=5)
        rows = short_reviews([row[0] for row in drawn], tokenizer)
        config = TrainingConfig(steps=40, batch_size=16, learning_rate=5e-4, seed=5)
        train(model, rows, sft_objective(), config)
    return model, tokenizer


@cache
def rankings(task: str, prompts: int, max_new_tokens: int) -> tuple:
    """For each prompt its completions, the one that the labeller likes best first."""
    model, tokenizer = reference_model(task)
    texts = load_prompts("train")[:prompts]
    drawn = sample_completions(model, tokenizer, texts, SAMPLES, max_new_tokens, seed=11)
    scores = iter(labels(task, [c for row in drawn for c in row]).tolist())
    scored = [[(next(scores), c) for c in row] for row in drawn]
    return tuple([c for _, c in sorted(row, key=lambda pair: -pair[0])] for row in scored)


def labels(task: str, completions: list[Completion]) -> torch.Tensor:
    """The labeller's reward [completions], in logits."""
    rewards = load_reward()([c.full_text for c in completions])
    lengths = torch.tensor([float(len(c.ids)) for c in completions])
    return rewards + PER_TOKEN * lengths if task == "length" else rewards


def pairs_of(ranking: list[Completion]) -> list[TokenizedPair]:
    """All pairs of a ranking, the better one chosen."""
    return [
        TokenizedPair(w.prompt_ids, w.ids, l.ids)
        for w, l in itertools.combinations(ranking, 2)
        if w.ids != l.ids
    ]


# --- a run ---


def items_and_objective(run: Run, ranked: list[list[Completion]], reference) -> tuple:
    """What the loop takes: items, the objective, and how many of them a prompt has."""
    if run.method == PLACKETT_LUCE:
        rows = [[(c.prompt_ids, c.ids) for c in ranking] for ranking in ranked]
        halves = [TokenizedPair(r[i][0], r[i][1], r[i + 1][1]) for r in rows for i in (0, 2)]
        logps = reference_logps(reference, halves).view(-1, SAMPLES).tolist()
        loss = lambda logps: plackett_luce_loss(logps, run.beta)  # noqa: E731
        return list(zip(rows, logps)), ranking_objective(loss, run.beta), 1
    pairs = [pair for ranking in ranked for pair in pairs_of(ranking)]
    given = {"beta": run.beta} | ({} if run.alpha is None else {"alpha": run.alpha})
    loss = lambda logps: LOSSES[run.method](logps, **given)  # noqa: E731
    items = list(zip(pairs, reference_logps(reference, pairs).tolist()))
    return items, preference_objective(loss, run.beta), SAMPLES * (SAMPLES - 1) // 2


def monitor_of(run: Run, reference, tokenizer, unseen: list[TokenizedPair]):
    """A monitor: fresh samples on held-out prompts, and log-ratios of held-out pairs."""
    reward, judge = load_reward(), load_judge()
    prompts = load_prompts("held_out")[: run.watched_prompts]
    known = reference_logps(reference, unseen)

    def monitor(model, log) -> dict:
        drawn = sample_completions(
            model, tokenizer, prompts, 1, run.max_new_tokens, seed=100 + run.seed
        )
        completions = [row[0] for row in drawn]
        texts = [c.full_text for c in completions]
        ratios = (reference_logps(model, unseen) - known).mean(0).tolist()
        return {
            "reward": reward(texts).sigmoid().mean().item(),
            "judge": judge(texts).sigmoid().mean().item(),
            "kl": sequence_kl(model, reference, completions).mean().item(),
            "length": mean_interval(torch.tensor([float(len(c.ids)) for c in completions])).mean,
            "distinct_2": distinct_n([c.text for c in completions]),
            "log_ratio/chosen": ratios[0],
            "log_ratio/rejected": ratios[1],
        }

    return monitor


def run(setting: Run) -> dict:
    """Train as `setting` says: {"setting", "log"}, the log as columns."""
    reference, tokenizer = reference_model(setting.task)
    policy, _ = load_model()
    policy.load_state_dict(reference.state_dict())
    assert max(len(ids) for ids in tokenizer(load_prompts("train"))["input_ids"]) + (
        setting.max_new_tokens
    ) <= context_length(policy)
    n = setting.prompts
    ranked = rankings(setting.task, n * (SEEDS + 1), setting.max_new_tokens)
    own, unseen = ranked[n * setting.seed : n * (setting.seed + 1)], ranked[n * SEEDS :]
    items, objective, block = items_and_objective(setting, own, reference)
    config = TrainingConfig(
        steps=setting.steps, batch_size=2 * block, block_size=block, warmup_steps=4,
        learning_rate=setting.learning_rate, schedule="constant", seed=setting.seed,
        monitor_every=setting.watch_every,
    )  # fmt: skip
    watched = [pairs_of(ranking)[2] for ranking in unseen]  # the best with the worst
    monitor = monitor_of(setting, reference, tokenizer, watched)
    log = train(policy, items, objective, config, monitor=monitor)
    return {"setting": asdict(setting), "log": columns(log)}


def watched(result: dict, name: str) -> list[float]:
    """What a run's monitor measured, from the start to the last step."""
    return [value for value in result["log"][name] if value is not None]


def main(argv=None) -> None:
    args = study_parser("dpo_mini.course.cures", __doc__, STUDIES).parse_args(argv)
    folder, settings = Path(args.folder), STUDIES[args.name]
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in settings:
        path = folder / f"cures-{mark(setting)}.json"
        result = kept_result(path)
        if result is None:
            result = run(setting)
            with written_aside(path) as partial:
                partial.write_text(json.dumps(result), encoding="utf-8")
            last = {k: round(watched(result, k)[-1], 2) for k in ("kl", "reward", "length")}
            print(setting.name, setting.seed, last, flush=True)
        results.append(result)
    store(args.name, "dpo_mini.course.cures", results, Path(args.output))


if __name__ == "__main__":
    main()
