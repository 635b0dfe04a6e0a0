"""Operations are counted as PyTorch counts them, and as a brute force does; stored ratios are those
of the code.
"""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_mini.course import speed
from dpo_mini.fast_logprobs import layout

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (32, 2, 97)  # of the fixture: width, layers, vocabulary
ROWS = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7, 8]), ([9], [4]), ([1, 2, 3], [7, 8])]


def test_operations_are_those_that_pytorch_counts(gpt2):
    ids = torch.ones(3, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpt2(input_ids=ids)
    counted = speed.forward_work(*SHAPE, [([1] * 4, [1] * 6)] * 3, once=False, projected="all")
    products = sum(
        n for kind, n in counter.get_flop_counts()["Global"].items() if "mm" in str(kind)
    )
    assert products == counted["layers"] + counted["vocabulary"]


def test_what_is_needed_is_what_the_packed_rows_read():
    different = list({(*p, -1, *y): (p, y) for p, y in ROWS}.values())
    packed = layout(different, share=True)
    read = sum(len(set(p)) for p in ([1, 2, 3], [9])) + sum(len(y) - 1 for _, y in different)
    own = (packed.attends & torch.eye(packed.input_ids.shape[1], dtype=torch.bool)).sum()
    padding = packed.input_ids.numel() - read
    assert own == read + padding
    needed = speed.forward_work(*SHAPE, ROWS)
    width, layers, vocabulary = SHAPE
    assert needed["layers"] == 24 * layers * width**2 * read
    assert needed["vocabulary"] == 2 * width * vocabulary * len(packed.targets)
    attended = sum(
        int(packed.attends[row, i].sum())
        for row, length in enumerate((6, 1))  # without padding
        for i in range(length)
    )
    assert needed["attention"] == 4 * layers * width * attended
    assert speed.step_work(*SHAPE, ROWS) == 3 * sum(needed.values())


def test_the_peak_is_operations_a_second(monkeypatch):
    """By a clock on which half a second passes between any two looks."""
    looks = count(0, 0.5)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(looks))
    assert speed.matmul_peak(64) == 2 * 2 * 64**3
    medians = speed.interleaved({"a": lambda: next(looks), "b": lambda: None})
    assert medians == {"a": 1.0, "b": 0.5}


def test_stored_benchmarks_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import JOBS
    from benchmarks.throughput import SHAPES, TOLERANCE, TURNS

    stored = json.loads((ROOT / "notebooks" / "results" / "benchmarks.json").read_text())
    assert set(JOBS) <= set(stored)
    for name in JOBS:
        assert stored[name]["command"].startswith(f"python -m benchmarks {name}")
    runs = stored["throughput"]["runs"]
    assert {(r["model"], r["shape"]) for r in runs} == {
        (m, s) for m in ("7M", "124M") for s in SHAPES
    }
    for run in runs:
        assert len(run["each turn"]) == TURNS[run["model"]] - 1
        assert run["losses apart"] <= TOLERANCE and 0 < run["fraction of peak"] < 1.2


def test_the_readme_tells_the_stored_ratios():
    """Row by row: 7M's and 124M's pairs a second, 124M's memory, and the sampling."""
    stored = json.loads((ROOT / "notebooks" / "results" / "benchmarks.json").read_text())
    readme = (ROOT / "README.md").read_text()
    runs = {(r["model"], r["shape"]): r for r in stored["throughput"]["runs"]}
    for shape in dict.fromkeys(shape for _, shape in runs):
        small, large = runs["7M", shape], runs["124M", shape]
        cells = f"| {small['faster']:.1f} | {large['faster']:.1f} | {large['memory']:.2f} |"
        assert cells in readme, shape
    assert (
        f"{stored['sampling']['runs'][0]['faster']:.1f} times as fast as from `generate`" in readme
    )


@pytest.mark.slow
def test_the_turnstile_times_both_trainers_on_the_same_job(monkeypatch):
    """The whole of it on a model of no size: both train, in turn, and their losses agree."""
    pytest.importorskip("trl", reason="needs the test extra: pip install '.[test]'")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import throughput

    monkeypatch.setitem(throughput.MODELS, "tiny", (32, 2, 2, 8192))
    monkeypatch.setitem(throughput.SHAPES, "tiny", (4, 2, 5, 7))
    monkeypatch.setitem(throughput.TURNS, "tiny", 3)
    result = throughput.compare("tiny", "tiny")
    assert result["faster"] > 0 and len(result["each turn"]) == 2
    assert result["losses apart"] < throughput.TOLERANCE
