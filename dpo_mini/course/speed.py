"""How much work a training step is, and how much a machine can do; 13 and benchmarks/ use it."""

import statistics
import time

import torch

ATTENTION_AND_MLP = 12  # multiply-adds a token and layer, in squared widths: 4 attention, 8 MLP


def matmul_peak(size: int = 1536, dtype=torch.float32, device="cpu", repeats: int = 5) -> float:
    """Floating-point operations a second in a square matrix product: the best of `repeats`.

    A product of n by n matrices is n^3 multiply-adds, 2 n^3 operations. It is the most that a
    training step of matrix products can hope for.
    """
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))

    def seconds() -> float:
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        return time.perf_counter() - start

    seconds()  # the first one finds its memory and its threads
    return 2 * size**3 / min(seconds() for _ in range(repeats))


def wait(device) -> None:
    """Return when the device has done what it was given; a GPU answers before it has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def forward_work(width, layers, vocabulary, rows, once=True, projected="completion") -> dict:
    """Operations of one forward pass of a GPT-2 over rows (prompt ids, completion ids), by part:
    "layers", "attention" (scores, and sums of values), "vocabulary".

    `once`: of what must be read, equal rows and equal prompts once, and a completion's last token,
    which predicts nothing, never; otherwise all of every row. `projected`: logits where a
    "completion" token is predicted, or at "all" positions. A multiply-add is two operations; a
    token attends to itself and to all before it.
    """
    rows = [(tuple(prompt), tuple(completion)) for prompt, completion in rows]
    if once:
        rows = list(dict.fromkeys(rows))
        spans = [(0, len(prompt)) for prompt in dict.fromkeys(prompt for prompt, _ in rows)]
        spans += [(len(prompt), len(completion) - 1) for prompt, completion in rows]
    else:
        spans = [(0, len(prompt) + len(completion)) for prompt, completion in rows]
    read = sum(new for _, new in spans)
    attended = sum(new * before + new * (new + 1) // 2 for before, new in spans)
    predicted = (
        sum(len(completion) for _, completion in rows) if projected == "completion" else read
    )
    return {
        "layers": 2 * ATTENTION_AND_MLP * layers * width**2 * read,
        "attention": 2 * 2 * layers * width * attended,
        "vocabulary": 2 * width * vocabulary * predicted,
    }


def step_work(*args, **options) -> float:
    """Operations of a training step: forward, and backward twice that, for inputs and weights."""
    return 3 * sum(forward_work(*args, **options).values())


def interleaved(functions: dict, turns: int = 5) -> dict[str, float]:
    """Median seconds of each function, called in turn so that a slow moment is everybody's."""
    seconds = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
