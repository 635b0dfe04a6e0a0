"""What people and models said of the same pairs of answers: agreement, length, place, win rates.

    python -m dpo_mini.course.human_preferences --data ../shared/data/human-preferences

`--data`: a folder with PandaLM's files (Wang et al. 2023, arXiv 2306.05087: `testset-v1.json`, and
`JUDGE-testset-v1.json` of each judge), or one file or data set on the Hub with the same columns
(`instruction`, `input`, `response1`, `response2`, `annotator1` to `annotator3`). Only figures are
kept, in notebooks/results/human_preferences.json; no text is.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpo_mini.course import studies
from dpo_mini.course.labels import Agreement, agreement, numbered, share
from dpo_mini.data import DataError, read_rows
from dpo_mini.evaluation import Estimate, Z, win_rate

VERDICTS = {1: "1", 2: "2", 0: "tie", "1": "1", "2": "2", "0": "tie", "Tie": "tie"}
NONE = "no verdict"  # what a judge said was no verdict at all; it agrees with nobody
FILE, PEOPLE = "testset-v1.json", ("annotator1", "annotator2", "annotator3")


@dataclass(frozen=True)
class Comparison:
    """Two answers to an instruction, and what people and models said of them: "1", "2" or "tie"."""

    instruction: str
    answers: tuple
    people: tuple[str, ...]
    models: str = ""  # which two models answered
    judges: dict[str, str] = field(default_factory=dict)

    @property
    def majority(self) -> str | None:
        """What at least two people said; None where all three differ."""
        return next((v for v in ("1", "2", "tie") if self.people.count(v) >= 2), None)


def read_comparisons(source) -> list[Comparison]:
    """Comparisons from `source`, see above. Raises DataError for rows without people's verdicts."""
    folder = Path(source)
    rows = read_rows(folder / FILE if (folder / FILE).exists() else source)
    judges = {}
    for path in sorted(folder.glob(f"*-{FILE}")) if folder.is_dir() else ():
        said = read_rows(path)
        name = next(n for n in said[0] if n.endswith("_result"))
        judges[path.name.removesuffix(f"-{FILE}")] = {row["idx"]: row[name] for row in said}
    return [comparison(row, judges) for row in rows]


def comparison(row: dict, judges: dict[str, dict]) -> Comparison:
    missing = [n for n in ("instruction", "response1", "response2", *PEOPLE) if n not in row]
    if missing:
        raise DataError(f"{row['_where']}: expected people's verdicts; {missing[0]!r} is missing.")
    people = tuple(VERDICTS.get(row[name]) for name in PEOPLE)
    if None in people:
        raise DataError(f"{row['_where']}: expected 0, 1 or 2 of each annotator.")
    asked = f"{row['instruction']}\n{row.get('input') or ''}".strip()
    said = {name: VERDICTS.get(of.get(row.get("idx")), NONE) for name, of in judges.items()}
    answers = (row["response1"], row["response2"])
    return Comparison(asked, answers, people, row.get("cmp_key") or "", said)


# --- agreement ---


def agreements(items: Sequence[Comparison]) -> dict[str, dict]:
    """Of every two people, of each judge with each person and with the majority; instructions are
    what the intervals count.
    """
    said = {f"person {i + 1}": [c.people[i] for c in items] for i in range(len(PEOPLE))}
    names = list(items[0].judges)
    found = {}
    for a, b in itertools.combinations(said, 2):
        found[f"{a}, {b}"] = agreement(said[a], said[b], [c.instruction for c in items])
    decided = [c for c in items if c.majority]
    for name in names:
        for person, theirs in said.items():
            mine = [c.judges[name] for c in items]
            found[f"{name}, {person}"] = agreement(mine, theirs, [c.instruction for c in items])
        mine, theirs = [c.judges[name] for c in decided], [c.majority for c in decided]
        groups = [c.instruction for c in decided]
        found[f"{name}, majority"] = agreement(mine, theirs, groups)
    return {name: as_dict(value) for name, value in found.items()}


def as_dict(found: Agreement) -> dict:
    both = {"share": found.share._asdict(), "kappa": found.kappa._asdict()}
    return {"n": found.n, "chance": found.chance, **both}


def clear_agreement(items: Sequence[Comparison], judge: str) -> dict:
    """How often a judge names the answer that the people's majority prefers, ties of the judge
    counted as half right; where people tied there is no right answer, so these are left out.
    """
    both = [c for c in items if c.majority in ("1", "2")]
    right = [{c.majority: 1.0, "tie": 0.0, NONE: 0.0}.get(c.judges[judge], -1.0) for c in both]
    return of_signs(right, both)


def of_signs(signs: Sequence[float], items: Sequence[Comparison]) -> dict:
    """The share of +1 among +1 and -1, 0 counting half, with its interval over instructions."""
    values = torch.tensor(list(signs), dtype=torch.float64)
    groups = numbered([c.instruction for c in items])
    return {"n": len(items), **win_rate(values, torch.zeros_like(values), groups)._asdict()}


# --- tastes for length and for a place ---


def longer_preferred(items: Sequence[Comparison], said: Sequence[str]) -> dict:
    """How often the longer answer (in characters) is preferred, of the decided ones; 1/2 is none.

    Rows in which an answer is no text, or both are equally long, are left out.
    """
    kept = [
        (c, verdict) for c, verdict in zip(items, said)
        if verdict in ("1", "2") and all(isinstance(a, str) for a in c.answers)
        and len(c.answers[0]) != len(c.answers[1])
    ]  # fmt: skip
    right = [(len(c.answers[0]) > len(c.answers[1])) == (verdict == "1") for c, verdict in kept]
    found = share(right, [c.instruction for c, _ in kept])
    return {"n": len(kept), **found._asdict()}


def first_preferred(items: Sequence[Comparison], said: Sequence[str]) -> dict:
    """How often the first answer is preferred, of the decided ones."""
    kept = [(c, verdict) for c, verdict in zip(items, said) if verdict in ("1", "2")]
    found = share([verdict == "1" for _, verdict in kept], [c.instruction for c, _ in kept])
    return {"n": len(kept), **found._asdict()}


# --- the win rate of a judge that errs ---


def corrected_win_rate(
    judged: float, n: int, right_of_wins: float, right_of_losses: float, known: tuple[int, int]
) -> Estimate:
    """The true win rate of which an erring judge reports `judged` on `n` comparisons.

    `right_of_wins`: how often the judge calls a win a win; `right_of_losses`: a loss a loss; both
    measured on `known` = (wins, losses) of which people's verdict is known. Rogan and Gladen 1978:
    (judged + right_of_losses - 1) / (right_of_wins + right_of_losses - 1), inside [0, 1]; the
    interval is the delta method's and counts all three samples. Raises DataError for a judge no
    better than a coin: then nothing can be said.
    """
    power = right_of_wins + right_of_losses - 1
    if power <= 0:
        raise DataError("the judge is right no more often than a coin; its win rate says nothing.")
    true = (judged + right_of_losses - 1) / power

    def variance(p, count):
        return p * (1 - p) / count

    total = variance(judged, n) + true**2 * variance(right_of_wins, known[0])
    total += (1 - true) ** 2 * variance(right_of_losses, known[1])
    half = Z * math.sqrt(total) / power
    return Estimate(*(min(1.0, max(0.0, x)) for x in (true, true - half, true + half)))


def win_rates(items: Sequence[Comparison], judge: str) -> list[dict]:
    """For each two models: the first one's win rate by people, by the judge, and by the judge
    corrected with its accuracy on all the *other* comparisons. Only items that both decide.
    """
    kept = [c for c in items if c.majority in ("1", "2") and c.judges[judge] in ("1", "2")]
    table = []
    for models in sorted({c.models for c in kept}):
        mine = [c for c in kept if c.models == models]
        others = [c for c in kept if c.models != models]
        wins, losses = ([c for c in others if c.majority == v] for v in ("1", "2"))
        accuracy = [
            sum(c.judges[judge] == c.majority for c in part) / len(part) for part in (wins, losses)
        ]
        own = {
            name: [c.judges[judge] == v for c in mine if c.majority == v]
            for name, v in (("wins", "1"), ("losses", "2"))
        }
        judged = sum(c.judges[judge] == "1" for c in mine) / len(mine)
        fixed = corrected_win_rate(judged, len(mine), *accuracy, (len(wins), len(losses)))
        people = share([c.majority == "1" for c in mine], [c.instruction for c in mine])
        table.append({
            "models": models, "n": len(mine), "people": people._asdict(), "judged": judged,
            "right_of_wins": accuracy[0], "right_of_losses": accuracy[1],
            "corrected": fixed._asdict(),
            "own": {name: sum(right) / max(1, len(right)) for name, right in own.items()},
        })  # fmt: skip
    return table


def figures(items: Sequence[Comparison]) -> dict:
    """All that chapter 15 shows of such a set."""
    people = [c.majority for c in items]
    said = {"people": people} | {j: [c.judges[j] for c in items] for j in items[0].judges}
    return {
        "items": len(items),
        "instructions": len({c.instruction for c in items}),
        "all three agree": of_signs([1.0 if len({*c.people}) == 1 else -1.0 for c in items], items),
        "no majority": people.count(None),
        "verdicts": {who: dict(Counter(v or "none" for v in s)) for who, s in said.items()},
        "agreement": agreements(items),
        "clear": {judge: clear_agreement(items, judge) for judge in items[0].judges},
        "longer": {who: longer_preferred(items, s) for who, s in said.items()},
        "first": {who: first_preferred(items, s) for who, s in said.items()},
        "win_rates": {judge: win_rates(items, judge) for judge in items[0].judges},
    }  # fmt: skip


def main(argv=None) -> None:
    command = "python -m dpo_mini.course.human_preferences"
    parser = argparse.ArgumentParser(command, description=__doc__)
    parser.add_argument("--data", required=True, help="a folder, a file, or a name on the Hub")
    parser.add_argument("--output", default="notebooks/results")
    args = parser.parse_args(argv)
    result = {"command": f"{command} --data DATA", **figures(read_comparisons(args.data))}
    with studies.written_aside(Path(args.output) / "human_preferences.json") as partial:
        partial.write_text(json.dumps(studies.rounded(result), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
