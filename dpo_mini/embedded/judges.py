"""How the embedded reward and the second judge were fitted: on IMDb's train split only."""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from dpo_mini.models import EMBEDDED_FOLDER, load_model
from dpo_mini.rewards import SentimentHead, SentimentReward, WordJudge, features_of


def snippet(text: str, words: int, generator: random.Random) -> str:
    """`words` consecutive words from a random place; the whole text where it is shorter."""
    parts = text.split()
    start = generator.randrange(max(1, len(parts) - words + 1))
    return " ".join(parts[start : start + words])


def fit_reward(texts, labels, *, model_folder=None, steps=1400, rounds=2, batch_size=64, seed=0):
    """A `SentimentReward` fitted on random snippets of 25 to 90 words, then calibrated.

    `texts`, `labels` (1 positive, 0 negative): every tenth is kept for calibration. In each round
    of `steps` the learning rate falls to 0 once.
    """
    from tqdm.auto import tqdm

    torch.manual_seed(seed)
    generator = random.Random(seed)
    model, tokenizer = load_model(model_folder) if model_folder else load_model()
    head = SentimentHead(features_of(model)).to(model.device)
    reward = SentimentReward(model.transformer, tokenizer, head)
    fitted = [i for i in range(len(texts)) if i % 10]
    head.train()
    bar = tqdm(range(rounds * steps), desc="reward")
    for step in bar:
        if step % steps == 0:
            optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.01)
        rate = min((step % steps + 1) / 30, 1 - step % steps / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        chosen = generator.sample(fitted, batch_size)
        longest = generator.choice((25, 40, 40, 60, 90))  # one length a batch: little padding
        rows = [reward.parts(snippet(texts[i], longest, generator))[0] for i in chosen]
        target = torch.tensor([float(labels[i]) for i in chosen], device=model.device)
        loss = F.binary_cross_entropy_with_logits(head(*reward.hidden(rows)), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    head.eval()
    kept = range(0, len(texts), 10)
    logits = reward([snippet(texts[i], 40, generator) for i in kept])
    head.temperature.fill_(best_temperature(logits, torch.tensor([float(labels[i]) for i in kept])))
    return reward


def best_temperature(logits, targets) -> float:
    """The temperature T under which sigmoid(logits / T) has the least log loss (Guo 2017)."""
    grid = torch.logspace(-0.7, 0.7, 200)
    losses = [F.binary_cross_entropy_with_logits(logits / t, targets).item() for t in grid]
    return grid[losses.index(min(losses))].item()


def fit_judge(texts, labels, *, features=12000, steps=400, seed=0):
    """A `WordJudge`: logistic regression on the words and pairs of words most tied to the label.

    Fitted on each review as a whole and on four snippets of 40 words.
    """
    generator = random.Random(seed)
    rows, targets, counts = [], [], {}
    for text, label in zip(texts, labels):
        for part in [text] + [snippet(text, 40, generator) for _ in range(4)]:
            rows.append(WordJudge.features(part))
            targets.append(float(label))
        for gram in rows[-5]:
            counts.setdefault(gram, [0, 0])[label] += 1
    reviews = max(1, len(texts))

    def weight_of_evidence(gram):  # distance from half and half, in standard errors
        negative, positive = counts[gram]
        return abs(positive - negative) / (negative + positive) ** 0.5

    vocabulary = sorted(
        (g for g in counts if sum(counts[g]) >= max(5, reviews // 5000)), key=weight_of_evidence
    )
    vocabulary = {gram: i for i, gram in enumerate(vocabulary[-features:])}
    index, offsets, values = [], [], []
    for row in rows:
        offsets.append(len(index))
        for gram, value in row.items():
            if gram in vocabulary:
                index.append(vocabulary[gram])
                values.append(value)
    index, offsets, values = torch.tensor(index), torch.tensor(offsets), torch.tensor(values)
    targets = torch.tensor(targets)
    weights = torch.zeros(len(vocabulary), 1, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=steps // 10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logits = (
            F.embedding_bag(index, weights, offsets, mode="sum", per_sample_weights=values).squeeze(
                1
            )
            + bias
        )
        loss = F.binary_cross_entropy_with_logits(logits, targets) + 2e-6 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = {gram: round(weights[i].item(), 3) for gram, i in vocabulary.items()}
    return WordJudge(fitted, round(bias.item(), 4))


def calibration_error(logits, targets, bins=15) -> float:
    """Expected calibration error of sigmoid(logits), in equal-width bins (Guo et al. 2017)."""
    p = logits.sigmoid()
    which = (p * bins).long().clamp(max=bins - 1)
    gaps = [
        (which == b).float().mean() * (p[which == b].mean() - targets[which == b].mean()).abs()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))


def judge_quality(judge, texts, labels, seed=1) -> dict:
    """Accuracy on whole reviews and on a random 40-word snippet of each, with the latter's ECE."""
    generator = random.Random(seed)
    targets = torch.tensor([float(label) for label in labels])
    whole, short = judge(texts), judge([snippet(text, 40, generator) for text in texts])
    return {
        "reviews": len(texts),
        "accuracy": ((whole > 0) == (targets > 0)).float().mean().item(),
        "accuracy_40_words": ((short > 0) == (targets > 0)).float().mean().item(),
        "calibration_error_40_words": calibration_error(short, targets),
    }


def save_reward(reward: SentimentReward, folder=EMBEDDED_FOLDER) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.half().contiguous() for name, t in reward.head.state_dict().items()}
    save_file(tensors, Path(folder) / "reward.safetensors")


def save_judge(judge: WordJudge, folder=EMBEDDED_FOLDER) -> None:
    text = json.dumps({"bias": judge.bias, "weights": judge.weights}, ensure_ascii=False, indent=0)
    (Path(folder) / "judge.json").write_text(text, encoding="utf-8")
