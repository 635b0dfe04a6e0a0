"""A number for a text: rewards that label pairs, and a judge of another kind that only evaluates.

A reward is any function from a list of texts to a tensor [texts] of logits of P(positive).
"""

import json
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mini.hub import HubError
from dpo_mini.models import EMBEDDED, EMBEDDED_FOLDER, load_model


class SentimentHead(nn.Module):
    """Every token casts a vote; their mean is the logit.

    `hidden` [batch, length, features], `mask` [batch, length], True on tokens -> logits [batch].
    A mean of votes gives each token its share of the reward, which a policy learns more easily than
    a verdict on the whole: its implicit reward is a sum over tokens too.
    """

    def __init__(self, features: int, width: int = 256):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.read = nn.Linear(features, width)
        self.dropout = nn.Dropout(0.1)
        self.vote = nn.Linear(width, 1)
        self.register_buffer("temperature", torch.ones(()))  # calibrated on held-out reviews

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        votes = self.vote(self.dropout(nn.functional.gelu(self.read(self.norm(hidden))))).squeeze(
            -1
        )
        return (votes * mask).sum(-1) / mask.sum(-1) / self.temperature


def features_of(model) -> int:
    """The width of all hidden states side by side: the embeddings' and each layer's."""
    return (model.config.n_layer + 1) * model.config.n_embd


class SentimentReward:
    """Reads with the embedded model's frozen body and a head fitted on IMDb's train split.

    A text longer than the context is read in parts; its logit is their mean.
    """

    def __init__(self, body, tokenizer, head: SentimentHead):
        self.body, self.tokenizer, self.head = body, tokenizer, head.eval()
        self.part_length = body.config.n_positions - 1

    def parts(self, text: str) -> list[list[int]]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = range(0, max(1, len(ids)), self.part_length)
        return [[self.tokenizer.bos_token_id, *ids[i : i + self.part_length]] for i in starts]

    def hidden(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """The hidden states of all layers, side by side, [rows, length, features], and the mask."""
        length = max(map(len, rows))
        device = self.body.device
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        sizes = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(length, device=device) < sizes[:, None]
        with torch.no_grad():
            output = self.body(ids, attention_mask=mask.long(), output_hidden_states=True)
        return torch.cat(output.hidden_states, -1), mask

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        rows = [(i, part) for i, text in enumerate(texts) for part in self.parts(text)]
        rows.sort(key=lambda row: len(row[1]))  # little padding
        totals, counts = torch.zeros(len(texts)), torch.zeros(len(texts))
        for start in range(0, len(rows), batch_size):
            index, parts = zip(*rows[start : start + batch_size])
            index = torch.tensor(index)
            totals.index_add_(0, index, self.head(*self.hidden(parts)).float().cpu())
            counts.index_add_(0, index, torch.ones(len(index)))
        return totals / counts


class ClassifierReward:
    """Any two-class classifier, such as siebert/sentiment-roberta-large-english, or a folder."""

    def __init__(self, name: str):
        from transformers import AutoModelForSequenceClassification

        self.model, self.tokenizer = load_model(name, AutoModelForSequenceClassification)
        labels = {label.lower(): i for i, label in self.model.config.id2label.items()}
        if len(labels) != 2:
            raise HubError(
                f"{name} has the labels {sorted(labels)}; expected two, one of them positive."
            )
        self.positive = next((i for label, i in labels.items() if label.startswith("pos")), 1)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        logits = []
        for i in range(0, len(texts), batch_size):
            chunk = list(texts[i : i + batch_size])
            inputs = self.tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")
            scores = self.model(**inputs.to(self.model.device)).logits.float().cpu()
            logits.append(scores[:, self.positive] - scores[:, 1 - self.positive])
        return torch.cat(logits)


class WordJudge:
    """The second judge, for evaluation, never for labels: linear on words and pairs of words."""

    def __init__(self, weights: dict[str, float], bias: float):
        self.weights, self.bias = weights, bias

    @staticmethod
    def features(text: str) -> dict[str, float]:
        """Words and word pairs that occur, each once, as a vector of length 1."""
        words = re.findall(r"[a-z']+|[!?]", text.lower())
        grams = Counter(words) | Counter(" ".join(pair) for pair in zip(words, words[1:]))
        return dict.fromkeys(grams, len(grams) ** -0.5) if grams else {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        scores = [
            sum(self.weights.get(gram, 0.0) * value for gram, value in self.features(text).items())
            for text in texts
        ]
        return torch.tensor(scores) + self.bias


def load_reward(name=EMBEDDED):
    """The embedded sentiment reward, or the classifier of that name (a folder, or on the Hub)."""
    if name != EMBEDDED:
        return ClassifierReward(name)
    from safetensors.torch import load_file

    model, tokenizer = load_model()
    head = SentimentHead(features_of(model))
    head.load_state_dict(load_file(EMBEDDED_FOLDER / "reward.safetensors"))  # half to float32
    return SentimentReward(model.transformer, tokenizer, head.to(model.device))


def load_judge() -> WordJudge:
    """The embedded second judge."""
    stored = json.loads((EMBEDDED_FOLDER / "judge.json").read_text(encoding="utf-8"))
    return WordJudge(stored["weights"], stored["bias"])


def load_prompts(split: str = "train") -> list[str]:
    """The embedded prompts, beginnings of 2-8 tokens; `split` is "train" or "held_out"."""
    return json.loads((EMBEDDED_FOLDER / "prompts.json").read_text(encoding="utf-8"))[split]
