"""Completions sampled from a model, kept as the token ids that were sampled."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dpo_mini.data import DataError, Text
from dpo_mini.exactness import base, check_defined, difference, refusal, say_once
from dpo_mini.models import check_ids, context_length, in_bfloat16
from dpo_mini.settings import (
    MOST_ITEMS,
    MOST_TOKENS,
    SettingsError,
    TrainingError,
    check_real,
    check_whole,
)
from dpo_mini.tokens import collate, completion_text, tokenize_prompt

# Rows that have ended are dropped once they are this share: dropping copies all other rows.
WORTH_DROPPING = 0.25
MOST_STRENGTH = 1000  # of a mixture, in either direction: beyond it float32 is too coarse


@dataclass(frozen=True)
class Completion:
    """A sampled completion. `ids` ends with EOS exactly when the sample ended by itself within the
    limit.
    """

    prompt: Text  # a text, or a conversation's messages
    text: str
    prompt_ids: list[int]
    ids: list[int]

    @property
    def full_text(self) -> str:
        """What a reward reads: prompt and completion in one piece where the prompt is a text.

        Of a conversation it is the completion alone: a chat template's marks are no words, and a
        reward would score the user's part of the talk with the model's.
        """
        return self.prompt + self.text if isinstance(self.prompt, str) else self.text


def sample_completions(
    model,
    tokenizer,
    prompts: Sequence[Text],
    n: int = 1,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    bf16: bool = False,
) -> list[list[Completion]]:
    """`n` completions of each prompt, drawn from the model's own distribution (no top-k, no top-p).

    A prompt is a text, or a conversation as a list of messages, to which the tokenizer's chat
    template is applied. Any truncation would sample from another policy than the one whose
    log-probabilities we use. At temperature 0 each token is the likeliest one. The result depends
    on `seed`, `batch_size` and `bf16` (products in bfloat16), and leaves torch's global random
    state as it was.

    Raises SettingsError for a number out of range, DataError for a prompt that cannot be tokenised
    or that leaves no room for `max_new_tokens` in the model's context.
    """
    from tqdm.auto import tqdm

    check_sampling(n, max_new_tokens, temperature, batch_size)
    rows = prompt_rows(model, tokenizer, prompts, n, max_new_tokens)
    generator, completions = torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(rows), batch_size), desc="sample", disable=not progress):
        chunk = rows[i : i + batch_size]
        u = torch.rand(max_new_tokens, len(chunk), generator=generator)
        sampled = continuations(
            model, [ids for _, ids in chunk], u, temperature, tokenizer.eos_token_id, bf16
        )
        completions += finished(tokenizer, chunk, sampled)
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def sample_mixture(
    policy,
    reference,
    tokenizer,
    prompts: Sequence[Text],
    strength: float,
    n: int = 1,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    bf16: bool = False,
) -> list[list[Completion]]:
    """`n` completions of each prompt from `mixture_logps` of two models, without any training.

    For a policy that was trained with beta, strength s stands in for one trained with beta / s (Liu
    et al. 2024, arXiv 2402.02992): 0 is the reference, 1 the policy, above 1 goes on in the same
    direction, below 0 goes the other way. The random numbers are common to all strengths: each
    completion has its own, whatever the strength, `batch_size` and the prompts after it.

    Raises what `sample_completions` raises, and DataError for vocabularies of different sizes.
    SettingsError where one of the models cannot be read token by token with a cache.
    """
    check_sampling(n, max_new_tokens, temperature, batch_size)
    check_strength(strength)
    check_same_size(policy, reference)
    rows = prompt_rows(policy, tokenizer, prompts, n, max_new_tokens)
    check_room(reference, tokenizer, [ids for _, ids in rows], max_new_tokens)
    generator, completions = torch.Generator().manual_seed(seed), []
    u = torch.rand(len(rows), max_new_tokens, generator=generator).T
    for i in range(0, len(rows), batch_size):
        chunk = rows[i : i + batch_size]
        sampled = mixture_continuations(
            policy, reference, strength, [ids for _, ids in chunk], u[:, i : i + batch_size],
            temperature, tokenizer.eos_token_id, bf16,
        )  # fmt: skip
        completions += finished(tokenizer, chunk, sampled)
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def mixture_logps(policy: Tensor, reference: Tensor, strength: float) -> Tensor:
    """log-softmax(reference + strength (policy - reference)): next-token log-probabilities of the
    mixture, float32 or the logits' float64.

    `policy`, `reference` [..., vocabulary]: logits or log-probabilities of the next token, since a
    constant for a row changes nothing. The rule of Liu et al. 2024 (arXiv 2402.02992): applied to
    whole sequences it is exact, token by token it is an approximation (notebook 14). At strength 0
    and 1 nothing is rounded: the sum is written so that one of the two models drops out.
    """
    dtype = torch.promote_types(policy.dtype, torch.float32)
    policy, reference = policy.to(dtype), reference.to(policy.device, dtype)
    return ((1 - strength) * reference + strength * policy).log_softmax(-1)


def check_sampling(n: int, max_new_tokens: int, temperature: float, batch_size: int) -> None:
    """Raises SettingsError for a number that no sampling can use."""
    check_whole("n", n, 1, MOST_ITEMS, "It is the number of completions of each prompt.")
    check_whole("max_new_tokens", max_new_tokens, 1, MOST_TOKENS, "Try 48.")
    check_whole("batch_size", batch_size, 1, MOST_ITEMS, "Try 256.")
    check_real("temperature", temperature, 0, "1 is the model's own distribution, 0 is greedy.")


def prompt_rows(
    model, tokenizer, prompts: Sequence[Text], n: int, max_new_tokens: int
) -> list[tuple[Text, list[int]]]:
    """Each prompt with its token ids, `n` times. Raises DataError."""
    check_characters(prompts)
    tokenized = [(prompt, tokenize_prompt(tokenizer, prompt)) for prompt in prompts]
    check_room(model, tokenizer, [ids for _, ids in tokenized], max_new_tokens)
    return [row for row in tokenized for _ in range(n)]


def finished(tokenizer, rows: Sequence[tuple], sampled: Sequence[list[int]]) -> list[Completion]:
    """The sampled ids of each (prompt, prompt's ids) as a completion."""
    return [
        Completion(prompt, completion_text(tokenizer, prompt_ids, ids), prompt_ids, ids)
        for (prompt, prompt_ids), ids in zip(rows, sampled)
    ]


def check_characters(prompts: Sequence[Text]) -> None:
    """Raises DataError for half of a surrogate pair: it is no character, no tokenizer reads it."""
    for i, prompt in enumerate(prompts):
        texts = [prompt] if isinstance(prompt, str) else [str(m.get("content")) for m in prompt]
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise DataError(
                f"prompt {i + 1} holds half of a surrogate pair (such as \\ud83d alone)."
            )


def check_strength(strength: float) -> None:
    """Raises SettingsError for a strength that no mixture can have."""
    advice = "0 is the reference, 1 the policy."
    check_real("strength", strength, -MOST_STRENGTH, advice)
    if strength > MOST_STRENGTH:
        raise SettingsError(f"strength must be at most {MOST_STRENGTH}, got {strength}. {advice}")


def check_same_size(policy, reference) -> None:
    """Raises DataError for two models whose next-token probabilities are not of the same tokens."""
    ours, theirs = (m.config.get_text_config().vocab_size for m in (policy, reference))
    if ours != theirs:
        raise DataError(
            f"the policy has a vocabulary of {ours} tokens and the reference one of {theirs}, so "
            "they cannot be mixed. Give the reference that the policy was trained from."
        )


def check_room(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raises DataError where a prompt and its new tokens exceed the context; warns without EOS."""
    longest, context = max(map(len, prompts), default=0), context_length(model)
    if longest + max_new_tokens > context:
        raise DataError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {context}. Ask for fewer new tokens, or shorten the prompt."
        )
    if tokenizer.eos_token_id is None:
        said = "the tokenizer has no EOS: every completion is cut at the length limit."
        warnings.warn(said, stacklevel=3)


@torch.no_grad()
def continuations(
    model, prompts: Sequence[list[int]], u: Tensor, temperature: float = 1.0,
    end: int | None = None, bf16: bool = False,
) -> list[list[int]]:
    """Each prompt continued through the first `end`, or by as many tokens as `u` has rows.

    `u` [tokens, prompts] is uniform in [0, 1): u[t, i] decides prompt i's token t. Puts the model
    into evaluation mode. Samples as `generate` would of each prompt alone; where our own loop does
    not (see `exactness.py`), `generate` itself does it, and a warning says so once.
    """
    model.eval()
    if len(u) == 0:
        return [[] for _ in prompts]
    reason = continuing_refusal(model, prompts, len(u))
    if reason:
        say_once(model, f"{reason}. Samples are drawn with `generate`, which is slower.")
    with in_bfloat16(model, bf16):  # only now: the trial compares in the model's own precision
        if reason:
            return generated(model, prompts, u, temperature, end)
        return continued(partial(Reader, model), prompts, u, temperature, end)


@torch.no_grad()
def mixture_continuations(
    policy,
    reference,
    strength: float,
    prompts: Sequence[list[int]],
    u: Tensor,
    temperature: float = 1.0,
    end: int | None = None,
    bf16: bool = False,
) -> list[list[int]]:
    """`continuations` by `mixture_logps` of two models of one vocabulary, each with its own cache.

    Raises SettingsError for a model whose rows our own loop cannot continue exactly.
    """
    for model in (policy, reference):
        model.eval()
        reason = continuing_refusal(model, prompts, len(u))
        if reason:
            name = type(base(model)).__name__
            raise SettingsError(f"{name} cannot be mixed with another model: {reason}.")
    reader = partial(MixedReader, policy, reference, strength)
    with in_bfloat16(policy, bf16):
        return continued(reader, prompts, u, temperature, end)


def continuing_refusal(model, prompts: Sequence[list[int]], tokens: int) -> str:
    """Why our own loop does not continue these prompts exactly; "" where it does."""
    for ids in prompts:
        check_ids(model, ids)
    longest, shortest = max(prompts, key=len), min(prompts, key=len)
    check_defined(model, [*longest, 0])
    return refusal(
        model, "continue", (len(longest) + tokens,),
        trial=lambda: continued_wrongly(model, [longest, shortest]),
    )  # fmt: skip


def continued(
    reader_of: Callable, prompts: Sequence[list[int]], u: Tensor, temperature: float,
    end: int | None,
) -> list[list[int]]:  # fmt: skip
    """`continuations` by our own loop: equal prompts are read once, each token after them once, and
    what has ended no more. `reader_of(prompts, room=...)` makes the `Reader`.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    reader = reader_of(different, room=max(map(len, prompts)) + len(u))
    logits = reader.read_prompts()
    places = {ids: i for i, ids in enumerate(different)}
    rows = [places[tuple(ids)] for ids in prompts]
    logits = logits[rows]
    reader.keep(rows)
    sampled, reading = [[] for _ in prompts], list(range(len(prompts)))
    for step, draws in enumerate(u, start=1):
        tokens = draw(logits, draws[reading], temperature)
        for i, token in zip(reading, tokens.flatten().tolist()):
            sampled[i].append(token)
        going_on = [k for k, i in enumerate(reading) if end not in sampled[i]]
        if not going_on or step == len(u):
            break
        if len(going_on) <= (1 - WORTH_DROPPING) * len(reading):
            tokens, reading = tokens[going_on], [reading[k] for k in going_on]
            reader.keep(going_on)
        logits = reader.read(tokens)
    return [through_first(ids, end) for ids in sampled]


class Reader:
    """Reads prompts, then a token at a time; earlier keys and values are stored, not read again.

    `prompts`: token ids, padded on the left here. `room`: the most tokens that a row will have.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], room: int):
        start = collate([(list(ids), []) for ids in prompts], padding_side="left")
        self.model, self.prompts = model, start.input_ids.to(model.device)
        self.mask = start.attention_mask.to(model.device)
        self.cache = DynamicCache(config=base(model).config)
        layers = self.cache.layers
        self.cache.layers = [Roomy(room) if type(c) is DynamicLayer else c for c in layers]

    def read_prompts(self) -> Tensor:
        """Logits of the token after each prompt, [prompts, vocabulary]."""
        return self.next_logits(self.prompts)

    def read(self, tokens: Tensor) -> Tensor:
        """One more token of each row, [rows, 1]; logits of the token after it."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.next_logits(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone; one that is named twice becomes two."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)

    def next_logits(self, tokens: Tensor) -> Tensor:
        # Padding must not shift a token's position.
        position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(
            input_ids=tokens, attention_mask=self.mask, position_ids=position_ids,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip


class MixedReader:
    """Two models reading the same rows, each with its own cache; their `mixture_logps`."""

    def __init__(self, policy, reference, strength: float, prompts, room: int):
        self.readers = [Reader(model, prompts, room) for model in (policy, reference)]
        self.strength = strength

    def read_prompts(self) -> Tensor:
        return mixture_logps(*(reader.read_prompts() for reader in self.readers), self.strength)

    def read(self, tokens: Tensor) -> Tensor:
        logits = [reader.read(tokens.to(reader.mask.device)) for reader in self.readers]
        return mixture_logps(*logits, self.strength)

    def keep(self, rows: Sequence[int]) -> None:
        for reader in self.readers:
            reader.keep(rows)


def continued_wrongly(model, prompts: Sequence[list[int]]) -> str:
    """How a `Reader` of padded prompts differs from reading each row alone; "" where it does not.

    Compares the logits after the prompts and after one more token.
    """
    reader = Reader(model, prompts, room=max(map(len, prompts)) + 1)
    first = reader.read_prompts()
    tokens = first.argmax(-1, keepdim=True)
    second = reader.read(tokens)
    alone = []
    for ids, token in zip(prompts, tokens.tolist()):
        row = torch.tensor([[*ids, *token]], device=model.device)
        alone.append(model(input_ids=row, use_cache=False).logits[0, -2:])
    return difference(torch.stack([first, second], dim=1), torch.stack(alone))


def generated(
    model, prompts: Sequence[list[int]], u: Tensor, temperature: float, end: int | None
) -> list[list[int]]:
    """`continuations` by transformers' `generate`, which knows each model's own kind of state.

    Prompts of one length are read together, without padding, where that is exact.
    """
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(i)
    longest = max(prompts, key=len)
    size = (len(longest) + len(u),)
    if refusal(model, "batch", size, lambda: generated_wrongly(model, longest)):
        groups = {i: [i] for i in range(len(prompts))}
    sampled: list[list[int]] = [[] for _ in prompts]
    for indices in groups.values():
        batch = [prompts[i] for i in indices]
        output = generate(model, batch, u[:, indices], temperature, end)
        for i, row in zip(indices, output.sequences[:, len(batch[0]) :].tolist()):
            sampled[i] = through_first(row, end)
    return sampled


def generated_wrongly(model, prompt: list[int], tokens: int = 4) -> str:
    """How two rows that are generated together differ from each alone, in their logits."""
    rows, u = [prompt, prompt[::-1]], torch.zeros(tokens, 2)
    together = torch.stack(generate(model, rows, u, output_logits=True).logits)
    alone = [generate(model, [row], u[:, :1], output_logits=True).logits for row in rows]
    return difference(together, torch.cat([torch.stack(logits) for logits in alone], dim=1))


def generate(model, prompts, u, temperature=0.0, end=None, **options):
    """What transformers' `generate` returns for prompts of one length, each token drawn by `u`."""
    ids = torch.tensor(prompts, device=model.device)
    choice = DrawnToken(u, ids.shape[1], temperature)
    with bare_generation(base(model)) as bare:
        return bare.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(u),
            do_sample=False, eos_token_id=end, pad_token_id=end or 0, logits_processor=[choice],
            return_dict_in_generate=True, **options,
        )  # fmt: skip


@contextmanager
def bare_generation(model):
    """The model without its generation settings (top-k, repetition penalty, forced tokens ...),
    which would make `generate` sample from another distribution.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = kept


class DrawnToken(LogitsProcessor):
    """Makes `generate` take the token that `draw` draws: all others become impossible."""

    def __init__(self, u: Tensor, prompt_length: int, temperature: float):
        self.u, self.prompt_length, self.temperature = u, prompt_length, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw(scores, self.u[input_ids.shape[1] - self.prompt_length], self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


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
    """The next token of each row, int64 [batch, 1]: the likeliest one at temperature 0.

    Raises TrainingError for logits that are no numbers: nothing can be drawn from them.
    """
    if not logits.amax(-1).isfinite().all():
        raise TrainingError(
            "the model's logits are not finite numbers, so nothing can be sampled from it. Its "
            "weights blew up in training: try a learning rate ten times smaller."
        )
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
