"""Simulated labellers with stated tastes, and what a model learns from so many labels of theirs.

    python -m dpo_mini.course.people learning_curve

Studies: learning_curve, choosing. Results go to notebooks/results/people_NAME.json.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dpo_mini import curation
from dpo_mini.course import studies
from dpo_mini.course.labelling import KEYS, Page
from dpo_mini.course.labels import share
from dpo_mini.data import PreferencePair
from dpo_mini.evaluation import Estimate
from dpo_mini.models import load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_prompts, load_reward
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import tokenize_pairs
from dpo_mini.training import train_preferences

ACTING = re.compile(
    r"\b(act(ed|ing|or|ors|ress|resses|s)?|cast|performances?|play(s|ed|ing)?|roles?"
    r"|stars?|starring|characters?)\b"
)


def acting_words(text: str) -> int:
    return len(ACTING.findall(text.lower()))


# What each taste finds in a text, in logits of preference: a gap of 1 is preferred in 73 of 100.
TASTES: dict[str, Callable[[Sequence[str]], Tensor]] = {
    "kinder": lambda texts: load_reward()(list(texts)),
    "shorter": lambda texts: torch.tensor([-len(text) / 10 for text in texts]),
    "about acting": lambda texts: torch.tensor([2.0 * acting_words(text) for text in texts]),
}


def taste_gaps(pairs: Sequence[PreferencePair], taste: str) -> Tensor:
    """By how many logits a taste prefers each pair's first completion, [pairs]; 0 is no preference.

    Rounded, so that equal completions tie whatever batch they were read in.
    """
    texts = [p.prompt + y for p in pairs for y in (p.chosen, p.rejected)]
    first, second = TASTES[taste](texts).double().view(-1, 2).unbind(1)
    return (first - second).mul(1e4).round() / 1e4


def simulated_verdicts(gaps: Tensor, threshold: float = 0.0, seed: int = 0) -> list[str]:
    """A labeller's verdicts on pairs with these gaps: "first", "second", "tie", or "skip" where the
    gap is exactly 0.

    Rao and Kupper 1967: first with probability sigmoid(gap - threshold), second with
    sigmoid(-gap - threshold), a tie otherwise. A threshold of 0 is Bradley-Terry.
    """
    drawn = torch.rand(len(gaps), generator=torch.Generator().manual_seed(seed)).double()
    first, second = (gaps - threshold).sigmoid(), (-gaps - threshold).sigmoid()
    verdicts = []
    for gap, p, q, u in zip(gaps.tolist(), first.tolist(), second.tolist(), drawn.tolist()):
        said = "first" if u < p else "second" if u > 1 - q else "tie"
        verdicts.append(said if gap else "skip")
    return verdicts


def decided(pairs: Sequence[PreferencePair], verdicts: Sequence[str]) -> list[PreferencePair]:
    """The pairs that verdicts decide, the preferred completion chosen."""
    both = [(p, said) for p, said in zip(pairs, verdicts) if said in ("first", "second")]
    return [p if said == "first" else curation.swapped(p) for p, said in both]


def label_by_taste(
    page: Page, pairs: Sequence[PreferencePair], taste: str, threshold: float = 0.25, seed: int = 0
) -> None:
    """A simulated labeller at a labelling page: it presses a key for each pair that is left.

    A repeated pair is judged anew, so that the labeller can contradict itself.
    """
    keys = {verdict: key for key, verdict in KEYS.items()}
    done = len(page.labels)
    gaps = taste_gaps(pairs, taste)
    gaps = torch.stack([gaps[showing.item] for showing in page.shown])
    for showing, said in list(zip(page.shown, simulated_verdicts(gaps, threshold, seed)))[done:]:
        if said in ("first", "second"):
            said = "left" if (said == "first") == showing.first_is_left else "right"
        page.press(keys[said])


# --- one labeller, one model ---


@dataclass(frozen=True)
class Labelled:
    """One training run on some labels of one simulated labeller: the same one gives the same."""

    name: str = "kinder"  # of TASTES
    labels: int = 100
    seed: int = 0  # which pairs, which verdicts, which order
    chosen: str = "random"  # "unsure": the second half of the labels is chosen; see `unsure`
    beta: float = 0.1
    passes: int = 3
    learning_rate: float = 2e-4

    @property
    def steps(self) -> int:
        return -(-self.passes * self.labels // BATCH)


BATCH = 8
HELD_OUT, PAIRS_OF_A_PROMPT = 100, 2


def train_on(pairs: Sequence[PreferencePair], setting: Labelled, loss="dpo"):
    """The embedded model trained on these pairs, and its log."""
    policy, tokenizer = load_model()
    tokenized = tokenize_pairs(pairs, tokenizer, policy.config.n_positions)
    config = TrainingConfig(
        steps=setting.steps, batch_size=min(BATCH, len(pairs)), learning_rate=setting.learning_rate,
        warmup_steps=3, seed=setting.seed,
    )  # fmt: skip
    return policy, train_preferences(policy, tokenized, config, loss=loss, beta=setting.beta)


def log_ratios(policy, pairs: Sequence[PreferencePair], reference_logps_of: Tensor) -> Tensor:
    """The log-ratio of each pair's first completion minus that of its second, nats, [pairs]."""
    _, tokenizer = load_model()
    tokenized = tokenize_pairs(pairs, tokenizer, policy.config.n_positions)
    ratios = reference_logps(policy, tokenized) - reference_logps_of
    return (ratios[:, 0] - ratios[:, 1]).double()


def implicit_margins(policy, pairs: Sequence[PreferencePair]) -> Tensor:
    """`log_ratios` to the embedded model."""
    reference, tokenizer = load_model()
    tokenized = tokenize_pairs(pairs, tokenizer, policy.config.n_positions)
    return log_ratios(policy, pairs, reference_logps(reference, tokenized))


def agrees(margins: Tensor, gaps: Tensor, prompts: Sequence) -> Estimate:
    """How often a model ranks pairs as a taste does, with Wilson's interval over prompts. Pairs
    between which the taste has no preference are left out.
    """
    kept = gaps.nonzero().flatten().tolist()
    return share([bool(margins[i] * gaps[i] > 0) for i in kept], [prompts[i] for i in kept])


def pool(seed: int = 0, folder: Path | None = None, prompts: int = 600) -> list[PreferencePair]:
    """Pairs to label, one of each prompt, in an order and on sides of this seed."""
    pairs = studies.labelled_pairs(load_prompts("train")[:prompts], 0, folder)
    generator = torch.Generator().manual_seed(seed)
    first: dict[str, PreferencePair] = {}
    for i in torch.randperm(len(pairs), generator=generator).tolist():
        pair = pairs[i] if torch.rand((), generator=generator) < 0.5 else curation.swapped(pairs[i])
        first.setdefault(pair.prompt, pair)
    return list(first.values())


def held_out_pairs(folder: Path | None = None, prompts: int = HELD_OUT) -> list[PreferencePair]:
    """Two pairs of each of so many held-out prompts, all four completions in them."""
    pairs = studies.labelled_pairs(load_prompts("held_out")[:prompts], 1000, folder)
    kept: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        mine = kept.setdefault(pair.prompt, [])
        known = {text for p in mine for text in (p.chosen, p.rejected)}
        if len(mine) < PAIRS_OF_A_PROMPT and not known & {pair.chosen, pair.rejected}:
            mine.append(pair)
    return [pair for mine in kept.values() for pair in mine]


def unsure(policy, pairs: Sequence[PreferencePair], n: int) -> list[int]:
    """The `n` pairs between which the model's implicit reward differs least: the ones whose label
    it cannot foresee. Indices, the least sure first.
    """
    return implicit_margins(policy, pairs).abs().argsort()[:n].tolist()


@cache
def asked(taste: str, seed: int, folder: Path | None) -> tuple[list[PreferencePair], Tensor]:
    """The pool of a seed, without the pairs between which the taste has no preference (they are
    skipped), and the gaps of the others.
    """
    pairs = pool(seed, folder)
    gaps = taste_gaps(pairs, taste)
    known = gaps.nonzero().flatten().tolist()
    return [pairs[i] for i in known], gaps[known]


@cache
def examined(folder: Path | None) -> tuple[list[PreferencePair], dict[str, Tensor], Tensor]:
    """The held-out pairs, their gaps by each taste, and the reference's log-probabilities."""
    pairs = held_out_pairs(folder)
    reference, tokenizer = load_model()
    tokenized = tokenize_pairs(pairs, tokenizer, reference.config.n_positions)
    gaps = {taste: taste_gaps(pairs, taste) for taste in TASTES}
    return pairs, gaps, reference_logps(reference, tokenized)


def labels_of(setting: Labelled, folder: Path | None = None) -> tuple[list[PreferencePair], float]:
    """The pairs that this labeller labels, as labelled; the share labelled against the taste."""
    pairs, gaps = asked(setting.name, setting.seed, folder)
    said = simulated_verdicts(gaps, seed=setting.seed)
    chosen = list(range(setting.labels))
    if setting.chosen == "unsure":
        half = setting.labels // 2
        begun, _ = train_on(decided(pairs[:half], said[:half]), replace(setting, labels=half))
        waiting = unsure(begun, pairs[half : half + WAITING], half)
        chosen = [*range(half), *(half + i for i in waiting)]
    against = [(said[i] == "first") != (gaps[i] > 0).item() for i in chosen]
    labelled = decided([pairs[i] for i in chosen], [said[i] for i in chosen])
    return labelled, sum(against) / len(against)


WAITING = 300  # pairs among which the unsure ones are chosen


def run(setting: Labelled, folder: Path | None = None) -> dict:
    """Label, train, and compare with every taste on held-out prompts: a row of numbers."""
    held_out, gaps, before = examined(folder)
    prompts = [pair.prompt for pair in held_out]
    labelled, against = labels_of(setting, folder)
    policy, _ = train_on(labelled, setting)
    margins = log_ratios(policy, held_out, before)
    row = {"setting": asdict(setting), "labels": len(labelled), "against_the_taste": against}
    row["agreement"] = {t: agrees(margins, gaps[t], prompts)._asdict() for t in TASTES}
    return studies.rounded(row)


# --- studies ---

SEEDS, SIZES = 3, (10, 30, 100)
STUDIES = {
    "learning_curve": [
        Labelled(taste, n, seed) for seed in range(SEEDS) for taste in TASTES for n in SIZES
    ],
    "choosing": [
        Labelled(taste, 100, seed, chosen="unsure")
        for seed in range(SEEDS) for taste in ("kinder",)
    ],
}  # fmt: skip


def main(argv=None) -> None:
    module = "dpo_mini.course.people"
    args = studies.study_parser(module, __doc__, STUDIES).parse_args(argv)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in STUDIES[args.name]:
        path = folder / f"people-{studies.mark(setting)}.json"
        result = studies.kept_result(path)
        if result is None:
            result = run(setting, folder)
            with studies.written_aside(path) as partial:
                partial.write_text(json.dumps(result), encoding="utf-8")
            print(setting, result["agreement"][setting.name], flush=True)
        results.append(result)
    store(args.name, results, Path(args.output))


def store(name: str, results: list[dict], output: Path) -> None:
    """Write notebooks/results/people_NAME.json, with the command that makes it."""
    made = {"command": f"python -m dpo_mini.course.people {name}", "runs": results}
    with studies.written_aside(output / f"people_{name}.json") as partial:
        partial.write_text(json.dumps(made, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
