"""Does torch.compile pay? The same step with the model's body compiled and as it is, in turn."""

import copy
import statistics
import time

import torch
import torch._inductor.config

from benchmarks.throughput import MODELS, SHAPES, build, pairs_of
from dpo_mini.fast_logprobs import completion_logps
from dpo_mini.models import fused_gelu


def compare(model_name: str = "7M", shape: str = "IMDb, 8 + 48", turns: int = 12) -> dict:
    """How much faster a compiled step is, and after how many steps compiling is paid for."""
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled counts too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = fused_gelu(build(*MODELS[model_name])).to(device)
    compiled = copy.deepcopy(plain)
    compiled.base_model.compile()
    pairs = pairs_of(*SHAPES[shape], MODELS[model_name][3])
    rows = [(p.prompt_ids, y) for p in pairs for y in (p.chosen_ids, p.rejected_ids)]

    def seconds(model) -> float:
        start = time.perf_counter()
        completion_logps(model, rows).sum().backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = [seconds(compiled) for _ in range(2)]  # forward and backward are compiled apart
    seconds(plain)
    timed = [(seconds(plain), seconds(compiled)) for _ in range(turns)]
    gain = statistics.median(a - b for a, b in timed)
    usual = statistics.median(a for a, _ in timed)
    return {
        "model": model_name, "shape": shape,
        "faster": statistics.median(a / b for a, b in timed),
        "each turn": [round(a / b, 2) for a, b in timed],
        "compiling takes as long as steps": sum(first) / usual,
        "paid for after steps": sum(first) / gain if gain > 0 else None,
    }  # fmt: skip
