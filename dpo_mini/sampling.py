"""Completions sampled from a model, kept as the token ids that were sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_mini.data import collate, tokenize_prompt


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

    Any truncation would sample from another policy than the one whose log-probabilities we use. The
    result depends on `seed` and `batch_size` and leaves torch's global random state as it was.
    """
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,  # `draw` has sampled: what it leaves is the one token it drew
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id or 0,
        use_cache=True,
    )

    def draw(_, logits: Tensor) -> Tensor:
        token = inverse_cdf((logits / temperature).softmax(-1))
        return torch.full_like(logits, float("-inf")).scatter_(1, token, 0.0)

    rows = [(prompt, tokenize_prompt(tokenizer, prompt)) for prompt in prompts for _ in range(n)]
    completions = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for i in tqdm(range(0, len(rows), batch_size), desc="sample", disable=not progress):
            chunk = rows[i : i + batch_size]
            batch = collate([(ids, []) for _, ids in chunk], padding_side="left").to(model.device)
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=config,
                logits_processor=[draw],
            )
            for (prompt, prompt_ids), ids in zip(
                chunk, output[:, batch.input_ids.shape[1] :].tolist()
            ):
                ids = through_first(ids, tokenizer.eos_token_id)
                text = tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                completions.append(Completion(prompt, text, prompt_ids, ids))
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def inverse_cdf(probabilities: Tensor) -> Tensor:
    """A draw from each row, int64 [batch, 1]: the first token whose cumulative sum exceeds u.

    One uniform u a row, where `torch.multinomial` draws a random number for each token of the
    vocabulary: on a CPU that takes longer than a small model does.
    """
    cumulative = probabilities.cumsum(-1)
    u = torch.rand(len(probabilities), 1).to(probabilities.device)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


def through_first(ids: list[int], end: int | None) -> list[int]:
    """The ids up to and including the first `end`; all of them where it does not occur."""
    return ids[: ids.index(end) + 1] if end in ids else ids
