"""Chapter 17's stored runs: GRPO and what its simplifications change, DPO on pairs that a program
verified, and two rewards from the same pairs.

    python -m dpo_mini.course.verified verified
    python -m dpo_mini.course.verified two_rewards

Each run is one seed of all methods: new prompts, new samples, a new order. It is kept in
runs/studies, and a study that was stopped goes on where it was. On one core "verified" takes about
ten minutes and "two_rewards" about five.
"""

from dataclasses import asdict, dataclass, replace
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
from dpo_mini.grpo import GRPOConfig, first_sentence_has, grpo, verified_reward
from dpo_mini.losses import dpo_loss
from dpo_mini.models import context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_prompts
from dpo_mini.rlhf import ScalarModel, reward_objective
from dpo_mini.sampling import sample_completions
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import preference_objective, train, train_preferences

WORDS, LIMIT = 4, 12  # of the first sentence; tokens of a completion
GRPO = GRPOConfig(steps=12, batch_size=64, num_generations=8, learning_rate=4e-4,
                  max_completion_length=LIMIT, monitor_every=4)  # fmt: skip
SAMPLES = GRPO.steps * GRPO.batch_size  # of every method
VARIANTS = {
    "GRPO": {},
    "no spread": {"scale_rewards": "none"},
    "with a KL penalty": {"beta": 0.3},
    "three passes, clip": {"num_iterations": 3},
    "three passes, no clip": {"num_iterations": 3, "epsilon": 1e9},
}
ROUNDS = {"DPO": 1, "DPO in rounds": 4}
ASKED, TRIES = 40, 16  # held-out prompts and samples of each, at the end

# Openings of other texts than film reviews: what no pair of the course's prompts is about.
OTHER_PROMPTS = (
    "The hotel room was", "Our waiter", "This phone", "My new shoes", "The pasta was", "This book",
    "I bought this lamp", "The battery", "Our flight was", "The concert last night", "This novel",
    "The soup", "My dentist", "The museum", "This vacuum cleaner", "The album", "I ordered a coffee",
    "The teacher", "Their customer service", "The beach", "This laptop", "Dinner was", "The bus",
    "My neighbour", "The weather in April", "This recipe", "The garden", "The new song",
    "I tried the cake", "The hairdresser", "This tent", "The train was", "The exhibition",
    "Our guide", "This umbrella", "The bread", "The course at school", "My doctor", "The pool",
    "This toy", "The bar on the corner", "Her speech", "The match", "This chair", "The shop",
    "The view", "His painting", "The letter", "This bicycle", "The meeting",
)  # fmt: skip


def passes(text: str) -> bool:
    return first_sentence_has(text, WORDS)


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


def measured(policy, reference, tokenizer, seed: int, asked=ASKED, n=TRIES) -> dict:
    """Where a policy stands on held-out prompts: pass@k, KL, how varied its passes are."""
    prompts = load_prompts("held_out")[:asked]
    drawn, passed = tries(policy, tokenizer, prompts, n, seed + 1)
    kl = sequence_kl(policy, reference, [c for row in drawn for c in row[:3]])
    ks = [k for k in (1, 2, 4, 8, 16) if k <= n]
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


def watch(reference, tokenizer, seed: int):
    """A monitor: pass@1 and KL of fresh samples of few held-out prompts."""

    def monitor(policy, log) -> dict:
        found = measured(policy, reference, tokenizer, seed, asked=32, n=8)
        return {"pass": found["pass@k"][1], "kl": found["kl"]}

    return monitor


def dpo_on_verified_pairs(policy, reference, tokenizer, prompts, rounds: int, seed: int):
    """As many samples as GRPO has, in `rounds`: sampled from the policy as it then is, paired pass
    with fail of the same prompt, and DPO on the pairs. Returns the log.
    """
    log, monitor = [], watch(reference, tokenizer, seed)
    n_prompts = SAMPLES // GRPO.num_generations // rounds
    for k in range(rounds):
        mine = prompts[k * n_prompts : (k + 1) * n_prompts]
        drawn, passed = tries(policy, tokenizer, mine, GRPO.num_generations, 1000 * seed + k)
        pairs, _ = pairs_from_samples(drawn, passed.flatten().double(), tokenizer=tokenizer)
        pairs = tokenize_pairs(pairs, tokenizer, context_length(policy))
        items = list(zip(pairs, reference_logps(reference, pairs).tolist()))
        objective = preference_objective(lambda logps: dpo_loss(logps, 0.1), 0.1)
        config = replace(
            DEMO_CONFIG, steps=24 // rounds, block_size=1, learning_rate=2e-4, warmup_steps=2,
            schedule="constant", monitor_every=6, seed=seed + k,
        )  # fmt: skip
        rows = train(policy, items, objective, config, monitor=monitor)
        log += [row | {"pairs": len(pairs)} for row in rows if "pass" in row]
    return log


def verified(run: Run, folder: Path) -> dict:
    """{method: {"report", "log"}} of one seed, and the reference's report."""
    reference, tokenizer = load_model()
    every = load_prompts("train")
    start = run.seed * SAMPLES // GRPO.num_generations
    prompts = (every + every)[start : start + SAMPLES // GRPO.num_generations]
    reward, seed = verified_reward(passes), run.seed
    found = {"reference": {"report": measured(reference, reference, tokenizer, seed)}}
    for name, changes in VARIANTS.items():
        policy, _ = load_model()
        config = replace(GRPO, seed=seed, **changes)
        rest = (tokenizer, prompts, reward, config, watch(reference, tokenizer, seed))
        log = grpo(policy, reference, *rest)
        found[name] = {"report": measured(policy, reference, tokenizer, seed), "log": columns(log)}
    for name, rounds in ROUNDS.items():
        policy, _ = load_model()
        log = dpo_on_verified_pairs(policy, reference, tokenizer, prompts, rounds, seed)
        found[name] = {"report": measured(policy, reference, tokenizer, seed), "log": columns(log)}
    return rounded({"setting": asdict(run), "methods": found})


# --- the same pairs, two rewards ---


def two_rewards(run: Run, folder: Path) -> dict:
    """The shares of pairs that an explicit and an implicit reward rank rightly, of one seed: fitted
    on the same pairs, in the same order, for as many steps.
    """
    reference, tokenizer = load_model()
    seed, length = run.seed, context_length(reference)
    every, held_out = load_prompts("train"), load_prompts("held_out")
    prompts = every[seed * 100 : (seed + 1) * 100]
    pairs = tokenize_pairs(labelled_pairs(prompts, seed, folder), tokenizer, length)
    asked = {"held out": held_out[:50], "other texts": list(OTHER_PROMPTS)}
    unseen = {
        name: tokenize_pairs(labelled_pairs(which, 1000, folder), tokenizer, length)
        for name, which in asked.items()
    }
    unseen = {"trained on": pairs[:300]} | unseen
    config = replace(DEMO_CONFIG, steps=50, seed=seed)
    model = ScalarModel(reference)
    train(model, pairs, reward_objective(), config)
    found = {"explicit": accuracies(unseen, lambda some: reward_objective().logps(model, some))}
    for beta in (0.1, 0.5):
        policy, _ = load_model()
        train_preferences(policy, pairs, config, loss="dpo", loss_options={"beta": beta})

        def margins(some):
            mine, theirs = (reference_logps(m, some) for m in (policy, reference))
            return ((mine - theirs) @ torch.tensor([1.0, -1.0])).double()

        found[f"implicit, beta {beta}"] = accuracies(unseen, margins)
    return rounded({"setting": asdict(run), "accuracies": found})


@torch.no_grad()
def accuracies(sets: dict, margins) -> dict:
    return {name: (margins(some) > 0).double().mean().item() for name, some in sets.items()}


STUDIES = {"verified": verified, "two_rewards": two_rewards}


def main(argv=None) -> None:
    module = "dpo_mini.course.verified"
    args = study_parser(module, __doc__, STUDIES).parse_args(argv)
    settings, work = seeds([Run(args.name)], 5), STUDIES[args.name]
    results = study(args.name, settings, work, Path(args.folder), args.workers)
    store(args.name, module, results, Path(args.output))


if __name__ == "__main__":
    main()
