"""The reference's log-probabilities: taken once, since the reference never changes, and kept."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpo_mini import processes
from dpo_mini.checkpoints import written_aside
from dpo_mini.fast_logprobs import completion_logps, different_rows
from dpo_mini.models import in_bfloat16, without_dropout


def reference_logps(
    model, pairs: Sequence, cache=None, batch_size=64, bf16=False, progress=False
) -> Tensor:
    """log pi_ref of chosen and rejected, float32 [pairs, 2], computed once: pi_ref never changes.
    (Of labelled completions: of the completion, and of the other prompt's.)

    The model is put into evaluation mode. With `cache` (a file's path) the result is kept with a
    fingerprint of weights, tokens and precision, and used again only where all three are the same.
    A damaged cache is made anew. `bf16`: under autocast, as the policy is trained with it.
    """
    from tqdm.auto import tqdm

    without_dropout(model)
    precision = "bfloat16" if bf16 else str(next(model.parameters()).dtype)
    if cache:
        fingerprint = f"{weights_fingerprint(model)} {data_fingerprint(pairs)} {precision}"
        kept = kept_logps(Path(cache), fingerprint, len(pairs))
        if kept is not None:
            return kept
    # A row here is (prompt ids, completion ids). Each pair has exactly two: see view(-1, 2) below.
    rows, index = different_rows([row for pair in pairs for row in pair.rows])
    hidden = not (progress and processes.is_main())
    by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # little padding
    logps = torch.empty(len(rows))
    with torch.no_grad(), in_bfloat16(model, bf16):
        for i in tqdm(range(0, len(rows), batch_size), "reference", disable=hidden):
            chunk = by_length[i : i + batch_size]
            logps[chunk] = completion_logps(model, [rows[j] for j in chunk]).float().cpu()
    logps = logps[index].view(-1, 2)
    if cache and processes.is_main():
        keep_logps(Path(cache), fingerprint, logps)
    return logps


def kept_logps(cache: Path, fingerprint: str, pairs: int) -> Tensor | None:
    """What `keep_logps` wrote, float32 [pairs, 2]; None where there is no file, where it has
    another fingerprint, and where it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(cache, "pt") as stored:
            if stored.metadata()["fingerprint"] != fingerprint:
                return None
            logps = stored.get_tensor("logps")
    except (OSError, SafetensorError, LookupError, TypeError):
        return None
    whole = logps.shape == (pairs, 2) and logps.dtype == torch.float32
    return logps if whole and logps.isfinite().all() else None


def keep_logps(cache: Path, fingerprint: str, logps: Tensor) -> None:
    from safetensors.torch import save_file

    with written_aside(cache) as partial:
        save_file({"logps": logps}, partial, metadata={"fingerprint": fingerprint})


def weights_fingerprint(model) -> str:
    """A hash of all of a model's weights, their names and their precision.

    `outputs.weights_digest` reads a sample of them, for a model card.
    """
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights = parameter.detach().cpu().contiguous()
        sha.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        sha.update(weights.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def data_fingerprint(items: Sequence) -> str:
    """A hash of items: pairs, labelled completions, or tuples of token ids."""

    def plain(item):
        return vars(item) if is_dataclass(item) else repr(item)

    return hashlib.sha256(json.dumps(list(items), default=plain).encode()).hexdigest()
