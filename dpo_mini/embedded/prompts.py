"""How the embedded prompts were made: beginnings of 2-8 tokens that the model itself wrote."""

import json
import random
from pathlib import Path

from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.sampling import sample_completions


def sample_prompts(
    model, tokenizer, training: int = 2000, held_out: int = 400, seed: int = 0
) -> dict[str, list[str]]:
    """Different prompts that end with a word and whose text gives back the same tokens."""
    generator = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < training + held_out:
        for (completion,) in sample_completions(
            model, tokenizer, [""] * 1024, 1, 9, seed=generator.randrange(2**31)
        ):
            ids, length = completion.ids, generator.randint(2, 8)
            if len(ids) <= length or tokenizer.eos_token_id in ids:
                continue
            text, following = (
                tokenizer.decode(ids[:length]),
                tokenizer.decode(ids[length : length + 1]),
            )
            same = tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:length]
            if (
                same
                and following.startswith(" ")
                and text.isprintable()
                and text == text.strip()
                and "  " not in text
            ):
                prompts[text] = None
    ordered = list(prompts)[: training + held_out]
    generator.shuffle(ordered)
    return {"train": ordered[held_out:], "held_out": ordered[:held_out]}


def save_prompts(prompts: dict, folder=EMBEDDED_FOLDER) -> None:
    (Path(folder) / "prompts.json").write_text(
        json.dumps(prompts, ensure_ascii=False, indent=0), encoding="utf-8"
    )
