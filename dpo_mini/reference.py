"""The reference's log-probabilities: taken once, since the reference never changes, and kept."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_mini.fast_logprobs import completion_logps, different_rows


def reference_logps(
    model, pairs: Sequence, cache=None, batch_size=64, bf16=False, progress=False
) -> Tensor:
    """log pi_ref of chosen and rejected, float32 [pairs, 2], computed once: pi_ref never changes.
    (Of labelled completions: of the completion, and of the other prompt's.)

    With `cache` (a file's path) the result is kept with a fingerprint of weights and tokens, and
    is used again only where both are the same.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    mark = fingerprint(model, pairs)
    if cache and Path(cache).exists():
        with safe_open(cache, "pt") as stored:
            if stored.metadata().get("fingerprint") == mark:
                return stored.get_tensor("logps")
    rows, index = different_rows([row for pair in pairs for row in pair.rows])
    by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # little padding
    logps = torch.empty(len(rows))
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for i in tqdm(range(0, len(rows), batch_size), "reference", disable=not progress):
            chunk = by_length[i : i + batch_size]
            logps[chunk] = completion_logps(model, [rows[j] for j in chunk]).float().cpu()
    logps = logps[index].view(-1, 2)
    if cache:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{cache}.{os.getpid()}")  # several processes may write, each whole
        save_file({"logps": logps}, partial, metadata={"fingerprint": mark})
        partial.replace(cache)
    return logps


def fingerprint(model, pairs) -> str:
    """A hash of the model's weights and of the pairs' tokens."""
    digest = hashlib.sha256(json.dumps([list(vars(p).values()) for p in pairs]).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
