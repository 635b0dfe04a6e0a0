"""What stands around the steps of a run, so that it can be stopped at any moment and go on to the
same weights, bit for bit: resuming, monitoring, saving, Ctrl-C.
"""

import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini import processes
from dpo_mini.settings import TrainingConfig, TrainingError

CHECKPOINT = "checkpoint.safetensors"  # its name in a run's folder


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written."""


class Run(NamedTuple):
    """All that the next step depends on, which is what a checkpoint holds."""

    parameters: dict[str, Tensor]  # by name, those that are trained
    optimizer: torch.optim.Optimizer
    identity: dict  # settings, loss, data, base model: what makes this run this run
    log: list[dict]  # a row for each step; {"step": 0, ...} is before the first


def steps_of_run(
    run: Run, config, device: torch.device, *,
    folder=None, resume=False, monitor: Callable[[], dict], progress=False,
) -> Iterator[int]:  # fmt: skip
    """The numbers 1, 2, ... of the steps that are still to be taken.

    The caller takes the step and adds its row to `run.log`. Before the next one comes, the numbers
    of `monitor()` are added to the row and a checkpoint goes to `folder`, each when `config` says
    so. After Ctrl-C the
    step is finished, saved, and TrainingInterrupted raised. Close the iterator (`closing`) when the
    caller fails, so that Ctrl-C means again what it meant before.
    """
    from tqdm.auto import tqdm

    path = Path(folder) / CHECKPOINT if folder else None

    def save():
        if path and processes.is_main():
            save_checkpoint(path, run, finished=run.log[-1]["step"] == config.steps)

    def add_monitored():
        run.log[-1].update(monitor() if processes.is_main() else {})
        processes.wait_for_everyone()

    if path and processes.is_main():
        remove_leftovers(path.parent)
    if path and resume:
        run.log[:] = load_checkpoint(path, run)
    if not run.log:
        run.log.append({"step": 0})
        add_monitored()
        save()
    first = run.log[-1]["step"]
    hidden = not (progress and processes.is_main())
    bar = tqdm(total=config.steps, initial=first, desc="train", disable=hidden)
    with bar, interruption() as asked_to_stop:
        for step in range(first + 1, config.steps + 1):
            yield step  # the caller's turn: a batch, a loss, a step, a row
            last, stop = step == config.steps, processes.anywhere(asked_to_stop.is_set(), device)
            if last or step % config.monitor_every == 0:
                add_monitored()
            if last or stop or step % config.checkpoint_every == 0:
                save()
            bar.update()
            bar.set_postfix(loss=f"{run.log[-1]['loss']:.3f}")
            if stop and not last:
                go_on = f" {folder} holds it: --resume goes on from there." if folder else ""
                raise TrainingInterrupted(f"Stopped after step {step} of {config.steps}.{go_on}")


def stop_unless_finite(step: int, loss: float, norm: float, rate: float, folder=None) -> None:
    """Raise TrainingError for a loss, a gradient or a rate that is no finite number.

    To be called before the optimiser's step, so that the weights are still those of the last one.
    """
    if math.isfinite(loss) and math.isfinite(norm) and math.isfinite(rate):
        return
    kept = saved_step(Path(folder) / CHECKPOINT) if folder else None
    kept = "" if kept is None else f" The checkpoint of step {kept} is kept."
    raise TrainingError(
        f"step {step}: the loss is {loss:g}, its gradient's norm {norm:g} at learning rate "
        f"{rate:g}.{kept} Try a learning rate ten times smaller, a longer warm-up, or --no-bf16."
    )


def diverged(log: Sequence[dict]) -> str | None:
    """A sentence where the run's numbers stayed finite, but its training failed; None otherwise.

    It failed if the mean of the last tenth of its steps
    - has a loss above the first step's by more than 5, and by more than the first step's size, or
    - gives the completions to be learnt a log-probability with last < 3 * first - 50, in nats: from
      -40 to below -170 (losses such as KTO's are bounded, and cannot tell).
    Neither noise nor DPO's usual displacement of the chosen completions comes near.
    """
    rows = [row for row in log if "loss" in row]
    if len(rows) < 2:
        return None
    last = rows[-max(1, len(rows) // 10) :]

    def ended(name):
        return sum(row[name] for row in last) / len(last)

    rate = max(row["learning_rate"] for row in rows)
    advice = f"The rate was {rate:g}. Try one ten times smaller, or a longer warm-up."
    first = rows[0]["loss"]
    if ended("loss") > first + max(5, abs(first)):
        return f"The run failed: its loss went from {first:.4g} to {ended('loss'):.4g}. {advice}"
    for name in ("logps/chosen", "logps/completion"):
        if name in rows[0] and ended(name) < 3 * rows[0][name] - 50:
            return (
                f"The run failed: the log-probability of the completions to be learnt went from "
                f"{rows[0][name]:.4g} to {ended(name):.4g} nats. {advice}"
            )
    return None


# --- the file ---


def save_checkpoint(path: Path, run: Run, finished: bool = False) -> None:
    """All of `run` in one safetensors file, replaced as a whole.

    Of a `finished` run the optimiser's two moments are left out. Nothing needs them any more, and
    they are two thirds of the file; the weights and the log stay, so that --resume finds the run
    finished. Raises TrainingError where the file cannot be written; that of an earlier step stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach() for name, p in run.parameters.items()}
    for i, state in run.optimizer.state_dict()["state"].items() if not finished else ():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
    metadata = {
        "identity": json.dumps(run.identity),
        "log": json.dumps(run.log),
        "tensors": json.dumps(sorted(tensors)),  # so that a missing one is noticed
        "finished": json.dumps(finished),
    }
    try:
        with written_aside(path) as partial:
            save_file(tensors, partial, metadata)
    except (OSError, SafetensorError) as error:
        kept = saved_step(path)
        kept = "no earlier one is there" if kept is None else f"that of step {kept} is whole"
        raise TrainingError(
            f"the checkpoint of step {run.log[-1]['step']} could not be written ({error}); "
            f"{kept}. Free some space, then go on with --resume."
        ) from error


def load_checkpoint(path: Path, run: Run) -> list[dict]:
    """Put a checkpoint's tensors into `run`'s parameters and optimiser; returns its log, [] where
    there is no checkpoint yet.

    Raises TrainingError for a damaged file, and for that of a run which differs in any setting or
    in its data. Nothing of `run` has changed then.
    """
    if not path.exists():
        return []
    tensors, metadata = read_checkpoint(path)
    then, now = json.loads(metadata["identity"]), run.identity
    # A setting that is newer than the checkpoint had its default then.
    then = {field.name: field.default for field in fields(TrainingConfig)} | then
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now if then.get(k) != now[k]]
    if changed:
        raise TrainingError(
            f"{path} belongs to another run: {'; '.join(changed)}. Start in another folder."
        )
    weights, state = {}, {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "model":
            weights[name] = tensor
        else:
            i, name = name.split(".")
            state.setdefault(int(i), {})[name] = tensor
    shapes = {name: p.shape for name, p in run.parameters.items()}
    fits = {name: tensor.shape for name, tensor in weights.items()} == shapes
    in_order = list(shapes.values())  # AdamW's state: two moments like the parameter, and a count
    for i, moments in state.items():
        fits = fits and i < len(in_order) and moments.keys() == {"exp_avg", "exp_avg_sq", "step"}
        fits = fits and moments["exp_avg"].shape == moments["exp_avg_sq"].shape == in_order[i]
    if not fits:
        raise TrainingError(
            f"{path} holds other tensors than this model trains. Start in another folder."
        )
    for name, parameter in run.parameters.items():
        parameter.data.copy_(weights[name])
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    return json.loads(metadata["log"])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and metadata. Raises TrainingError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        whole = sorted(tensors) == json.loads(metadata["tensors"])
        steps = [row["step"] for row in json.loads(metadata["log"])]
        whole = whole and steps == list(range(len(steps))) and len(steps) > 0
        json.loads(metadata["identity"]).keys()
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        whole, reason = False, f" ({type(error).__name__}: {error})"
    else:
        reason = " (tensors or rows of its log are missing)"
    if not whole:
        raise TrainingError(
            f"{path} is damaged{reason}, so the run cannot go on from it. Start again with "
            "--overwrite, or in another folder."
        )
    return tensors, metadata


def saved_step(path: Path) -> int | None:
    """The step of a checkpoint; None where there is none that can be read."""
    metadata = read_metadata(path)
    return json.loads(metadata["log"])[-1]["step"] if "log" in metadata else None


def finished(folder) -> bool:
    """Whether the run in `folder` has taken its last step: --resume has nothing left to do."""
    return read_metadata(Path(folder) / CHECKPOINT).get("finished") == "true"


def read_metadata(path: Path) -> dict[str, str]:
    """A checkpoint's metadata, read without its tensors; {} where there is none to be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            return stored.metadata() or {}
    except (OSError, SafetensorError):
        return {}


@contextmanager
def written_aside(path: Path):
    """A path beside `path` to write to, which takes its place once it is whole.

    A process that is killed leaves the old file as it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written in a run's folder.

    safetensors writes to a file of its own first, `.tmp` and six letters.
    """
    for path in folder.glob("*"):
        if path.name.endswith(".partial") or re.fullmatch(r"\.tmp\w{6}", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def interruption():
    """An event that Ctrl-C sets, so that no step is cut in half; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(*_):
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
