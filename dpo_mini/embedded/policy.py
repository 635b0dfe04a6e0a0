"""The policy that ships: the demo's, stored as its difference from the embedded model.

python -m dpo_mini.embedded.policy [FOLDER] [--dataset IMDB]

trains it with `demo` in FOLDER (runs/policy), or takes the demo that has been run there, and
stores it here with its pairs and its card. With the embedded model's data the card says whether it
recites. The difference is small, so that eight bits hold it as well as float16 holds the weights;
what is measured for the card is what is stored.
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dpo_mini.data import preference_pairs, read_rows, write_jsonl
from dpo_mini.demo import accuracy_of, demo
from dpo_mini.embedded.card import longest_shared_run
from dpo_mini.embedded.eight_bits import pack, unpack
from dpo_mini.evaluation import evaluate
from dpo_mini.hub import HubError
from dpo_mini.models import EMBEDDED_FOLDER, context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.rewards import load_judge, load_prompts, load_reward
from dpo_mini.sampling import sample_completions
from dpo_mini.settings import TrainingError
from dpo_mini.tokens import tokenize_pairs

FOLDER = EMBEDDED_FOLDER / "policy"
DIFFERENCE, MARGINS = "difference.safetensors", "margins.jsonl"
BASE = "base_weights"  # in the difference's metadata: which model it is to be added to

CARD = """---
license: apache-2.0
language: en
base_model: dpo_mini's embedded model
base_weights: {base_weights}
tags: [gpt2, imdb, dpo, dpo_mini]
---

# The embedded model, trained with DPO to write positive reviews

The policy of dpo_mini's demo, as the difference of its weights from the embedded model's:
`{file}`, {size:.1f} MB, matrices in eight bits with a scale for each 64 numbers.
`dpo_mini.embedded.policy.load_policy()` adds it to the embedded model.

- **Command**: `python -m dpo_mini.embedded.policy`, which runs `dpo-mini demo` and stores what it
  trained. torch {torch}.
- **Data**: `pairs.jsonl.gz`, {pairs:,} pairs of {prompts:,} prompts. Of each prompt the embedded
  model wrote {samples} completions of {max_new_tokens} tokens at temperature 1. Of two completions
  the embedded sentiment reward chose the one that it scores higher. No person labelled any.
- **Training**: DPO, beta {beta}, {steps} steps of {batch_size} pairs, AdamW at a learning rate of
  {learning_rate:g}, seed {seed}.

## Measured on {held_out} held-out prompts, one completion each

The means, and a 95% interval that counts prompts. These are of the stored weights, the eight bits
included.

| | embedded model | this policy |
|---|---|---|
{rows}
| KL from the embedded model, nats | 0 | {kl} |
| win rate by the reward | | {win_rate} |
| held-out pairs ranked rightly | | {accuracy} |

- **The reward is what it was trained for**: P(positive) by the reward says how well it was
  optimised, not how good the reviews are. The second judge never labelled a pair, but it reads the
  same words.
- **Eight bits**: over the same completions, the log-probability of a token differs from that of
  the weights before rounding by {rounding:.1e} nats on average.
- **Memorisation**: {memorisation}.

## Samples (temperature 1, no truncation, the first held-out prompts)

{examples}

## Limits

All limits of the embedded model. Besides, it praises whatever it writes about, says less that is
different, and its praise is no opinion of anybody's. One seed: another gives other weights. It was
made to show what beta does, for teaching, and for nothing else.

## Licence and citation

Weights: Apache-2.0. No review is part of this repository. Cite the method, Rafailov et al. 2023
(arXiv 2305.18290), and the data, Maas et al., ACL 2011.
"""


def load_policy(folder=FOLDER):
    """The policy that ships and its tokenizer, as `load_model` gives the embedded model's.

    Raises HubError where the difference belongs to other weights than the embedded model's.
    """
    model, tokenizer = load_model()
    file = Path(folder) / DIFFERENCE
    with safe_open(file, "np") as stored:
        if (stored.metadata() or {}).get(BASE) != base_weights():
            raise HubError(
                f"{file} is the difference from another embedded model than the one that is here. "
                "Make it again: python -m dpo_mini.embedded.policy."
            )
    difference = unpack(load_file(file))
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            weight.add_(torch.from_numpy(difference[name]).to(weight.device))
    return model, tokenizer


def weights_of(model) -> dict[str, torch.Tensor]:
    """The parameters by name, the head left out where it is the embedding."""
    return dict(model.named_parameters())


def store_difference(policy, folder: Path) -> None:
    """Write what `load_policy` reads.

    Raises TrainingError for a policy that was trained from another model: a run that was left from
    before the embedded model was replaced, say.
    """
    reference, _ = load_model()
    start, trained = weights_of(reference), weights_of(policy)
    shapes = [{name: w.shape for name, w in weights.items()} for weights in (start, trained)]
    difference = {}
    if shapes[0] == shapes[1]:
        difference = {name: (w - start[name]).detach().cpu().numpy() for name, w in trained.items()}
    moved = sum(float((d**2).sum()) for d in difference.values())
    if not difference or moved > 0.25 * sum(w.square().sum().item() for w in start.values()):
        raise TrainingError(
            "this policy was not trained from the embedded model: its weights are elsewhere. Give "
            "another folder, and the demo is run there."
        )
    save_file(pack(difference), folder / DIFFERENCE, metadata={BASE: base_weights()})


def store_pairs(pairs: Path, folder: Path) -> None:
    """The pairs as they were written, zipped; the same pairs give the same file."""
    zipped = gzip.compress(pairs.read_bytes(), 9, mtime=0)
    (folder / "pairs.jsonl.gz").write_bytes(zipped)


def store_margins(pairs, folder: Path, shown: int = 60) -> None:
    """What the web edition shows of the gradient's weights: held-out pairs, one of each prompt,
    with their texts and the margin in nats that the stored policy gives them.
    """
    (policy, tokenizer), (reference, _) = load_policy(folder), load_model()
    pairs = list({pair.prompt: pair for pair in pairs}.values())[:shown]
    tokenized = tokenize_pairs(pairs, tokenizer, context_length(policy))
    log_ratios = reference_logps(policy, tokenized) - reference_logps(reference, tokenized)
    margins = (log_ratios[:, 0] - log_ratios[:, 1]).tolist()
    names = ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: getattr(pair, name) for name in names} | {"margin": round(margin, 4)}
        for pair, margin in zip(pairs, margins)
    ]
    write_jsonl(folder / MARGINS, rows)


def base_weights() -> str:
    """A hash of the embedded model's weights, to which, and to no others, it is to be added."""
    weights = (EMBEDDED_FOLDER / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:16]


def remembered(model, tokenizer, dataset, samples: int = 1000) -> str:
    """What the card says about reciting; `dataset` as in `dpo-mini pretrain`, or None."""
    if dataset is None:
        return "not measured for this policy; the embedded model's card has its own"
    texts = [
        row["text"].replace("<br />", " ")
        for split in ("train", "unsupervised")
        for row in read_rows(dataset, split)
    ]
    drawn = sample_completions(model, tokenizer, [""] * samples, 1, 60, seed=11)
    shared = longest_shared_run([completion.text for (completion,) in drawn], texts)
    return (
        f"the longest run of words that {samples:,} samples share with\n  a review that the "
        f'embedded model was trained on is {len(shared.split())} words:\n  "{shared}"'
    )


def rounding_error(model, exact_model, completions) -> float:
    """Mean absolute difference of two models' log-probabilities of the completions' tokens."""
    gaps = []
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.ids])
        first = len(completion.prompt_ids) - 1
        with torch.no_grad():
            logps = [
                m(ids).logits[0, first:-1].log_softmax(-1).gather(1, ids[0, first + 1 :, None])
                for m in (model, exact_model)
            ]
        gaps.append((logps[0] - logps[1]).abs().flatten())
    return torch.cat(gaps).mean().item()


def card(folder: Path, run: Path, dataset=None) -> str:
    """README.md of the stored policy, measured from what is stored."""
    settings = json.loads((run / "report.json").read_text(encoding="utf-8"))["settings"]
    (policy, tokenizer), (reference, _) = load_policy(folder), load_model()
    held_out = len(read_rows(run / "samples.jsonl"))
    prompts = load_prompts("held_out")[:held_out]
    report, _ = evaluate(
        policy, reference, tokenizer, prompts, load_reward(), load_judge(), 1,
        settings["max_new_tokens"],
    )  # fmt: skip
    pairs = preference_pairs(read_rows(run / "held_out_pairs.jsonl"))
    report |= accuracy_of(policy, reference, tokenizer, pairs, settings["beta"])
    drawn = sample_completions(policy, tokenizer, prompts[:8], 1, settings["max_new_tokens"])
    drawn = [completion for (completion,) in drawn]

    def said(key: str) -> str:
        value = report[key]
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"

    rows = [
        f"| {label} | {said(f'{key}_reference')} | {said(f'{key}_policy')} |"
        for label, key in (
            ("P(positive), the reward", "reward"),
            ("P(positive), the second judge", "judge"),
            ("tokens", "length"),
        )
    ]
    distinct = [f"{report[f'distinct_2_{name}']:.3f}" for name in ("reference", "policy")]
    rows.append(f"| distinct word pairs | {' | '.join(distinct)} |")
    return CARD.format(
        **settings, file=DIFFERENCE, size=(folder / DIFFERENCE).stat().st_size / 1e6,
        base_weights=base_weights(), rows="\n".join(rows), kl=said("kl"),
        win_rate=said("win_rate"), accuracy=said("preference_accuracy"), held_out=held_out,
        rounding=rounding_error(policy, load_model(run)[0], drawn),
        memorisation=remembered(policy, tokenizer, dataset),
        examples="\n".join(f"- {' '.join(c.full_text.split())}" for c in drawn[:6]),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/policy", help="the demo's folder")
    parser.add_argument("--dataset", help="IMDb, for the card's line about memorisation")
    options = parser.parse_args(arguments)
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "report.json").exists():
        demo(run, resume=True)
    FOLDER.mkdir(exist_ok=True)
    store_difference(load_model(run)[0], FOLDER)
    store_pairs(run / "pairs.jsonl", FOLDER)
    store_margins(preference_pairs(read_rows(run / "held_out_pairs.jsonl")), FOLDER)
    (FOLDER / "README.md").write_text(card(FOLDER, run, options.dataset), encoding="utf-8")


if __name__ == "__main__":
    main()
