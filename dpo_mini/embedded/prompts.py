"""How the embedded prompts were made: beginnings of 2-8 tokens that the model itself wrote."""

import json
import random
from pathlib import Path

from dpo_mini.data import DataError
from dpo_mini.models import EMBEDDED_FOLDER
from dpo_mini.sampling import sample_completions

MOST_IDLE_ROUNDS = 3  # rounds without a new prompt, after which no more are to be expected


def sample_prompts(
    model, tokenizer, training: int = 2000, held_out: int = 400, seed: int = 0
) -> dict[str, list[str]]:
    """Different prompts that end with a word and whose text gives back the same tokens.

    Raises DataError where the model writes too few of them.
    """
    generator = random.Random(seed)
    prompts: dict[str, None] = {}
    idle = 0
    while len(prompts) < training + held_out:
        before = len(prompts)
        for (completion,) in sample_completions(
            model, tokenizer, [""] * 1024, 1, 9, seed=generator.randrange(2**31)
        ):
            text = beginning(tokenizer, completion.ids, generator.randint(2, 8))
            if text:
                prompts[text] = None
        idle = idle + 1 if len(prompts) == before else 0
        if idle == MOST_IDLE_ROUNDS:
            raise DataError(
                f"the model writes only {len(prompts)} different beginnings that can be prompts; "
                f"{training + held_out} were asked for. Ask for fewer, or use a trained model."
            )
    ordered = list(prompts)[: training + held_out]
    generator.shuffle(ordered)
    return {"train": ordered[held_out:], "held_out": ordered[:held_out]}


def beginning(tokenizer, ids: list[int], length: int) -> str | None:
    """The text of the first `length` ids where it can be a prompt: it ends with a word, gives back
    the same ids, and is printed as it is.
    """
    if len(ids) <= length or tokenizer.eos_token_id in ids:
        return None
    text = tokenizer.decode(ids[:length])
    following = tokenizer.decode(ids[length : length + 1])
    ends_with_a_word = following.startswith(" ")
    is_plain = text.isprintable() and text == text.strip() and "  " not in text
    same = tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:length]
    return text if ends_with_a_word and is_plain and same else None


def save_prompts(prompts: dict, folder=EMBEDDED_FOLDER) -> None:
    (Path(folder) / "prompts.json").write_text(
        json.dumps(prompts, ensure_ascii=False, indent=0), encoding="utf-8"
    )
