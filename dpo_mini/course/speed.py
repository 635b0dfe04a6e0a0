"""How much work a training step is, and how much a machine can do; 13 and benchmarks/ use it."""

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


def forward_work(width, layers, vocabulary, rows, share=True, projected="completion") -> dict:
    """Floating-point operations of one forward pass of a GPT-2 over rows (prompt ids, completion
    ids), part by part: "layers", "attention" (scores and sums), "vocabulary".

    `share`: equal prompts are read once, and the last token of a completion, which predicts
    nothing, not at all. `projected`: logits where a "completion" token is predicted, or at "all"
    positions. Two operations a multiply-add; a token attends to itself and to all before it.
    """
    read = attended = 0
    prompts = dict.fromkeys(tuple(prompt) for prompt, _ in rows) if share else rows
    lengths = [(0, len(p)) for p in prompts] if share else []
    lengths += [
        (len(prompt), len(completion) - 1) if share else (0, len(prompt) + len(completion))
        for prompt, completion in rows
    ]
    for before, new in lengths:
        read += new
        attended += new * before + new * (new + 1) // 2
    if projected == "completion":
        predicted = sum(len(completion) for _, completion in rows)
    else:
        predicted = read
    return {
        "layers": 2 * ATTENTION_AND_MLP * layers * width**2 * read,
        "attention": 2 * 2 * layers * width * attended,  # a score, and its share of the values
        "vocabulary": 2 * width * vocabulary * predicted,
    }


def step_work(*args, **options) -> float:
    """Operations of a training step: forward, and backward twice that, for inputs and weights."""
    return 3 * sum(forward_work(*args, **options).values())
