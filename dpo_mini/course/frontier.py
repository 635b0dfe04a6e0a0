"""Reward against KL for DPO, what it replaced and what it started, on equal data.

    python -m dpo_mini.course.frontier frontier

Every method gets the same prompts. The offline ones train on one set of labelled completions; the
reward model is fitted to the same set; the online ones have at most as many completions judged.
Policies see equally many completions in their backward passes (`tokens` in the results). Every
finished run is kept in runs/studies; what was stopped goes on where it was.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from dpo_mini.course.studies import (
    columns,
    labelled_pairs,
    rounded,
    seeds,
    store,
    study,
    study_parser,
)
from dpo_mini.data import tokenize_pairs
from dpo_mini.demo import DEMO_CONFIG
from dpo_mini.evaluation import Estimate, distinct_n, mean_interval, sequence_kl
from dpo_mini.models import context_length, load_model
from dpo_mini.online import online_dpo
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
from dpo_mini.training import different_rows, rows_of, train, train_preferences

PROMPTS, SAMPLES, ROUNDS, MAX_NEW_TOKENS, EVALUATED = 560, 4, 7, 32, 256
OFFLINE = replace(DEMO_CONFIG, steps=140)  # 24 pairs of 16 completions a step: each is seen once
# 1,152 completions seen twice are as many backward passes as 2,304 seen once.
PPO = PolicyGradientConfig(
    steps=18, batch_size=64, epochs=2, minibatch_size=16, learning_rate=1e-4,
    max_new_tokens=MAX_NEW_TOKENS,
)  # fmt: skip
REINFORCE = replace(PPO, steps=35)


@dataclass(frozen=True)
class Run:
    """One method at one value of the knob that is swept."""

    method: str
    knob: str
    value: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}, {self.knob} {self.value:g}"


class World(NamedTuple):
    """What every method starts from; `policy` is the one to change."""

    policy: object
    reference: object
    tokenizer: object
    prompts: list[str]
    pairs: list  # of `TokenizedPair`
    true_reward: object  # of texts
    seed: int
    folder: Path


class Outcome(NamedTuple):
    log: list[dict]
    labels: int  # completions whose true reward was asked for
    tokens: int  # completion tokens in the policy's backward passes
    samples: list | None = None  # where the samples are not the policy's own


def run(setting: Run, folder: Path) -> dict:
    """Train and measure: {"setting", "labels", "tokens", "report", "log"}."""
    (policy, tokenizer), (reference, _) = load_model(), load_model()
    prompts = load_prompts("train")[:PROMPTS]
    pairs = labelled_pairs(prompts, setting.seed, folder)
    pairs = tokenize_pairs(pairs, tokenizer, context_length(policy))
    world = World(policy, reference, tokenizer, prompts, pairs, load_reward(), setting.seed, folder)
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
    config = replace(OFFLINE, seed=world.seed, **rates)
    log = train_preferences(world.policy, world.pairs, config, loss=loss, loss_options=options)
    rows = different_rows(rows_of(world.pairs))[0]
    return Outcome(log, len(rows), sum(len(ids) for _, ids in rows))


def online(world: World, beta: float) -> Outcome:
    log = online_dpo(
        world.policy, world.reference, world.tokenizer, world.prompts, world.true_reward,
        replace(OFFLINE, seed=world.seed), beta=beta, rounds=ROUNDS, samples=SAMPLES,
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    completions = len(world.prompts) * SAMPLES
    return Outcome(log, completions, completions * MAX_NEW_TOKENS)  # few end earlier


def policy_gradient(world: World, true: bool, value_model: bool, beta: float) -> Outcome:
    config = replace(PPO if value_model else REINFORCE, beta=beta, seed=world.seed)
    reward, labels = reward_of(world, true)
    shared = (world.tokenizer, world.prompts, reward, config)
    if value_model:
        log = ppo(world.policy, world.reference, ScalarModel(world.reference), *shared)
    else:
        log = reinforce(world.policy, world.reference, *shared)
    passes = config.batch_size * (config.epochs if value_model else 1)
    tokens = round(passes * sum(row["length"] for row in log[1:]))
    return Outcome(log, config.steps * config.batch_size if true else labels, tokens)


def best_of_n(world: World, true: bool, n: float) -> Outcome:
    reward, labels = reward_of(world, true)
    drawn = sample_completions(
        world.reference, world.tokenizer, held_out(), int(n), MAX_NEW_TOKENS, seed=world.seed + 1
    )
    return Outcome([], EVALUATED * int(n) if true else labels, 0, best_of(drawn, reward))


def reward_of(world: World, true: bool):
    """The true reward, or one learned from the pairs, and how many labels that took; mean 0 and
    deviation 1 on the reference's samples.
    """
    if true:
        reward = text_reward(world.true_reward)
    else:
        reward = learned_reward(reward_model(world))
    drawn = sample_completions(
        world.reference, world.tokenizer, world.prompts[:128], 1, MAX_NEW_TOKENS, seed=world.seed
    )
    labels = len(different_rows(rows_of(world.pairs))[0])
    return normalised(reward, [row[0] for row in drawn]), labels


def reward_model(world: World) -> ScalarModel:
    """Fitted to the pairs as long as a policy would be, kept for the next run of the same seed."""
    model, path = ScalarModel(world.reference), world.folder / f"reward-{world.seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        train(model, world.pairs, reward_objective(), replace(OFFLINE, seed=world.seed))
        save_file(model.state_dict(), path)
    return model.to(world.reference.device).eval()


METHODS = {
    "reference": untrained,
    "best-of-n, learned reward": partial(best_of_n, true=False),
    "best-of-n, true reward": partial(best_of_n, true=True),
    "ppo, learned reward": partial(policy_gradient, true=False, value_model=True),
    "ppo, true reward": partial(policy_gradient, true=True, value_model=True),
    "reinforce, learned reward": partial(policy_gradient, true=False, value_model=False),
    "reinforce, true reward": partial(policy_gradient, true=True, value_model=False),
    "online dpo": online,
}  # any other is the name of a loss


def held_out() -> list[str]:
    return load_prompts("held_out")[:EVALUATED]


def measured(world: World, samples=None) -> dict:
    """Where a policy stands on the held-out prompts, by a fresh completion of each."""
    if samples is None:
        drawn = sample_completions(
            world.policy, world.tokenizer, held_out(), 1, MAX_NEW_TOKENS, seed=world.seed + 1
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


# --- the studies ---


def sweep(method: str, knob: str, *values: float) -> list[Run]:
    return [Run(method, knob, value) for value in values]


FRONTIER = [
    *sweep("reference", "beta", 0),
    *sweep("dpo", "beta", 0.1, 0.2, 0.5, 1.0),
    *sweep("ppo, learned reward", "beta", 0.1, 0.2, 0.4, 0.8),
    *sweep("ppo, true reward", "beta", 0.1, 0.2, 0.4, 0.8),
    *sweep("preferred-ft", "learning_rate", 5e-5, 1e-4, 2e-4, 4e-4),
    *sweep("unlikelihood", "alpha", 0.05, 0.1, 0.5, 1.0),
    *sweep("best-of-n, learned reward", "n", 2, 4, 8, 16),
    *sweep("online dpo", "beta", 0.1, 0.2, 0.5, 1.0),
]
FAMILY = [
    *sweep("cdpo", "beta", 0.1, 0.5),
    *sweep("robust", "beta", 0.1, 0.5),
    *sweep("dpo-norm", "beta", 4, 15),
    *sweep("ipo", "beta", 0.02, 0.1),
    *sweep("ipo-token", "beta", 0.5, 2),
    *sweep("hinge", "beta", 0.1, 0.5),
    *sweep("apo-zero", "beta", 0.1, 0.5),
    *sweep("apo-down", "beta", 0.1, 0.5),
    *sweep("simpo", "beta", 2, 10),
    *sweep("cpo", "beta", 0.1, 0.5),
    *sweep("orpo", "beta", 0.1, 1),
    *sweep("kto", "beta", 0.1, 0.5),
    *sweep("reinforce, true reward", "beta", 0.2, 0.8),
    *sweep("reinforce, learned reward", "beta", 0.2, 0.8),
]
STUDIES = {"frontier": seeds(FRONTIER, 3), "family": seeds(FAMILY, 1)}


def main(argv=None) -> None:
    module = "dpo_mini.course.frontier"
    args = study_parser(module, __doc__, STUDIES).parse_args(argv)
    results = study(args.name, STUDIES[args.name], run, Path(args.folder), args.workers)
    store(args.name, module, results, Path(args.output))


if __name__ == "__main__":
    main()
