"""python -m benchmarks [throughput] [sampling] [compiled] [demo] [--models 7M,124M]"""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import compiled, demo, sampling, throughput
from dpo_mini.course.speed import matmul_peak

RESULTS = Path(__file__).parents[1] / "notebooks" / "results" / "benchmarks.json"
JOBS = {
    "throughput": None,  # a comparison for each model and shape
    "sampling": sampling.compare,
    "compiled": compiled.compare,
    "demo": demo.stages,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="job", default=list(JOBS))
    parser.add_argument("--models", default="7M,124M", help="of 7M, 124M and 355M")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.models = args.models.split(",")
    for given, known in ((args.jobs, JOBS), (args.models, throughput.MODELS)):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(known)}.")
    if "throughput" in args.jobs and not find_spec("trl"):
        parser.error("throughput is measured beside TRL: pip install '.[test]'")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["machine"] = machine()
    show("machine", [results["machine"]])

    def store(job, rows):
        results[job] = {"command": " ".join(["python -m benchmarks", *sys.argv[1:]]), "runs": rows}
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if "throughput" in args.jobs:
        rows = []
        for model in args.models:
            for shape in throughput.SHAPES:
                for bf16 in (False, True) if results["machine"]["bf16 pays"] else (False,):
                    rows.append(throughput.compare(model, shape, bf16))
                    show("throughput, dpo_mini over TRL", rows[-1:])
                    store("throughput", rows)
    for name in args.jobs:
        if name != "throughput":
            rows = [JOBS[name]()]
            show(name, rows)
            store(name, rows)


def machine() -> dict:
    """What the ratios depend on: the device, its threads, and whether bfloat16 is faster on it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = matmul_peak(512, torch.bfloat16, device) / matmul_peak(512, torch.float32, device)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "bf16 over fp32, matrix product": half, "bf16 pays": half > 1,
    }  # fmt: skip


def show(title: str, rows: list[dict]) -> None:
    """A line a row, `name value`, numbers to three figures."""
    for row in rows:
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{title}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
