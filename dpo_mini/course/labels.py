"""People's verdicts: which pairs are shown and how, what was said of them, and how well two agree.

A `Showing` is what a labeller sees. A `Label` is what was said of it, one line of a labels' file.
The pairs that follow from the labels go into a file of their own, which any trainer reads.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.curation import cohens_kappa, swapped
from dpo_mini.data import DataError, PreferencePair, as_text, read_rows, write_jsonl
from dpo_mini.evaluation import Estimate, win_rate

VERDICTS = ("left", "right", "tie", "skip")  # a tie is "can't tell"; a skipped pair says nothing


class Showing(NamedTuple):
    """A pair as it is shown: `first` is the pair's chosen completion, whoever chose it before."""

    item: int  # which pair of the list
    first_is_left: bool
    repeat: bool = False  # it was shown before, with its sides the other way round


@dataclass(frozen=True)
class Label:
    """A verdict on two completions, as they were shown."""

    item: int
    prompt: str
    left: str
    right: str
    first_is_left: bool
    repeat: bool
    verdict: str  # one of VERDICTS
    seconds: float  # from the showing to the verdict

    @property
    def preferred(self) -> str:
        """One of "first", "second", "tie" or "skip": the verdict without its side."""
        if self.verdict not in ("left", "right"):
            return self.verdict
        return "first" if (self.verdict == "left") == self.first_is_left else "second"


def showings(pairs: Sequence, every: int = 6, apart: int = 8, seed: int = 0) -> list[Showing]:
    """All pairs in a random order, each on random sides; from the start on, one showing of `every`
    repeats an earlier one, with its sides exchanged and at least `apart` showings later.

    A repeated pair says how often a labeller agrees with himself or herself. It has its sides
    exchanged, so that a taste for a place counts as disagreement.
    """
    draw = random.Random(seed)
    shown: list[Showing] = []
    for item in draw.sample(range(len(pairs)), len(pairs)):
        shown.append(Showing(item, draw.random() < 0.5))
        again = {old.item for old in shown if old.repeat}
        known = [old for old in shown[: max(0, len(shown) - apart)] if old.item not in again]
        if known and len(shown) % every == every - 1:
            old = draw.choice(known)
            shown.append(Showing(old.item, not old.first_is_left, repeat=True))
    return shown


def label(pairs: Sequence[PreferencePair], showing: Showing, verdict: str, seconds: float) -> Label:
    """What is kept of a verdict on a showing."""
    pair = pairs[showing.item]
    sides = (pair.chosen, pair.rejected)
    left, right = map(as_text, sides if showing.first_is_left else sides[::-1])
    return Label(
        showing.item, as_text(pair.prompt), left, right, showing.first_is_left, showing.repeat,
        verdict, round(seconds, 2),
    )  # fmt: skip


def labelled_pairs(
    labels: Sequence[Label], pairs: Sequence[PreferencePair]
) -> list[PreferencePair]:
    """The pairs that the labels decide, the preferred completion chosen. Ties, skipped pairs and
    repeats are left out; the rewards of an earlier labeller are too.
    """
    decided = [one for one in labels if one.preferred in ("first", "second") and not one.repeat]
    turned = [
        pairs[one.item] if one.preferred == "first" else swapped(pairs[one.item]) for one in decided
    ]
    kept = ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "tokenizer")
    return [PreferencePair(**{name: getattr(pair, name) for name in kept}) for pair in turned]


# --- files ---


def pairs_file(path) -> Path:
    """Where the pairs of a labels' file are: "mine.jsonl" has its pairs in "mine.pairs.jsonl"."""
    return Path(path).with_suffix(".pairs.jsonl")


def save_labels(path, labels: Sequence[Label], pairs: Sequence[PreferencePair]) -> None:
    """Write the labels, and beside them the pairs that they decide (`pairs_file`).

    Each file is written whole or not at all. Without labels, or pairs, the file is removed.
    """
    for file, rows in (
        (Path(path), [asdict(one) for one in labels]),
        (pairs_file(path), labelled_pairs(labels, pairs)),
    ):
        if rows:
            write_jsonl(file, rows)
        else:
            file.unlink(missing_ok=True)


def read_labels(path) -> list[Label]:
    """The labels of a file that `save_labels` wrote; none where there is no file.

    Raises DataError, with file and line, for a row that is no label.
    """
    if not Path(path).exists():
        return []
    kinds = {"item": int, "prompt": str, "left": str, "right": str, "first_is_left": bool,
             "repeat": bool, "verdict": str, "seconds": float}  # fmt: skip
    labels = []
    for row in read_rows(path):
        for name, kind in kinds.items():
            if type(row.get(name)) is not kind:
                raise DataError(
                    f"{row['_where']}: expected a label with {name!r} as {kind.__name__}."
                )
        if row["verdict"] not in VERDICTS:
            one_of = ", ".join(VERDICTS)
            raise DataError(f"{row['_where']}: the verdict {row['verdict']!r} is none of {one_of}.")
        labels.append(Label(**{name: row[name] for name in kinds}))
    return labels


def resumed(path, pairs: Sequence[PreferencePair], shown: Sequence[Showing]) -> list[Label]:
    """The labels already in the file, checked to be of these pairs, shown in this order.

    Raises DataError where they are of other pairs: a label must not move to another pair.
    """
    labels = read_labels(path)
    for number, old in enumerate(labels, start=1):
        same = number <= len(shown) and label(pairs, shown[number - 1], old.verdict, old.seconds)
        if same != old:
            raise DataError(
                f"{path}, line {number}: this label is of another pair than the one that is shown "
                "here. Name another file, or use the pairs and the seed that it was begun with."
            )
    return labels


# --- agreement ---


class Agreement(NamedTuple):
    """How often two labellers say the same of `n` items, and how often chance would."""

    n: int
    share: Estimate  # Wilson's interval; over groups where items are not independent
    chance: float  # two labellers with these frequencies of verdicts, each drawing at random
    kappa: Estimate  # 0 as chance, 1 always; its interval is a bootstrap's, over groups


def share(right: Sequence[bool], groups: Sequence | None = None) -> Estimate:
    """How often `right` is True, with Wilson's interval; `groups` as in `win_rate`. Of no item it
    is None, without ends.
    """
    if not len(right):
        return Estimate(None, None, None)
    sign = torch.tensor([1.0 if one else -1.0 for one in right], dtype=torch.float64)
    return win_rate(sign, torch.zeros_like(sign), numbered(groups) if groups is not None else None)


def numbered(groups: Sequence) -> list[int]:
    """Groups of any names as numbers from 0, in the order of their first items."""
    numbers: dict = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


def agreement(a: Sequence, b: Sequence, groups: Sequence | None = None, seed=0) -> Agreement:
    """Agreement of two lists of verdicts on the same items, of any number of classes.

    `groups` [n]: items of one group (one instruction, one prompt) are not independent. Raises
    DataError for lists of unequal length or none.
    """
    kappa = cohens_kappa(a, b)
    observed = share([x == y for x, y in zip(a, b)], groups)
    chance = sum(list(a).count(x) * list(b).count(x) for x in set(a)) / len(a) ** 2
    low, high = kappa_interval(a, b, groups if groups is not None else range(len(a)), seed)
    return Agreement(len(a), observed, chance, Estimate(kappa, low, high))


def kappa_interval(a: Sequence, b: Sequence, groups: Sequence, seed: int = 0, draws: int = 1000):
    """The middle 95% of kappa over `draws` bootstrap samples of whole groups: (low, high)."""
    names = {name: i for i, name in enumerate(dict.fromkeys([*a, *b]))}
    rows = numbered(groups)
    count = len(set(rows))
    tables = torch.zeros(count, len(names), len(names), dtype=torch.float64)
    for row, x, y in zip(rows, a, b):
        tables[row, names[x], names[y]] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    kappas = kappa_of_tables(torch.einsum("dg,gxy->dxy", times, tables))
    return tuple(kappas.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def kappa_of_tables(tables: Tensor) -> Tensor:
    """Cohen's kappa [n] of tables of counts [n, classes, classes]; 1 where chance alone is 1."""
    shares = tables / tables.sum((1, 2), keepdim=True)
    observed = shares.diagonal(dim1=1, dim2=2).sum(1)
    chance = (shares.sum(1) * shares.sum(2)).sum(1)
    kappas = (observed - chance) / (1 - chance)
    return torch.where(chance > 1 - 1e-12, torch.ones_like(kappas), kappas)


def repeated(labels: Sequence[Label]) -> tuple[list[str], list[str]]:
    """What was said of each repeated pair, the first time and the second; skipped ones left out."""
    first = {one.item: one.preferred for one in labels if not one.repeat}
    twice = [(first[one.item], one.preferred) for one in labels if one.repeat]
    decided = [both for both in twice if "skip" not in both]
    return [one for one, _ in decided], [other for _, other in decided]


def both_labelled(one: Sequence[Label], other: Sequence[Label]) -> tuple[list, list, list[int]]:
    """The verdicts of two labellers on the pairs that both judged, and which pairs these are."""
    theirs = {label.item: label.preferred for label in other if not label.repeat}
    mine = {label.item: label.preferred for label in one if not label.repeat}
    items = [i for i in mine if i in theirs and "skip" not in (mine[i], theirs[i])]
    return [mine[i] for i in items], [theirs[i] for i in items], items
