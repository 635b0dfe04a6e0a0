"""The proof of notebook 19: one run, handed over to each tool, trained there and compared.

python -m dpo_mini.course.handover --llama-factory PYTHON --axolotl PYTHON --converter FILE

About four minutes on two cores. TRL is that of this environment. LLaMA-Factory and Axolotl each
need an environment of their own, whose python is named; `--converter` is llama.cpp's
convert_hf_to_gguf.py. What is not named keeps its stored result. Writes
notebooks/results/handover.json.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dpo_mini import export, publish
from dpo_mini.cli import main as dpo_mini
from dpo_mini.data import preference_pairs, read_rows, write_jsonl
from dpo_mini.models import load_model
from dpo_mini.reference import reference_logps
from dpo_mini.tokens import tokenize_pairs

STORED = Path("notebooks/results/handover.json")
STEPS = 20
RUN = ("--steps", str(STEPS), "--batch-size", "4", "--micro-batch-size", "2", "--beta", "0.3",
       "--learning-rate", "2e-4", "--warmup-steps", "0", "--schedule", "linear")  # fmt: skip


def rows() -> list[dict]:
    """Twenty pairs of short texts, which every tool can tokenise alike."""
    openings = ["This movie", "I saw it", "The plot of this film", "My friend said it", "It"]
    good = [" was great and moving.", " is a joy.", " made me laugh a lot!", " has a fine cast."]
    bad = [" was dull.", " is a waste of time and money.", " made me leave early.", " bored us."]
    return [
        {"prompt": opening, "chosen": chosen, "rejected": bad[(i + j) % 4]}
        for i, opening in enumerate(openings)
        for j, chosen in enumerate(good)
    ]


def trained(folder: Path) -> Path:
    """The run that is handed over, by the command line; its folder."""
    write_jsonl(folder / "pairs.jsonl", rows())
    command = ["train", "--pairs", str(folder / "pairs.jsonl"), "--json", *RUN]
    assert dpo_mini([*command, "--output", str(folder / "run")]) == 0
    return folder / "run"


def exported(run: Path, tool: str) -> Path:
    out = run.parent / tool
    version = export.VERSIONS[tool][-1]
    command = ["export", "--of", str(run), "--to", tool, "--tool-version", version, "--json"]
    assert dpo_mini([*command, "--model", "embedded", "--output", str(out)]) == 0
    return out


def launched(command: list, folder: Path) -> str:
    """What a command printed, run in `folder` on the CPU with no network."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
             "WANDB_DISABLED": "true", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": ""}  # fmt: skip
    # A tool calls its own programs by name: those beside it must be found first.
    alone["PATH"] = os.pathsep.join([str(Path(command[0]).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder, env={**os.environ, **alone}, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def gaps(theirs: list[dict], ours: list[dict]) -> dict[str, float]:
    """The largest distance over all steps, of each number that both logs have."""
    names = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm")
    assert len(theirs) == len(ours) == STEPS, (len(theirs), len(ours))
    return {
        name: max(abs(float(a[name]) - b[name]) for a, b in zip(theirs, ours))
        for name in names
        if all(name in a for a in theirs)
    }


def steps_in(folder: Path) -> list[dict]:
    """The rows of a log that transformers' Trainer kept, by its own state or as printed."""
    states = sorted(folder.glob("trained/**/trainer_state.json"))
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    return [row for row in history if "loss" in row]


def printed_steps(text: str) -> list[dict]:
    found = (line[line.find("{") : line.rfind("}") + 1] for line in text.splitlines())
    rows = [ast.literal_eval(one) for one in found if one.startswith("{'loss'")]
    return rows


def compared(run: Path, python: dict[str, str]) -> dict:
    ours = read_rows(run / "log.jsonl")[1:]
    results = {}
    for tool, its_python in python.items():
        out = exported(run, tool)
        if tool == "trl":
            launched([its_python, "train.py"], out)
            steps = read_rows(out / "log.jsonl")
        else:
            program = Path(its_python).parent / {"axolotl": "axolotl"}.get(tool, "llamafactory-cli")
            said = launched([program, "train", "train.yaml"], out)
            steps = steps_in(out) or printed_steps(said)
        results[tool] = {"version": export.VERSIONS[tool][-1], "steps": len(steps),
                         "gaps": gaps(steps, ours), "first": ours[0]["loss"],
                         "last": ours[-1]["loss"]}  # fmt: skip
        print(tool, results[tool], flush=True)
    return results


def read_back(run: Path, converter: str) -> dict:
    """The trained model as GGUF, read back: the log-probabilities of the run's answers, against the
    model's own and against those of its weights rounded here.
    """
    model, tokenizer = load_model(str(run))
    pairs = tokenize_pairs(preference_pairs(rows()), tokenizer, 128)
    own, results = reference_logps(model, pairs), {}
    for outtype in ("f32", "f16", "q8_0"):
        out = run.parent / f"ollama-{outtype}"
        publish.for_ollama(str(run), out, outtype, converter)
        read = reference_logps(publish.read_gguf(out / "model.gguf", model), pairs)
        here = reference_logps(publish.rounded(model, outtype), pairs) if outtype != "f32" else own
        results[outtype] = {
            "megabytes": (out / "model.gguf").stat().st_size / 1e6,
            "from the model": (read - own).abs().max().item(),
            "from the model rounded here": (read - here).abs().max().item(),
        }
        print(outtype, results[outtype], flush=True)
    return results


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser("python -m dpo_mini.course.handover", description=__doc__)
    parser.add_argument("--llama-factory", metavar="PYTHON")
    parser.add_argument("--axolotl", metavar="PYTHON")
    parser.add_argument("--converter", metavar="FILE")
    given = parser.parse_args(arguments)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"tools": {}, "gguf": {}}
    python = {"trl": sys.executable, "llama-factory": given.llama_factory, "axolotl": given.axolotl}
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder))
        stored["tools"] |= compared(run, {tool: its for tool, its in python.items() if its})
        if given.converter:
            stored["gguf"] = read_back(run, given.converter)
    stored["command"] = "python -m dpo_mini.course.handover"
    stored["torch"] = torch.__version__
    STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
