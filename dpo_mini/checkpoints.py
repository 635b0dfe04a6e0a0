"""What lets a run be stopped at any moment and go on to the same weights, bit for bit."""

import json
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, what is safe, and what to try."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written."""


def save_checkpoint(path: Path, parameters: dict, optimizer, identity: dict, log: list) -> None:
    """Everything that the next step depends on, in one safetensors file replaced as a whole.

    Raises TrainingError where it cannot be written; the file of an earlier step then stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"identity": json.dumps(identity), "log": json.dumps(log)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint of step {log[-1]['step']} could not be written ({error}); that of "
            f"step {saved_step(path)} is whole. Free some space, then go on with --resume."
        ) from error


def load_checkpoint(path: Path, parameters: dict, optimizer, identity: dict) -> list[dict]:
    """Put a checkpoint's tensors into parameters and optimizer; returns its log, [] for none yet.

    Raises TrainingError for the checkpoint of a run that differs in any setting or in its data.
    """
    from safetensors import safe_open

    if not path.exists():
        return []
    with safe_open(path, "pt") as stored:
        then = json.loads(stored.metadata()["identity"])
        changed = [
            f"{k} was {then.get(k)}, is {v}" for k, v in identity.items() if then.get(k) != v
        ]
        if changed:
            raise TrainingError(
                f"{path} belongs to another run: {'; '.join(changed)}. Start in another folder."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for key in stored.keys():
            kind, rest = key.split(".", 1)
            if kind == "model":
                parameters[rest].data.copy_(stored.get_tensor(key))
            else:
                i, name = rest.split(".")
                state.setdefault(int(i), {})[name] = stored.get_tensor(key)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return json.loads(stored.metadata()["log"])


def saved_step(path: Path) -> int | None:
    """The step of a checkpoint; None where there is none."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as stored:
        return json.loads(stored.metadata()["log"])[-1]["step"]


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
