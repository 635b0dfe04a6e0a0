"""Completions sampled from a model, kept as the token ids that were sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dpo_mini.tokens import collate, completion_text, tokenize_prompt

WORTH_DROPPING = (
    0.25  # rows that have ended are dropped when they are this share: it copies the rest
)


@dataclass(frozen=True)
class Completion:
    """A sampled completion. `ids` ends with EOS exactly when the sample ended by itself within the
    limit.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    ids: list[int]

    @property
    def full_text(self) -> str:
        return self.prompt + self.text


def sample_completions(
    model,
    tokenizer,
    prompts: Sequence[str],
    n: int = 1,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> list[list[Completion]]:
    """`n` completions of each prompt, drawn from the model's own distribution (no top-k, no top-p).

    Any truncation would sample from another policy than the one whose log-probabilities we use. At
    temperature 0 each token is the likeliest one. The result depends on `seed` and `batch_size` and
    leaves torch's global random state as it was.
    """
    from tqdm.auto import tqdm

    rows = [(prompt, tokenize_prompt(tokenizer, prompt)) for prompt in prompts for _ in range(n)]
    generator, completions = torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(rows), batch_size), desc="sample", disable=not progress):
        chunk = rows[i : i + batch_size]
        u = torch.rand(max_new_tokens, len(chunk), generator=generator)
        sampled = continuations(
            model, [ids for _, ids in chunk], u, temperature, tokenizer.eos_token_id
        )
        for (prompt, prompt_ids), ids in zip(chunk, sampled):
            text = completion_text(tokenizer, prompt_ids, ids)
            completions.append(Completion(prompt, text, prompt_ids, ids))
    return [completions[i : i + n] for i in range(0, len(completions), n)]


@torch.no_grad()
def continuations(
    model, prompts: Sequence[list[int]], u: Tensor, temperature: float = 1.0, end: int | None = None
) -> list[list[int]]:
    """Each prompt continued through the first `end`, or by as many tokens as `u` has rows.

    `u` [tokens, prompts] is uniform in [0, 1): u[t, i] decides prompt i's token t. Equal prompts
    are read once, each token after them once, and what has ended no more.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    start = collate([(list(ids), []) for ids in different], padding_side="left")
    inputs, mask = start.input_ids.to(model.device), start.attention_mask.to(model.device)
    cache = DynamicCache(config=model.config)
    room = inputs.shape[1] + len(u)
    cache.layers = [Roomy(room) if type(c) is DynamicLayer else c for c in cache.layers]

    def next_logits() -> Tensor:
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return model(
            input_ids=inputs, attention_mask=mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    places = {ids: i for i, ids in enumerate(different)}
    rows = torch.tensor([places[tuple(ids)] for ids in prompts], device=mask.device)
    logits, mask = next_logits()[rows], mask[rows]
    cache.batch_select_indices(rows)
    sampled, reading = [[] for _ in prompts], list(range(len(prompts)))
    for step, draws in enumerate(u, start=1):
        inputs = draw(logits, draws[reading], temperature)
        for i, token in zip(reading, inputs.flatten().tolist()):
            sampled[i].append(token)
        going_on = [k for k, i in enumerate(reading) if end not in sampled[i]]
        if not going_on or step == len(u):
            break
        if len(going_on) <= (1 - WORTH_DROPPING) * len(reading):
            rows = torch.tensor(going_on, device=mask.device)
            inputs, mask, reading = inputs[rows], mask[rows], [reading[k] for k in going_on]
            cache.batch_select_indices(rows)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = next_logits()
    return [through_first(ids, end) for ids in sampled]


class Roomy(DynamicLayer):
    """Keys and values of one layer, written into place, where `DynamicLayer` copies all that came
    before for every token. `room`: the most positions there will be.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """keys, values [batch, heads, new, width]: all so far, [batch, heads, so far, width]."""
        before = self.get_seq_length()
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.stores = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values)]
        for store, new in zip(self.stores, (keys, values)):
            store[:, :, before : before + new.shape[2]] = new
        self.keys, self.values = (s[:, :, : before + keys.shape[2]] for s in self.stores)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, or repeat, these rows of the batch."""
        length = self.get_seq_length()
        self.stores = [store[indices] for store in self.stores]
        self.keys, self.values = (store[:, :, :length] for store in self.stores)


def draw(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """The next token of each row, int64 [batch, 1]: the likeliest one at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return inverse_cdf((logits.float() / temperature).softmax(-1), u)


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """A draw from each row, int64 [batch, 1]: the first token whose cumulative sum exceeds u.

    One uniform `u` a row, where `torch.multinomial` draws a random number for each token of the
    vocabulary: on a CPU that takes longer than a small model does.
    """
    cumulative = probabilities.cumsum(-1)
    u = u[:, None].to(probabilities.device)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


def through_first(ids: list[int], end: int | None) -> list[int]:
    """The ids up to and including the first `end`; all of them where it does not occur."""
    return ids[: ids.index(end) + 1] if end in ids else ids
