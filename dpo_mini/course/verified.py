"""Chapter 17's stored runs: GRPO and what its simplifications change, DPO on pairs that a program
verified, and two rewards from the same pairs.

    python -m dpo_mini.course.verified verified
    python -m dpo_mini.course.verified two_rewards

Each run is one seed of all methods: new prompts, new samples, a new order. It is kept in
runs/studies, and a study that was stopped goes on where it was. On one core "verified" takes about
twenty minutes and "two_rewards" about ten.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dpo_mini.course.studies import (
    columns,
    labelled_pairs,
    rounded,
    seeds,
    store,
    study,
    study_parser,
)
from dpo_mini.curation import pairs_from_samples
from dpo_mini.demo import DEMO_CONFIG
from dpo_mini.evaluation import distinct_n, mean_interval, pass_at_k, sequence_kl
from dpo_mini.grpo import GRPOConfig, first_sentence_words, grpo, verified_reward
from dpo_mini.losses import dpo_loss
from dpo_mini.models import context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_prompts
from dpo_mini.rlhf import ScalarModel, reward_objective
from dpo_mini.sampling import sample_completions
from dpo_mini.settings import check_whole
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import preference_objective, train, train_preferences

MOST_WORDS, LIMIT = 4, 12  # of the first sentence; tokens of a completion
GRPO = GRPOConfig(
    steps=6, batch_size=64, num_generations=8, learning_rate=4e-4, max_completion_length=LIMIT,
    monitor_every=3,
)  # fmt: skip
SAMPLES = GRPO.steps * GRPO.batch_size  # of every method
VARIANTS = {
    "GRPO": {},
    "no spread": {"scale_rewards": "none"},
    "with a KL penalty": {"beta": 0.3},
    "two passes, clip": {"num_iterations": 2},
    "two passes, no clip": {"num_iterations": 2, "epsilon": 1e9},
}
ROUNDS = {"DPO": 1, "DPO in rounds": 2}
DPO_STEPS = 12
ASKED, TRIES = 24, 8  # held-out prompts, and samples of each

PROMPTS = 60  # of each four completions, for the two rewards
# Openings of other texts than film reviews: what no pair of the course's prompts is about.
OTHER_PROMPTS = tuple(
    "The hotel room was/Our waiter/This phone/My new shoes/The pasta was/This book/The battery/"
    "I bought this lamp/Our flight was/The concert last night/This novel/The soup/My dentist/"
    "The museum/This vacuum cleaner/The album/I ordered a coffee/The teacher/The beach/This laptop/"
    "Their customer service/Dinner was/The bus/My neighbour/The weather in April/This recipe/"
    "The garden/The new song/I tried the cake/The hairdresser/This tent/The train was/Our guide/"
    "The exhibition/This umbrella/The bread/The course at school/My doctor/The pool/This toy/"
    "The bar on the corner/Her speech/The match/This chair/The shop/The view/His painting/"
    "The letter/This bicycle/The meeting".split("/")
)


def passes(text: str) -> bool:
    """Whether the first sentence ends, and has one to four words."""
    return (first_sentence_words(text) or 0) in range(1, MOST_WORDS + 1)


@dataclass(frozen=True)
class Run:
    """All methods of a study with one seed."""

    name: str
    seed: int = 0


# --- GRPO, its simplifications, and DPO on verified pairs ---


def tries(model, tokenizer, prompts, n: int, seed: int):
    """Samples and whether each passes, bool [prompts, n]."""
    drawn = sample_completions(model, tokenizer, prompts, n, LIMIT, seed=seed)
    return drawn, torch.tensor([[passes(c.text) for c in row] for row in drawn])


def measured(policy, reference, tokenizer, seed: int) -> dict:
    """Where a policy stands on held-out prompts: pass@k, KL, how varied its passes are."""
    prompts = load_prompts("held_out")[:ASKED]
    drawn, passed = tries(policy, tokenizer, prompts, TRIES, seed + 1)
    kl = sequence_kl(policy, reference, [c for row in drawn for c in row[:2]])
    ks = [k for k in (1, 2, 4, 8) if k <= TRIES]
    good = [c.text for row, ok in zip(drawn, passed) for c, yes in zip(row, ok) if yes]
    return {
        "pass@k": {k: pass_at_k(passed, k).mean().item() for k in ks},
        "kl": mean_interval(kl).mean,
        "different": len({passage(text) for text in good}) / max(1, len(good)),
        "distinct_2": distinct_n([row[0].text for row in drawn]),
        "samples": [f"{row[0].prompt}|{row[0].text}" for row in drawn[:4]],
    }


def passage(text: str) -> str:
    """The first sentence alone."""
    return " ".join(text.split(".")[0].split("!")[0].split("?")[0].lower().split())


def watch(reference, tokenizer, seed: int, before: dict):
    """A monitor: where the policy stands; `before` is known of the reference."""

    def monitor(policy, log) -> dict:
        at_start = len(log) == 1
        found = before if at_start else measured(policy, reference, tokenizer, seed)
        return {"pass": found["pass@k"][1], "kl": found["kl"], "report": found}

    return monitor


def dpo_on_verified_pairs(policy, reference, tokenizer, prompts, rounds: int, seed: int, monitor):
    """As many samples as GRPO has, in `rounds`: sampled from the policy as it then is, paired pass
    with fail of the same prompt, and DPO on the pairs. Returns the log: where the policy was
    watched, before, in the middle and at the end.
    """
    log = [{"step": 0}]
    log[0] |= monitor(policy, log)
    n_prompts = SAMPLES // GRPO.num_generations // rounds
    for k in range(rounds):
        mine = prompts[k * n_prompts : (k + 1) * n_prompts]
        drawn, passed = tries(policy, tokenizer, mine, GRPO.num_generations, 1000 * seed + k)
        pairs, _ = pairs_from_samples(drawn, passed.flatten().double(), tokenizer=tokenizer)
        pairs = tokenize_pairs(pairs, tokenizer, context_length(policy))
        items = list(zip(pairs, reference_logps(reference, pairs).tolist()))
        objective = preference_objective(lambda logps: dpo_loss(logps, 0.1), 0.1)
        for half in range(2 // rounds):  # the optimiser begins anew, at a constant rate
            config = replace(
                DEMO_CONFIG, steps=DPO_STEPS // 2, block_size=1, learning_rate=2e-4,
                warmup_steps=2, schedule="constant", seed=2 * seed + half,
            )  # fmt: skip
            train(policy, items, objective, config)
            log.append({"step": len(log), "pairs": len(pairs)})
            log[-1] |= monitor(policy, log)
    return log


def verified(run: Run, folder: Path) -> dict:
    """{method: {"report", "log"}} of one seed, and the reference's report."""
    reference, tokenizer = load_model()
    every, needed = load_prompts("train"), SAMPLES // GRPO.num_generations
    prompts, seed = every[run.seed * needed : (run.seed + 1) * needed], run.seed
    before = measured(reference, reference, tokenizer, seed)
    monitor, reward = watch(reference, tokenizer, seed, before), verified_reward(passes)
    logs = {}
    for name, changes in VARIANTS.items():
        policy, _ = load_model()
        config = replace(GRPO, seed=seed, **changes)
        logs[name] = grpo(policy, reference, tokenizer, prompts, reward, config, monitor)
    for name, rounds in ROUNDS.items():
        policy, _ = load_model()
        rest = (tokenizer, prompts, rounds, seed, monitor)
        logs[name] = dpo_on_verified_pairs(policy, reference, *rest)
    found = {"reference": {"report": before}}
    for name, log in logs.items():
        report = log[-1]["report"]
        rows = [{k: v for k, v in row.items() if k != "report"} for row in log]
        found[name] = {"report": report, "log": columns(rows)}
    return rounded({"setting": asdict(run), "methods": found})


# --- the same pairs, two rewards ---


def two_rewards(run: Run, folder: Path) -> dict:
    """The shares of pairs that an explicit and an implicit reward rank rightly, of one seed: fitted
    on the same pairs, in the same order, for as many steps.
    """
    reference, tokenizer = load_model()
    seed, length = run.seed, context_length(reference)
    every, held_out = load_prompts("train"), load_prompts("held_out")
    prompts = every[seed * PROMPTS : (seed + 1) * PROMPTS]
    pairs = tokenize_pairs(labelled_pairs(prompts, seed, folder), tokenizer, length)
    asked = {"held out": held_out[: len(OTHER_PROMPTS)], "other texts": list(OTHER_PROMPTS)}
    unseen = {
        name: tokenize_pairs(labelled_pairs(which, 1000, folder), tokenizer, length)
        for name, which in asked.items()
    }
    unseen = {"trained on": pairs[: 6 * 40]} | unseen
    config = replace(DEMO_CONFIG, steps=PROMPTS // 2, seed=seed)  # each pair is seen twice
    model = ScalarModel(reference)
    train(model, pairs, reward_objective(), config)
    found = {"explicit": accuracies(unseen, partial(reward_objective().logps, model))}
    for beta in (0.1, 0.5):
        policy, _ = load_model()
        train_preferences(policy, pairs, config, loss="dpo", loss_options={"beta": beta})

        margins = partial(implicit_margins, policy, reference)
        found[f"implicit, beta {beta}"] = accuracies(unseen, margins)
    return rounded({"setting": asdict(run), "accuracies": found})


def implicit_margins(policy, reference, pairs) -> torch.Tensor:
    """Of the log-ratios, [pairs]: the implicit rewards' over beta."""
    mine, theirs = (reference_logps(model, pairs) for model in (policy, reference))
    return (mine - theirs) @ torch.tensor([1.0, -1.0])


@torch.no_grad()
def accuracies(sets: dict, margins) -> dict:
    return {name: (margins(some) > 0).double().mean().item() for name, some in sets.items()}


STUDIES = {"verified": verified, "two_rewards": two_rewards}


def main(argv=None) -> None:
    module = "dpo_mini.course.verified"
    parser = study_parser(module, __doc__, STUDIES)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    args = parser.parse_args(argv)
    check_whole("seeds", args.seeds, 2, 5, "Try 5: an interval needs two.")
    settings, work = seeds([Run(args.name)], args.seeds), STUDIES[args.name]
    results = study(args.name, settings, work, Path(args.folder), args.workers)
    store(args.name, f"{module} --seeds {args.seeds}", results, Path(args.output))


if __name__ == "__main__":
    main()
