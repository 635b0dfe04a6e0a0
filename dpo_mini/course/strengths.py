"""One policy at many strengths beside policies that were trained anew at those betas.

    python -m dpo_mini.course.strengths strengths

All runs train on the same pairs; a seed changes their order. The policy of BETA is sampled at every
one of STRENGTHS, the others as they are. All samples use the same prompts and random numbers.
Every finished run is kept in runs/studies. The whole takes some twelve minutes on one core.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo_mini.course.studies import labelled_pairs, rounded, seeds, store, study, study_parser
from dpo_mini.demo import DEMO_CONFIG
from dpo_mini.evaluation import distinct_n, mean_interval, sequence_kl
from dpo_mini.logprobs import sequence_logps
from dpo_mini.models import context_length, load_model
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.sampling import Completion, sample_mixture
from dpo_mini.tokens import collate, tokenize_pairs
from dpo_mini.training import train_preferences

MAX_NEW_TOKENS = 32
BETA = 0.4  # of the one policy
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
RETRAINED = (0.25, 0.5, 2.0)  # at BETA / strength


@dataclass(frozen=True)
class Run:
    """One DPO run of the embedded model, and the strengths at which it is sampled."""

    name: str
    beta: float
    strengths: tuple[float, ...] = (1.0,)
    seed: int = 0  # of the order of the pairs
    prompts: int = 400  # with four completions each
    steps: int = 100
    evaluated: int = 128  # held-out prompts


def run(setting: Run, folder: Path) -> dict:
    """Train and measure: {"setting", "report", "strengths"}, report being that of strength 1."""
    (policy, tokenizer), (reference, _) = load_model(), load_model()
    pairs = labelled_pairs(load_prompts("train")[: setting.prompts], 0, folder)
    pairs = tokenize_pairs(pairs, tokenizer, context_length(policy))
    config = replace(DEMO_CONFIG, steps=setting.steps, seed=setting.seed)
    train_preferences(policy, pairs, config, beta=setting.beta)
    rewards, prompts = (load_reward(), load_judge()), load_prompts("held_out")[: setting.evaluated]
    measured = [
        {"strength": s} | quality(policy, reference, tokenizer, prompts, s, *rewards)
        for s in setting.strengths
    ]
    report = next(row for row in measured if row["strength"] == 1)
    return rounded({"setting": asdict(setting), "report": report, "strengths": measured})


def quality(
    policy, reference, tokenizer, prompts: Sequence[str], strength: float, reward, judge,
    max_new_tokens: int = MAX_NEW_TOKENS, seed: int = 1,
) -> dict:  # fmt: skip
    """What the mixture of this strength writes: P(positive) by both judges, KL, distinct word
    pairs, and the reference's log-probability of a token, each mean with its interval over prompts.
    """
    drawn = sample_mixture(
        policy, reference, tokenizer, prompts, strength, max_new_tokens=max_new_tokens, seed=seed
    )
    completions: list[Completion] = [row[0] for row in drawn]
    texts = [c.full_text for c in completions]
    rows = collate([(c.prompt_ids, c.ids) for c in completions])
    lengths = rows.completion_mask.sum(1)
    kl = sequence_kl(policy, reference, completions, strength=strength)
    logps = sequence_logps(reference, *rows.to(reference.device)).detach().cpu()
    return {
        "reward_policy": mean_interval(reward(texts).sigmoid())._asdict(),
        "judge_policy": mean_interval(judge(texts).sigmoid())._asdict(),
        "kl": mean_interval(kl)._asdict(),
        "reference_logp": mean_interval(logps / lengths)._asdict(),
        "distinct_2": distinct_n([c.text for c in completions]),
    }


BASE = Run(f"beta {BETA:g}, every strength", BETA, STRENGTHS)
RUNS = (BASE, *(Run(f"beta {BETA / s:g}, trained anew", BETA / s) for s in RETRAINED))
STUDIES = {"strengths": seeds(RUNS, 5)}


def main(argv=None) -> None:
    module = "dpo_mini.course.strengths"
    args = study_parser(module, __doc__, STUDIES).parse_args(argv)
    folder = Path(args.folder)
    labelled_pairs(load_prompts("train")[: BASE.prompts], 0, folder)  # once, for all runs
    results = study(args.name, STUDIES[args.name], run, folder, args.workers)
    store(args.name, module, results, Path(args.output))


if __name__ == "__main__":
    main()
