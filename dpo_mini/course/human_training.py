"""Train a chat model on people's choices, and ask how often it then ranks answers as people do.

    python -m dpo_mini.course.human_training smollm2 --data ../shared/data/human-preferences

`--data` as in `dpo_mini.course.human_preferences`. Held out are whole instructions. What is
measured beside the implicit reward: length alone, the log-probability alone, and an explicit reward
model on the same training pairs. Only figures are kept, in notebooks/results/human_training.json.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_mini.course import studies
from dpo_mini.course.human_preferences import Comparison, of_signs, read_comparisons
from dpo_mini.data import DataError, PreferencePair
from dpo_mini.models import context_length, load_model
from dpo_mini.reference import reference_logps
from dpo_mini.settings import TrainingConfig
from dpo_mini.tokens import TokenizedPair, tokenize_pairs
from dpo_mini.training import train_preferences

BATCH, LEARNING_RATE, BETA = 8, 2e-5, 0.1


def chat_pair(item: Comparison) -> PreferencePair:
    """A decided comparison as messages, the majority's answer chosen."""
    better, worse = item.answers if item.majority == "1" else item.answers[::-1]
    answer = [[{"role": "assistant", "content": text}] for text in (better, worse)]
    return PreferencePair([{"role": "user", "content": item.instruction}], *answer)


def usable(items: Sequence[Comparison], words: int) -> list[Comparison]:
    """Decided comparisons of two different texts, of at most so many words with the instruction."""
    return [
        c for c in items
        if c.majority in ("1", "2") and all(isinstance(a, str) and a.strip() for a in c.answers)
        and c.answers[0] != c.answers[1]
        and sum(len(text.split()) for text in (c.instruction, *c.answers)) <= words
    ]  # fmt: skip


def split_by_instruction(
    items: Sequence[Comparison], train: int, held_out: int, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """About `train` and `held_out` comparisons that share no instruction."""
    names = sorted({c.instruction for c in items})
    parts: tuple[list, list] = [], []
    for name in random.Random(seed).sample(names, len(names)):
        mine = [c for c in items if c.instruction == name]
        if len(parts[0]) < train:
            parts[0].extend(mine[: train - len(parts[0])])
        else:
            parts[1].extend(mine[: held_out - len(parts[1])])
    if not (parts[0] and parts[1]):
        raise DataError("too few instructions to hold some out. Try more words.")
    return parts


@torch.no_grad()
def features(model, pairs: Sequence[TokenizedPair]) -> Tensor:
    """Of each pair, the chosen answer's mean last hidden state minus the rejected one's, [pairs,
    width]: what a linear reward sees.
    """

    def mean_state(prompt, completion):
        ids = torch.tensor([[*prompt, *completion]], device=model.device)
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
        return hidden[len(prompt) :].mean(0).float().cpu()

    rows = [
        mean_state(p.prompt_ids, p.chosen_ids) - mean_state(p.prompt_ids, p.rejected_ids)
        for p in pairs
    ]
    return torch.stack(rows)


def linear_reward(x: Tensor, penalty: float = 1.0, steps: int = 200) -> Tensor:
    """The weights [width] of a linear Bradley-Terry reward on differences `x` [pairs, width]; its
    ridge penalty is on differences scaled to length 1.
    """
    scale = x.norm(dim=1).mean()
    weights = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(x / scale @ weights).sum()
        loss = loss + penalty / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach() / scale


def study(model, tokenizer, items: Sequence[Comparison], train: int, held_out: int, seed: int):
    """A row for each way to rank two answers: how often it ranks held-out ones as people do."""
    known, unseen = split_by_instruction(items, train, held_out, seed)
    length = context_length(model)
    pairs, tests = (
        tokenize_pairs([chat_pair(c) for c in part], tokenizer, length) for part in (known, unseen)
    )
    before = reference_logps(model, tests)
    explicit = features(model, tests) @ linear_reward(features(model, pairs))
    config = TrainingConfig(
        steps=-(-len(pairs) // BATCH), batch_size=min(BATCH, len(pairs)), warmup_steps=1,
        learning_rate=LEARNING_RATE, seed=seed,
    )  # fmt: skip
    log = train_preferences(model, pairs, config, loss="dpo", beta=BETA)
    moved = reference_logps(model, tests) - before
    tokens = torch.tensor([(len(p.chosen_ids), len(p.rejected_ids)) for p in tests]).double()

    def gap(values):
        return values[:, 0] - values[:, 1]

    rankings = {
        "implicit reward": gap(moved),
        "explicit reward, linear": explicit,
        "longer answer": gap(tokens),
        "log-probability": gap(before),
        "log-probability per token": gap(before.double() / tokens),
    }
    rows = {
        name: of_signs(torch.sign(values).tolist(), unseen) for name, values in rankings.items()
    }
    return {
        "pairs": len(pairs), "instructions": len({c.instruction for c in known}),
        "held_out": len(tests), "held_out_instructions": len({c.instruction for c in unseen}),
        "steps": config.steps, "learning_rate": LEARNING_RATE, "beta": BETA, "seed": seed,
        "loss": [row["loss"] for row in log if "loss" in row], "right": rows,
    }  # fmt: skip


def main(argv=None) -> None:
    command = "python -m dpo_mini.course.human_training"
    parser = argparse.ArgumentParser(command, description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a chat model: a name or a folder")
    parser.add_argument("--data", required=True, help="as in dpo_mini.course.human_preferences")
    parser.add_argument("--words", type=int, default=40, help="of instruction and answers, at most")
    parser.add_argument("--train", type=int, default=40, help="pairs to train on, once")
    parser.add_argument("--held-out", type=int, default=60, help="pairs to be ranked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="notebooks/results")
    args = parser.parse_args(argv)
    items = usable(read_comparisons(args.data), args.words)
    found = study(*load_model(args.model), items, args.train, args.held_out, args.seed)
    made = {"command": f"{command} {args.model} --data DATA", "words": args.words, **found}
    with studies.written_aside(Path(args.output) / "human_training.json") as partial:
        partial.write_text(json.dumps(studies.rounded(made), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
