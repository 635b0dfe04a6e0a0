"""How good the embedded labeller is, measured on IMDb's test reviews, of which no line is kept:

python -m dpo_mini.course.labeller --dataset stanfordnlp/imdb
"""

import argparse
import json
from pathlib import Path

import torch

from dpo_mini.course.studies import rounded
from dpo_mini.curation import cohens_kappa
from dpo_mini.data import read_rows
from dpo_mini.evaluation import mean_interval
from dpo_mini.rewards import load_judge, load_reward

GAPS = (0.0, 0.5, 1.0, 2.0, 3.0, float("inf"))
WORDS = 30  # about what the model writes


def agreement(rewards: torch.Tensor, judged: torch.Tensor, positive: torch.Tensor) -> dict:
    """Accuracy and kappa of two labellers (logits) against the stars and against one another."""
    labels = {"stars": positive, "reward": rewards > 0, "judge": judged > 0}
    report = {}
    for a, b in (("reward", "stars"), ("judge", "stars"), ("reward", "judge")):
        same = (labels[a] == labels[b]).double()
        kappa = cohens_kappa(labels[a].tolist(), labels[b].tolist())
        report[f"{a}, {b}"] = {"agreement": mean_interval(same)._asdict(), "kappa": kappa}
    return report


def by_gap(rewards: torch.Tensor, positive: torch.Tensor) -> list[dict]:
    """Pairs of a good and a bad review: how often the good one has the higher reward, and how often
    Bradley-Terry says that it should, by the gap between the two.
    """
    good, bad = rewards[positive], rewards[~positive]
    n = min(len(good), len(bad))
    gaps = good[:n] - bad[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    table = []
    for low, high in zip(GAPS, GAPS[1:]):
        inside = gaps[(gaps.abs() >= low) & (gaps.abs() < high)]
        row = {"low": low, "high": min(high, 9.0), "pairs": len(inside)}
        row["right"] = mean_interval((inside > 0).double())._asdict()
        row["predicted"] = inside.abs().sigmoid().mean().item()
        table.append(row)
    return table


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m dpo_mini.course.labeller", description=__doc__)
    parser.add_argument("--dataset", default="stanfordnlp/imdb", help="a Hub name or a folder")
    parser.add_argument("--every", type=int, default=8, help="every so manyeth test review")
    parser.add_argument("--output", default="notebooks/results")
    args = parser.parse_args(argv)
    rows = read_rows(args.dataset, "test")[:: args.every]
    reviews = [row["text"].replace("<br />", " ") for row in rows]
    positive = torch.tensor([row["label"] for row in rows]) == 1
    reward, judge = load_reward(), load_judge()
    snippets = [" ".join(review.split()[:WORDS]) for review in reviews]
    result = {
        "command": f"python -m dpo_mini.course.labeller --every {args.every}",
        "reviews": len(reviews),
        "words": WORDS,
    }
    for name, texts in (("whole", reviews), ("snippets", snippets)):
        rewards, judged = reward(texts), judge(texts)
        result[name] = agreement(rewards, judged, positive)
        lengths = torch.tensor([float(len(text)) for text in texts])
        both = torch.stack([lengths, rewards])
        result[name]["length_correlation"] = torch.corrcoef(both)[0, 1].item()
        if name == "snippets":
            result["by_gap"] = by_gap(rewards, positive)
    Path(args.output, "labeller.json").write_text(json.dumps(rounded(result), indent=1), "utf-8")


if __name__ == "__main__":
    main()
