"""Reward against KL for DPO, what it replaced and what it started, on equal data.

    python -m dpo_mini.course.frontier frontier

Every method gets the same prompts. The offline ones train on one set of labelled completions; the
reward model is fitted to the same set; the online ones have at most as many completions judged.
Policies see equally many completions in their backward passes (`tokens` in the results). Every
finished run is kept in runs/studies; what was stopped goes on where it was.
"""

import itertools
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_mini.checkpoints import written_aside
from dpo_mini.course.studies import (
    columns,
    labelled_pairs,
    rounded,
    seeds,
    store,
    study,
    study_parser,
)
from dpo_mini.demo import DEMO_CONFIG, sample_monitor
from dpo_mini.evaluation import Estimate, distinct_n, mean_interval, sequence_kl
from dpo_mini.fast_logprobs import different_rows
from dpo_mini.losses import dpo_loss
from dpo_mini.models import context_length, load_model
from dpo_mini.online import online_dpo
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.rlhf import (
    PolicyGradientConfig,
    ScalarModel,
    best_of,
    learned_reward,
    normalised,
    ppo,
    reinforce,
    reward_objective,
    text_reward,
)
from dpo_mini.sampling import sample_completions
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import preference_objective, train, train_preferences

SAMPLES, ROUNDS, MAX_NEW_TOKENS = 4, 7, 32
PPO = PolicyGradientConfig(
    batch_size=64, epochs=2, minibatch_size=16, learning_rate=1e-4, beta=0.2, kl_gain=0.5,
    max_new_tokens=MAX_NEW_TOKENS,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One method at one value of the knob that is swept."""

    method: str
    knob: str
    value: float
    seed: int = 0
    prompts: int = 560  # with four completions each
    evaluated: int = 256  # held-out prompts

    @property
    def name(self) -> str:
        return f"{self.method}, {self.knob} {self.value:g}"

    @property
    def offline(self) -> TrainingConfig:
        """24 pairs of 16 completions a step: each is seen once."""
        return replace(DEMO_CONFIG, steps=self.prompts // 4, seed=self.seed)

    @property
    def ppo(self) -> PolicyGradientConfig:
        """Half as many completions, each seen twice."""
        return replace(PPO, steps=-(-self.prompts * 2 // PPO.batch_size), seed=self.seed)

    @property
    def reinforce(self) -> PolicyGradientConfig:
        return replace(PPO, steps=self.prompts * 4 // PPO.batch_size, seed=self.seed)


class World(NamedTuple):
    """What every method starts from; `policy` is the one to change."""

    policy: object
    reference: object
    tokenizer: object
    prompts: list[str]
    pairs: list  # of `TokenizedPair`
    true_reward: object  # of texts
    run: Run
    folder: Path


class Outcome(NamedTuple):
    log: list[dict]
    labels: int  # completions whose true reward was asked for
    tokens: int  # completion tokens in the policy's backward passes
    samples: list | None = None  # where the samples are not the policy's own


def run(setting: Run, folder: Path) -> dict:
    """Train and measure: {"setting", "labels", "tokens", "report", "log"}."""
    (policy, tokenizer), (reference, _) = load_model(), load_model()
    prompts = load_prompts("train")[: setting.prompts]
    pairs = labelled_pairs(prompts, setting.seed, folder)
    pairs = tokenize_pairs(pairs, tokenizer, context_length(policy))
    world = World(policy, reference, tokenizer, prompts, pairs, load_reward(), setting, folder)
    method, knob = setting.method, {setting.knob: setting.value}
    outcome = METHODS[method](world, **knob) if method in METHODS else offline(world, method, knob)
    report = measured(world, outcome.samples)
    if outcome.samples:
        n = int(setting.value)
        bound = math.log(n) - (n - 1) / n  # of the KL (Beirami et al. 2024, arXiv 2401.01879)
        report["kl"] = Estimate(bound, bound, bound)._asdict()
    few = [row for i, row in enumerate(outcome.log) if len(outcome.log) < 50 or i % 7 == 0]
    made = {"labels": outcome.labels, "tokens": outcome.tokens, "report": report}
    return rounded({"setting": asdict(setting), **made, "log": columns(few)})


# --- the methods ---


def untrained(world: World, **knob) -> Outcome:
    return Outcome([], 0, 0)


def offline(world: World, loss: str, knob: dict) -> Outcome:
    """Any loss of the family on the labelled completions, each seen once."""
    rates = {k: v for k, v in knob.items() if k == "learning_rate"}
    options = {k: v for k, v in knob.items() if k != "learning_rate"}
    config = replace(world.run.offline, **rates)
    log = train_preferences(world.policy, world.pairs, config, loss=loss, loss_options=options)
    rows = different_rows([row for pair in world.pairs for row in pair.rows])[0]
    return Outcome(log, len(rows), sum(len(ids) for _, ids in rows))


def online(world: World, beta: float) -> Outcome:
    log = online_dpo(
        world.policy, world.reference, world.tokenizer, world.prompts, world.true_reward,
        world.run.offline, beta=beta, rounds=ROUNDS, samples=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    completions = len(world.prompts) * SAMPLES
    return Outcome(log, completions, completions * MAX_NEW_TOKENS)  # few end earlier


def policy_gradient(world: World, true=False, value_model=True, watch=False, **knob) -> Outcome:
    config = replace(world.run.ppo if value_model else world.run.reinforce, **knob)
    reward, labels = reward_of(world, true)
    shared = (world.tokenizer, world.prompts, reward, config)
    models = (world.policy, world.reference)
    if watch:
        prompts = held_out(64)
        monitor = sample_monitor(
            world.reference, world.tokenizer, prompts, world.true_reward, load_judge(),
            max_new_tokens=MAX_NEW_TOKENS,
        )  # fmt: skip
        config = replace(config, monitor_every=3)
        shared = (*shared[:3], config, monitor)
    if value_model:
        log = ppo(*models, ScalarModel(world.reference), *shared)
    else:
        log = reinforce(*models, *shared)
    passes = config.batch_size * (config.epochs if value_model else 1)
    tokens = round(passes * sum(row["length"] for row in log[1:]))
    return Outcome(log, config.steps * config.batch_size if true else labels, tokens)


class Reached(Exception):
    """The goal of a timed run."""


def cost(world: World, rlhf: bool, goal: float) -> Outcome:
    """Seconds of each stage until the true P(positive) of fresh samples is `goal`, from the same
    pairs, and the most memory that the process ever had; looking at the goal is not counted.
    """
    stages: dict[str, float] = {}
    prompts, looking = held_out(128), [0.0]

    def monitor(model, log) -> dict:
        start = time.perf_counter()
        drawn = sample_completions(model, world.tokenizer, prompts, 1, MAX_NEW_TOKENS, seed=7)
        share = world.true_reward([row[0].full_text for row in drawn]).sigmoid().mean().item()
        looking[0] += time.perf_counter() - start
        if share >= goal:
            raise Reached
        return {"reward": share}

    def stage(name: str, work):
        start, looking[0] = time.perf_counter(), 0.0
        try:
            return work()
        except Reached:
            stages["reached"] = goal
        finally:
            stages[name] = time.perf_counter() - start - looking[0]

    first = world.prompts[:140]
    drawn = stage("sample a quarter of the pairs", lambda: labelled_pairs(first, world.run.seed))
    del drawn
    if rlhf:
        model = ScalarModel(world.reference)
        fit = (model, world.pairs, reward_objective(), world.run.offline)
        stage("fit the reward model", lambda: train(*fit))
        shown = sample_completions(
            world.reference, world.tokenizer, world.prompts[:128], 1, MAX_NEW_TOKENS
        )
        reward = normalised(learned_reward(model), [row[0] for row in shown])
        config = replace(world.run.ppo, steps=60, beta=0.1, monitor_every=1)
        rest = (ScalarModel(world.reference), world.tokenizer, world.prompts, reward, config)
        stage("PPO", lambda: ppo(world.policy, world.reference, *rest, monitor))
    else:
        logps = stage("read the reference", lambda: reference_logps(world.reference, world.pairs))
        items = list(zip(world.pairs, logps.tolist()))
        objective = preference_objective(lambda logps: dpo_loss(logps, 0.2), 0.2)
        config = replace(world.run.offline, monitor_every=7)
        stage("DPO", lambda: train(world.policy, items, objective, config, monitor=monitor))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    stages["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return Outcome([{"step": 0, **stages}], 0, 0)


def best_of_n(world: World, true: bool, n: float) -> Outcome:
    reward, labels = reward_of(world, true)
    drawn = sample_completions(
        world.reference, world.tokenizer, held_out(world.run.evaluated), int(n), MAX_NEW_TOKENS,
        seed=world.run.seed + 1,
    )  # fmt: skip
    return Outcome([], len(drawn) * int(n) if true else labels, 0, best_of(drawn, reward))


def reward_of(world: World, true: bool):
    """The true reward, or one learned from the pairs, and how many labels that took; mean 0 and
    deviation 1 on the reference's samples.
    """
    if true:
        reward = text_reward(world.true_reward)
    else:
        reward = learned_reward(reward_model(world))
    drawn = sample_completions(
        world.reference, world.tokenizer, world.prompts[:128], 1, MAX_NEW_TOKENS,
        seed=world.run.seed,
    )  # fmt: skip
    labels = len(different_rows([row for pair in world.pairs for row in pair.rows])[0])
    return normalised(reward, [row[0] for row in drawn]), labels


def reward_model(world: World) -> ScalarModel:
    """Fitted to the pairs as long as a policy would be, kept for the next run of the same seed."""
    model, run = ScalarModel(world.reference), world.run
    path = world.folder / f"reward-{run.seed}-{run.prompts}.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):  # not there yet, or damaged
        model = ScalarModel(world.reference)
        train(model, world.pairs, reward_objective(), run.offline)
        with written_aside(path) as partial:
            save_file(model.state_dict(), partial)
    return model.to(world.reference.device).eval()


METHODS = {
    "reference": untrained,
    "best-of-n, learned reward": partial(best_of_n, true=False),
    "best-of-n, true reward": partial(best_of_n, true=True),
    "ppo, learned reward": policy_gradient,
    "ppo, true reward": partial(policy_gradient, true=True),
    "ppo, watched": partial(policy_gradient, watch=True),
    "reinforce, learned reward": partial(policy_gradient, value_model=False),
    "reinforce, true reward": partial(policy_gradient, true=True, value_model=False),
    "online dpo": online,
    "cost, dpo": partial(cost, rlhf=False),
    "cost, rlhf": partial(cost, rlhf=True),
}  # any other is the name of a loss


def held_out(n: int) -> list[str]:
    return load_prompts("held_out")[:n]


def measured(world: World, samples=None) -> dict:
    """Where a policy stands on the held-out prompts, by a fresh completion of each."""
    if samples is None:
        prompts, seed = held_out(world.run.evaluated), world.run.seed + 1
        drawn = sample_completions(
            world.policy, world.tokenizer, prompts, 1, MAX_NEW_TOKENS, seed=seed
        )
        samples = [row[0] for row in drawn]
    texts = [c.full_text for c in samples]
    estimates = {
        "reward_policy": mean_interval(world.true_reward(texts).sigmoid()),
        "judge_policy": mean_interval(load_judge()(texts).sigmoid()),
        "kl": mean_interval(sequence_kl(world.policy, world.reference, samples)),
        "length": mean_interval(torch.tensor([float(len(c.ids)) for c in samples])),
    }
    report = {name: estimate._asdict() for name, estimate in estimates.items()}
    return report | {"distinct_2": distinct_n([c.text for c in samples])}


# --- reading the results ---

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, 97.5%, of n - 1 degrees


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number for each seed (2 to 5 of them), with Student's 95% interval."""
    mean, n = sum(values) / len(values), len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Estimate(mean, mean - T_QUANTILE[n] * error, mean + T_QUANTILE[n] * error)


def points(runs: Sequence[dict], method: str, number="reward_policy") -> dict[int, list[tuple]]:
    """Where a method's settings ended: for each seed (KL, number) of each, in order of KL."""
    by_seed: dict[int, list[tuple]] = {}
    for run in runs:
        if run["setting"]["method"] == method:
            report = run["report"]
            place = (report["kl"]["mean"], report[number]["mean"])
            by_seed.setdefault(run["setting"]["seed"], []).append(place)
    return {seed: sorted(places) for seed, places in by_seed.items()}


def reward_at(kl: float, places: Sequence[tuple]) -> float | None:
    """The reward at `kl` nats on the straight lines between (KL, reward); None outside them."""
    for (low, before), (high, after) in itertools.pairwise(sorted(places)):
        if low <= kl <= high and high > low:
            return before + (after - before) * (kl - low) / (high - low)
    return None


# --- the studies ---


def sweep(method: str, knob: str, *values: float) -> list[Run]:
    return [Run(method, knob, value) for value in values]


FRONTIER = [
    *sweep("reference", "beta", 0),
    *sweep("dpo", "beta", 0.1, 0.2, 0.5, 1.0),
    *sweep("ppo, learned reward", "beta", 0.05, 0.1, 0.2, 0.4),
    *sweep("ppo, true reward", "beta", 0.05, 0.1, 0.2, 0.4),
    *sweep("preferred-ft", "learning_rate", 5e-5, 1e-4, 2e-4, 4e-4),
    *sweep("unlikelihood", "alpha", 0.05, 0.1, 0.5, 1.0),
    *sweep("best-of-n, learned reward", "n", 2, 4, 8, 16),
    *sweep("online dpo", "beta", 0.1, 0.2, 0.5, 1.0),
]
FAMILY_BETAS = {  # a large step and a small one; what beta multiplies differs from loss to loss
    "cdpo": (0.1, 0.5), "robust": (0.1, 0.5), "dpo-norm": (4, 15), "ipo": (0.02, 0.1),
    "ipo-token": (0.5, 2), "hinge": (0.1, 0.5), "apo-zero": (0.1, 0.5), "apo-down": (0.1, 0.5),
    "simpo": (2, 10), "cpo": (0.1, 0.5), "orpo": (0.1, 1), "kto": (0.1, 0.5),
}  # fmt: skip
FAMILY = [Run(loss, "beta", betas[k]) for k in (0, 1) for loss, betas in FAMILY_BETAS.items()]
FIRST = {one.method: one for one in reversed(FRONTIER + FAMILY)}  # of each method the first
SMALL = [replace(one, prompts=80, evaluated=128) for one in FIRST.values()]
KNOBS = [
    *sweep("ppo, watched", "beta", 0.2, 0.0),
    *sweep("ppo, watched", "learning_rate", 2e-3),
    *sweep("ppo, watched", "epochs", 6),
    *sweep("ppo, watched", "target_kl", 6),
]
STUDIES = {
    "frontier": seeds(FRONTIER, 3),
    "family": seeds(FAMILY, 1),
    "small": seeds(SMALL, 1),
    "ppo_knobs": seeds(KNOBS, 1),
    "cost": seeds([*sweep("cost, dpo", "goal", 0.85), *sweep("cost, rlhf", "goal", 0.85)], 3),
}


def main(argv=None) -> None:
    module = "dpo_mini.course.frontier"
    args = study_parser(module, __doc__, STUDIES).parse_args(argv)
    settings, folder = STUDIES[args.name], Path(args.folder)
    results = study(args.name, settings, run, folder, args.workers)
    store(args.name, module, results, Path(args.output))


if __name__ == "__main__":
    main()
