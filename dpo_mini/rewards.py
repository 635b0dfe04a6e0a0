"""A number for a text: rewards that label pairs, and a judge of another kind that only evaluates.

A reward is any function from a list of texts to a tensor [texts]: the logit of P(positive), or the
one output of a reward model, which is no logit of anything. `shown_as` tells them apart.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo_mini.hub import HubError
from dpo_mini.models import EMBEDDED, EMBEDDED_FOLDER, context_length, load_model

P_POSITIVE, RAW_REWARD = "P(positive)", "reward"  # what a reward's number is shown as


def shown_as(reward) -> str:
    """What a reward's number is called where it is shown; a plain function's is P(positive)."""
    return getattr(reward, "shown_as", P_POSITIVE)


def shown_values(reward, numbers: Tensor) -> Tensor:
    """A reward's numbers [n] as they are shown: probabilities, or a reward model's own output."""
    return numbers if shown_as(reward) == RAW_REWARD else numbers.sigmoid()


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


# Labels that say which class is the good one; compared in lower case, letters only.
GOOD_WORDS = {"positive", "pos", "good", "nontoxic", "nottoxic", "safe", "helpful", "harmless",
              "acceptable", "preferred", "chosen", "nothate", "nonhate"}  # fmt: skip
BAD_WORDS = {"negative", "neg", "bad", "toxic", "unsafe", "unhelpful", "harmful", "unacceptable",
             "rejected", "hate", "offensive", "toxicity"}  # fmt: skip


class ClassifierReward:
    """A reward model or a classifier, such as siebert/sentiment-roberta-large-english, or a folder.

    One output is the reward itself. Of several labels the reward is the logit of P(positive),
    log p - log(1 - p). `positive` names that label; without it the labels must say it by a known
    word, and HubError names them where they do not. Texts are cut at the model's context.
    """

    def __init__(self, name: str, positive: str | None = None):
        from transformers import AutoModelForSequenceClassification

        self.model, self.tokenizer = load_model(name, AutoModelForSequenceClassification)
        config = self.model.config
        labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.positive = positive_label(name, labels, positive)
        self.shown_as = RAW_REWARD if len(labels) == 1 else f"P({labels[self.positive]})"
        # With one output, or one yes-or-no for each label, an output is a logit already.
        self.is_logit = len(labels) == 1 or config.problem_type == "multi_label_classification"
        if config.get_text_config().pad_token_id is None:
            config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.longest = min(self.tokenizer.model_max_length, context_length(self.model))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        pads = self.tokenizer.pad_token is not None
        size, logits = batch_size if pads else 1, [torch.empty(0)]
        for i in range(0, len(texts), size):
            inputs = self.tokenizer(
                list(texts[i : i + size]), padding=pads, truncation=True, max_length=self.longest,
                return_tensors="pt",
            )  # fmt: skip
            outputs = self.model(**inputs.to(self.model.device)).logits.float().cpu()
            logits.append(self.logits_of(outputs))
        return torch.cat(logits)

    def logits_of(self, outputs: Tensor) -> Tensor:
        """[texts, labels] -> [texts]."""
        chosen = outputs[:, self.positive]
        if self.is_logit:
            return chosen
        others = [i for i in range(outputs.shape[1]) if i != self.positive]
        return chosen - outputs[:, others].logsumexp(1)


def positive_label(name: str, labels: list[str], positive: str | None = None) -> int:
    """Which of a classifier's labels is the positive one.

    `positive` names it; otherwise a known word does: one good label, or of two labels one bad one.
    Raises HubError where neither decides: a guess could train a model to do the opposite.
    """
    if positive is not None:
        if positive not in labels:
            raise HubError(f"{name} has no label {positive!r}; its labels are {labels}.")
        return labels.index(positive)
    if len(labels) == 1:
        return 0
    words = [re.sub(r"[^a-z]", "", label.lower()) for label in labels]
    good = [i for i, word in enumerate(words) if word in GOOD_WORDS]
    bad = [i for i, word in enumerate(words) if word in BAD_WORDS]
    if len(good) == 1:
        return good[0]
    if not good and len(bad) == 1 and len(labels) == 2:
        return 1 - bad[0]
    raise HubError(
        f"{name} has the labels {labels}, and no known word says which one is to be rewarded. Name "
        f"it: load_reward({str(name)!r}, positive={labels[-1]!r}), say."
    )


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


def load_reward(name=EMBEDDED, positive: str | None = None):
    """The embedded sentiment reward, or the reward model or classifier of that name (a folder, or
    on the Hub), whose label `positive` is rewarded: see `ClassifierReward`.
    """
    if name != EMBEDDED:
        return ClassifierReward(name, positive)
    if positive is not None:
        raise HubError("the embedded reward has no labels: leave out 'positive'.")
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
