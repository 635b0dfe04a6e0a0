"""Which shortcuts are exact for a model: decided here, for every other room.

The definition of a log-probability reads each row alone, from its first token to its last. Five
shortcuts give the same numbers faster, each only for some models and some lengths:

| shortcut | what it does | where it is wrong |
|---|---|---|
| share | reads a prompt once for all its completions | windows, states, position biases |
| split | applies the head only where a token is predicted | scaled or capped logits |
| pad | reads rows of unequal length in one batch | positions that depend on the longest row |
| continue | samples with stored keys and values, padded on the left | states, own positions |
| batch | samples several rows of one length with `generate` | RWKV |

A wrong shortcut raises no error: it gives another number. So the configuration is asked first, and
then a trial is made on the rows at hand, against the definition. Both must agree. The configuration
alone is not enough, since no list of architectures is complete. A trial alone is not enough either:
it can pass on untrained weights and fail after training, when a bias or a state is no longer zero.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dpo_mini.hub import HubError

# Where configurations state how far back a layer looks, beside the layers of the cache.
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size",
           "local_attention", "index_topk")  # fmt: skip
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a log-probability; of a trial's two ways
COARSE_ROUNDING = 2e-2  # in bfloat16 and float16


def refusal(model, shortcut: str, size: tuple[int, ...], trial: Callable[[], str]) -> str:
    """Why `shortcut` (a name in the table) may not be taken; "" where it may: there it is exact.

    `size`: lengths in tokens, as the function of AGAINST for this shortcut takes them. `trial()`
    tries it on rows of this size: "" where it equals the definition, otherwise the difference.
    """
    return AGAINST[shortcut](model, *size) or tried(model, shortcut, size, trial)


def say_once(model, sentence: str) -> None:
    """A warning that names the model, the first time that it is said of this model."""
    said = SAID.setdefault(model, set())
    if sentence not in said:
        said.add(sentence)
        warnings.warn(f"{type(base(model)).__name__}: {sentence}", stacklevel=4)


SAID: WeakKeyDictionary = WeakKeyDictionary()  # model -> sentences


# --- by configuration: each returns a reason, or "" ---


def against_sharing(model, packed: int, longest: int) -> str:
    """Sharing needs attention to *all* earlier tokens, through a mask and positions of our own.

    `packed`: tokens of the longest row once its prompt is shared. `longest`: of a row by itself.
    """
    config = base(model).config.get_text_config(decoder=True)
    window = shortest_window(model)
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {config._attn_implementation!r} takes no mask of our own"
    if "position_ids" not in inspect.signature(base(model).forward).parameters:
        return "it takes no positions of our own"
    if getattr(config, "alibi", False):
        return "its attention is biased by distance (ALiBi)"
    if keeps_a_state(model):
        return "a state runs through its rows"
    if packed > window:
        return f"some rows are longer than its window of {window} tokens"
    return against_splitting(model, packed, longest)


def against_splitting(model, packed: int, longest: int) -> str:
    """Are the logits anything but the head on the body's last hidden state?"""
    if not is_body_then_head(model):
        return "its logits are more than its head on its last hidden state"
    return against_padding(model, packed, longest)


def against_padding(model, packed: int, longest: int) -> str:
    """Some rotary positions change for the whole batch when its longest row passes a length."""
    kind, length = changing_rotations(model)
    if longest > length:
        return f"beyond {length} tokens its rotary positions ({kind}) depend on the longest row"
    return ""


def against_continuing(model, longest: int) -> str:
    """Our loop stores keys and values, whole or within a window; a state it cannot store."""
    if keeps_a_state(model):
        return "it keeps a state that is more than keys and values"
    return against_padding(model, longest, longest)


def against_batching(model, longest: int) -> str:
    """Rows of one length in one batch of `generate`: the rotary positions are the batch's."""
    return against_padding(model, longest, longest)


AGAINST = {
    "share": against_sharing, "split": against_splitting, "pad": against_padding,
    "continue": against_continuing, "batch": against_batching,
}  # fmt: skip


def base(model):
    """The model itself where adapters (peft) are wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_layers(model) -> list:
    """What transformers would keep of each layer's past; empty where the model says nothing."""
    try:
        return DynamicCache(config=base(model).config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def keeps_a_state(model) -> bool:
    """Does any layer keep more of the past than keys and values: recurrent, convolutional ...?"""
    kinds = {type(layer) for layer in cache_layers(model)}
    known = kinds and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    return not known or getattr(base(model), "_is_stateful", False)


def shortest_window(model) -> float:
    """The fewest tokens any layer may look back over; infinity where each sees all."""
    config = base(model).config.get_text_config(decoder=True)
    stated = [getattr(config, name, None) for name in WINDOWS]
    stated += [getattr(layer, "sliding_window", None) for layer in cache_layers(model)]
    return min([n for n in stated if isinstance(n, int) and n > 0], default=math.inf)


def changing_rotations(model) -> tuple[str, float]:
    """A kind of rotary position that depends on a batch's longest row, and from which length on."""
    config = base(model).config.get_text_config(decoder=True)
    stated = getattr(config, "rope_parameters", None) or {}
    for rope in (stated, *(r for r in stated.values() if isinstance(r, dict))):
        kind = rope.get("rope_type")
        if kind in ("dynamic", "longrope"):
            length = rope.get("original_max_position_embeddings")
            return kind, length or config.max_position_embeddings
    return "", math.inf


# --- by trial ---


def tried(model, shortcut: str, size: tuple[int, ...], trial: Callable[[], str]) -> str:
    """The outcome of `trial()`, kept: what was exact for longer rows is so for shorter ones, and
    what was wrong for shorter ones is wrong for longer ones.
    """
    outcomes = TRIALS.setdefault(model, {}).setdefault(shortcut, {})
    for known, reason in outcomes.items():
        if not reason and all(a <= b for a, b in zip(size, known)):
            return ""
        if reason and all(a >= b for a, b in zip(size, known)):
            return reason
    autocast = torch.autocast(model.device.type, enabled=False)
    with torch.no_grad(), autocast:  # in full precision a difference is more than rounding
        try:
            outcomes[size] = trial()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model says to arguments that it was not made for
            outcomes[size] = f"a trial ended in {type(error).__name__}"
    return outcomes[size]


TRIALS: WeakKeyDictionary = WeakKeyDictionary()  # model -> shortcut -> size -> reason, or ""


def difference(found: Tensor, exact: Tensor) -> str:
    """By how much two tensors differ, in words; "" where rounding explains it."""
    found, scale = found.to(exact), exact.abs().clamp(min=1)
    worst = ((found - exact).abs() / scale).max().item()
    if worst <= ROUNDING.get(exact.dtype, COARSE_ROUNDING):
        return ""
    return f"a trial was {worst:.1e} of the value away from reading each row alone"


def body_and_head(model):
    """A causal model's two halves: token ids to hidden states, hidden states to logits."""
    return base(model).base_model, base(model).get_output_embeddings()


def is_body_then_head(model) -> bool:
    """Are the logits the head on the body's last hidden state, neither scaled nor capped?

    A softcap such as Gemma 2's does nothing to small logits. So the head is made to return large
    numbers once: what the model then makes of them is seen at any size of its own logits.
    """
    return not tried(model, "head", (), lambda: change_around_the_head(model))


def change_around_the_head(model) -> str:
    """What happens before or after the head, "" where nothing does."""
    body, head = body_and_head(model)
    tokens, read, returned = torch.tensor([[1, 2, 3]], device=model.device), [], []

    def return_large_numbers(module, inputs, output):
        read.append(inputs[0])
        returned.append(torch.linspace(-1e3, 1e3, output.numel()).view_as(output).to(output))
        return returned[-1]

    handle = head.register_forward_hook(return_large_numbers)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
    return difference(read[0], hidden) or difference(logits.to(returned[0]), returned[0])


def check_defined(model, ids: list[int]) -> None:
    """Raises HubError where a row has no log-probability of its own under the model.

    `ids`: the longest row to be read, two tokens or more. A model that reads ahead (BERT, XLNet
    ...) has no next-token probabilities whose product is the completion's. Dynamic rotary positions
    are stretched by the longest row read before, so that the same row has another number later.
    """
    name = type(base(model)).__name__
    kind, length = changing_rotations(model)
    if kind == "dynamic" and len(ids) > length:
        raise HubError(
            f"{name} cannot be trusted beyond {length} tokens, got a row of {len(ids)}: its rotary "
            "positions (dynamic) depend on the rows that were read before. Use shorter rows."
        )
    if tried(model, "causal", (), lambda: reads_ahead(model, ids)) == READS_AHEAD:
        raise HubError(
            f"{name} reads tokens that come later: it is no causal language model, and a "
            "completion has no log-probability under it. Use a causal one."
        )


READS_AHEAD = "it reads ahead"


def reads_ahead(model, ids: list[int]) -> str:
    """READS_AHEAD where another last token changes the logits before it, otherwise ""."""
    other = [*ids[:-1], ids[-1] - 1 if ids[-1] else 1]
    one, two = (
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[:, :-1]
        for row in (ids, other)
    )
    rounding = COARSE_ROUNDING * one.abs().max()
    return READS_AHEAD if (one - two).abs().max() > rounding else ""
