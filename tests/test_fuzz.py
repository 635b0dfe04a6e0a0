"""Random command lines: each ends well, or with a sentence; none with a traceback.

DPO_MINI_FUZZ=50000 in the environment asks for more of them, DPO_MINI_FUZZ_SEED for others.
"""

import hashlib
import json
import os
import random
import subprocess
from dataclasses import fields

import pytest
from matplotlib.figure import Figure

from dpo_mini.cli import main
from dpo_mini.options import flag
from dpo_mini.rewards import load_reward
from dpo_mini.settings import TrainingConfig
from dpo_mini.verbs import VERBS

COUNT = int(os.environ.get("DPO_MINI_FUZZ", 2000))
SEED = int(os.environ.get("DPO_MINI_FUZZ_SEED", 0))

WHOLE = ["1", "2", "3", "7"]
REAL = ["0.5", "1", "2", "1e-3", "1e30", "1e-45"]
ODD_NUMBERS = [
    "0", "-1", "-7", "nan", "inf", "-inf", "1e400", str(2**60), str(2**63), "9" * 5000, "", "x",
    "0x10", "1e3", "1,5", "½", "--", "None",
]  # fmt: skip
ODD_TEXTS = [
    "", ".", "..", "missing", "missing/deeper", "someone/no-such-name", "a b", "\udcff", "a\0b",
    "🎬", "-", "/proc/x", "x" * 300, "*", "C:\\con", "\x1b[2J", "%s%d", "'", "a\nb", "empty",
]  # fmt: skip
DRAWN = [verb for verb in VERBS if verb != "fetch"]  # which downloads
WEIGHTS = [1 if verb in ("prompts", "env", "lab", "judges") else 4 for verb in DRAWN]
ALWAYS = {  # what keeps a run small; what is drawn comes after it, and wins
    "sft": "--model tiny --dataset texts.jsonl --steps 1 --batch-size 2",
    "pairs": "--model tiny --prompts prompts.txt --samples 2 --max-new-tokens 3",
    "train": "--model tiny --pairs pairs.jsonl --steps 1 --batch-size 2",
    "evaluate": "--model tiny --reference tiny --prompts prompts.txt --max-new-tokens 3",
    "sample": "--model tiny --prompt I --samples 1 --max-new-tokens 3",
    "cool": "--model tiny",
    "pretrain": "--dataset texts.jsonl --layers 1 --width 8 --heads 1 --vocabulary 300 --context 8 "
    "--steps 1 --batch-size 2",
    "judges": "--model tiny --dataset texts.jsonl --steps 1",
    "prompts": "--model tiny --training 2 --held-out 1",
    "demo": "--model tiny --n-prompts 2 --held-out 1 --steps 1 --batch-size 2",
}


@pytest.fixture
def workplace(tiny_folder, tmp_path, monkeypatch):
    tmp_path = tmp_path / "deep" / "down"  # "--output .." is one of the things that are asked for
    tmp_path.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "empty").mkdir()
    prompts = ["This movie", "The plot", "I"]
    pairs = [{"prompt": p, "chosen": " is good.", "rejected": f" is bad{i}."}
             for p in prompts for i in range(2)]  # fmt: skip
    texts = [{"text": f"A film about the number {i}, and more."} for i in range(40)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "noise.bin").write_bytes(random.Random(0).randbytes(300))
    monkeypatch.setattr(subprocess, "call", lambda command: 0)  # no JupyterLab
    blank = Figure()  # drawing takes most of a small run's time, and no option changes it
    for figure in ("training_figure", "monitor_figure"):
        monkeypatch.setattr(f"dpo_mini.course.plots.{figure}", lambda *_, **__: blank)
    reward = load_reward()  # once, not for each command line
    monkeypatch.setattr(
        "dpo_mini.rewards.load_reward",
        lambda name="embedded", positive=None: (
            reward if name == "embedded" else load_reward(name, positive)
        ),
    )
    return tmp_path


def command_line(draw: random.Random, number: int) -> list[str]:
    """A verb, and some of its options with values that are right, odd, or of another option."""
    verb = "trian" if draw.random() < 0.01 else draw.choices(DRAWN, WEIGHTS)[0]
    line = [verb, *ALWAYS.get(verb, "").split()]
    if verb not in VERBS:
        return line
    options = {f.name: str(f.type) for f in fields(VERBS[verb]) if f.name != "settings"}
    if "resume" in options:
        options |= {f.name: str(f.type) for f in fields(TrainingConfig)}
    files = ["tiny", "pairs.jsonl", "texts.jsonl", "prompts.txt", "noise.bin", "empty"]
    for name in draw.sample(list(options), draw.randint(1, min(7, len(options)))):
        kind = options[name]
        good = WHOLE if "int" in kind else REAL if "float" in kind else [*files, "dpo", "kto"]
        odd = ODD_NUMBERS if "int" in kind or "float" in kind else ODD_TEXTS
        if name in ("overwrite", "output") and verb in ("judges", "prompts", "evaluate"):
            continue  # they may write beside a model, as asked to: keep the inputs of the others
        line.append(flag(name))
        if "bool" not in kind or draw.random() < 0.02:
            line.append(draw.choice(good if draw.random() < 0.25 else odd))
    if draw.random() < 0.1:
        line.insert(draw.randrange(len(line) + 1), draw.choice(ODD_TEXTS + ODD_NUMBERS))
    if "output" in options and "--output" not in line:
        line += ["--output", f"out/{number}"]
    return line


def digests(folder) -> dict:
    """What the inputs hold."""
    files = [p for name in ("tiny", ".") for p in (folder / name).glob("*") if p.is_file()]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.filterwarnings("ignore")
def test_random_command_lines_end_with_a_sentence_at_worst(workplace, capsys):
    draw, ends = random.Random(SEED), {0: 0, 1: 0, 2: 0}
    inputs = digests(workplace)
    for number in range(COUNT):
        line = command_line(draw, number)
        try:
            status = main(line)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(f"{line} ended with {error!r}") from error
        said = capsys.readouterr()
        ends[status] += 1
        assert "Traceback" not in said.err + said.out, line
        if status:
            sentence = said.err.strip().split("\n")[-1]
            assert sentence.startswith("dpo-mini") and len(sentence) > 25, (line, said.err)
        if status == 2:  # not even read: nothing is written
            assert not (workplace / "out" / str(number)).exists(), line
    now = digests(workplace)
    assert {path: now.get(path) for path in inputs} == inputs, "an input was changed"
    assert ends[0] >= COUNT / 40 and ends[1] >= COUNT / 5 and ends[2] >= COUNT / 20, ends
