"""Where prompts and texts of the command line come from, what evaluates apart from what trains."""

import bisect
import hashlib
import re
from pathlib import Path

from dpo_mini.console import say
from dpo_mini.data import DataError
from dpo_mini.outputs import shown_name

TEST, TENTH = "the test split", "the tenth that is never trained on"
NINE_TENTHS = "the nine tenths for training"


def texts_of(source, split: str | None, held_out: bool) -> tuple[list[str], str]:
    """Texts of a data set and what to call them, so that what trains and what evaluates never meet.

    | source            | split      | to train on             | held out            |
    |---|---|---|---|
    | has a test split  | None       | all of train            | test                |
    |                   | "train"    | all of train            | all of train        |
    |                   | "test"     | all of test             | test                |
    | has none          | None       | nine tenths of train    | the tenth of train  |
    |                   | "train"    | nine tenths of train    | nine tenths         |
    | a folder or name  | any other  | all of that split       | all of that split   |
    | a file            | any other  | DataError               | DataError           |

    The tenth is the same every time (`in_held_out_tenth`). Raises DataError also where a source is
    so small that one of the two parts is empty.
    """
    from dpo_mini.data import read_texts

    if Path(source).is_file() and split not in (None, "train"):
        raise DataError(f"{source} is a file and has no splits: leave out --split.")
    whole = has_test_split(source)
    if held_out and whole and split in (None, "test"):
        return read_texts(source, "test"), TEST
    texts = read_texts(source, split or "train")
    if split not in (None, "train"):
        return texts, f"the split {split}"
    if held_out and split is None:
        tenth = [t for t in texts if in_held_out_tenth(t)]
        if not tenth:
            raise DataError(f"{source} has no test split, and {len(texts)} texts are too few to "
                            "keep a tenth for evaluation.")  # fmt: skip
        return tenth, TENTH
    if whole:
        return texts, "the split train"
    rest = [t for t in texts if not in_held_out_tenth(t)]
    if not rest:
        raise DataError(f"{source} has no test split, and all of its {len(texts)} texts belong to "
                        "the tenth that is kept for evaluation: give more texts.")  # fmt: skip
    return rest, NINE_TENTHS


def in_held_out_tenth(text: str) -> bool:
    """Whether a text belongs to the tenth that is kept for evaluation: by its hash, so that
    neither the order of a file nor its length changes the answer.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def has_test_split(source) -> bool:
    """Whether a data set has a test split; a file has none. Raises HubError."""
    from dpo_mini.hub import local_or_hub

    path = Path(source)
    if path.is_file():
        return False
    if path.is_dir():
        names = [str(p.relative_to(path)) for p in path.rglob("*")]
        return any(re.search(r"(^|[/\\])test(?![a-z_])", name) for name in names)
    local_or_hub(source, "dataset")
    from datasets import get_dataset_split_names

    return "test" in get_dataset_split_names(str(source))


def chosen_prompts(options, tokenizer, split, held_out: bool) -> tuple[list[str], str]:
    """The prompts that were asked for, and what to call them: of a file, of a data set's texts, or
    the embedded ones. Raises DataError where there are none.
    """
    from dpo_mini.curation import prefixes
    from dpo_mini.data import read_prompts
    from dpo_mini.rewards import load_prompts

    if options.prompts:
        prompts = read_prompts(options.prompts)
        heading = f"prompts of {shown_name(options.prompts)}"
    elif options.dataset:
        texts, name = texts_of(options.dataset, split, held_out)
        prompts = prefixes(texts, tokenizer, len(texts), seed=options.seed)
        apart = name in (TEST, TENTH)
        heading = "held-out prompts" if apart else f"prompts of {name}"
        if name == TENTH:
            say(options, f"{shown_name(options.dataset)} has no test split: prompts are of {name}.")
            trained_on = sorted(texts_of(options.dataset, None, False)[0])
            prompts = [p for p in prompts if not begins_one_of(p, trained_on)]
    else:
        prompts = load_prompts("held_out" if held_out else "train")
        heading = "held-out prompts" if held_out else "training prompts"
    if not prompts:
        raise DataError(f"{options.prompts or options.dataset} gives no prompts.")
    return prompts[: options.n_prompts], heading


def begins_one_of(prompt: str, texts: list[str]) -> bool:
    """Whether one of the texts, which are sorted, begins with the prompt."""
    place = bisect.bisect_left(texts, prompt)
    return place < len(texts) and texts[place].startswith(prompt)


def as_asked(options, prompts, model, tokenizer) -> list:
    """The prompts as the model is to read them: with --chat each as a user's message, otherwise
    behind the model's own prefix.

    Raises DataError where the tokenizer has no chat template.
    """
    from dpo_mini.models import prompt_prefix

    if not options.chat:
        return [prompt_prefix(model) + prompt for prompt in prompts]
    if not tokenizer.chat_template:
        raise DataError(f"{options.model} has no chat template: leave out --chat.")
    return [[{"role": "user", "content": prompt}] for prompt in prompts]
