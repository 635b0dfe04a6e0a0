"""Completions a second of `sample_completions` and of `model.generate`, on the embedded model."""

import statistics
import time

import torch

from dpo_mini.models import load_model
from dpo_mini.rewards import load_prompts
from dpo_mini.sampling import sample_completions
from dpo_mini.tokens import collate, tokenize_prompt

BATCH_SIZES = (64, 128, 256, 512)  # completions at once; `generate` is given its best


@torch.no_grad()
def generate(model, tokenizer, prompts, n, tokens, seed, batch_size) -> int:
    """`n` completions of each prompt by `generate`, from the whole distribution; how many."""
    torch.manual_seed(seed)
    drawn = 0
    for i in range(0, len(prompts), batch_size // n):
        rows = [(tokenize_prompt(tokenizer, p), []) for p in prompts[i : i + batch_size // n]]
        batch = collate(rows, padding_side="left").to(model.device)
        output = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True,
            top_k=0, num_return_sequences=n, max_new_tokens=tokens, use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        ids = output[:, batch.input_ids.shape[1] :].tolist()
        drawn += len(tokenizer.batch_decode(ids, skip_special_tokens=True))
    return drawn


def compare(prompts: int = 512, n: int = 4, tokens: int = 48, turns: int = 3) -> dict:
    """Both in turn, each at its best batch size, which a quarter of the prompts finds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model()
    model.to(device)
    prompts = load_prompts("train")[:prompts]

    def seconds(function, prompts, seed, batch_size):
        start = time.perf_counter()
        function(model, tokenizer, prompts, n, tokens, seed=seed, batch_size=batch_size)
        return time.perf_counter() - start

    functions = (sample_completions, generate)
    some = prompts[: len(prompts) // 4]
    seconds(sample_completions, some, 0, 256), seconds(generate, some, 0, 256)
    tried = {f: {b: seconds(f, some, 0, b) for b in BATCH_SIZES} for f in functions}
    best = {f: min(times, key=times.get) for f, times in tried.items()}
    pairs = [[seconds(f, prompts, turn, best[f]) for f in functions] for turn in range(turns)]
    return {
        "prompts": len(prompts), "completions of each": n, "tokens": tokens,
        "faster": statistics.median(b / a for a, b in pairs),
        "each turn": [round(b / a, 2) for a, b in pairs],
        "best batch sizes": [best[f] for f in functions],
    }  # fmt: skip
