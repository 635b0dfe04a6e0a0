"""A class's table from what its participants hand in:

    python -m dpo_mini.course.workshop.grading FOLDER_OR_FILE...

Each file or folder in FOLDER is a participant: exercise notebooks, or a progress.json. Every
notebook runs in a process of its own, with limits of time, memory and output. Nothing is sent.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import nbformat

from dpo_mini.course import checks
from dpo_mini.course.checks import engine

EXERCISES = Path(__file__).resolve().parents[3] / "exercises"
CHECK = re.compile(r'^check\("(\d\d\.\d)"', flags=re.M)
HEADING = re.compile(r"^## (\d\d\.\d)\b", flags=re.M)
STARTING = 120  # seconds until a process has imported torch, on a busy machine
LONGEST = 100_000  # bytes of a message
SOLVED, EMPTY, WRONG, STOPPED = "solved", "empty", "not yet", "stopped"
MARKS = {SOLVED: "■", EMPTY: "·", WRONG: "x", STOPPED: "!"}


@dataclass(frozen=True)
class Limits:
    """What one exercise of a submission may use."""

    seconds: float = 20
    gigabytes: float = 2  # beyond what the process has when it starts; on Linux
    characters: int = 1_000_000  # printed
    megabytes: int = 50  # of a file that it writes


@dataclass
class Result:
    """What became of an exercise: a state, the mistakes that were recognised, and a sentence."""

    state: str
    mistakes: list[str] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Step:
    """A piece of a submission: code to run, then perhaps a check. `label` names it in a report."""

    label: str
    code: tuple[str, ...]
    check: str | None = None  # our own check's text, whatever became of the participant's


class TooMuchOutput(BaseException):
    """Not an Exception, so that `except Exception` in an answer does not swallow it."""


class Counted:
    """A place to print to, which keeps nothing and ends who prints too much."""

    def __init__(self, most: int):
        self.left = most

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise TooMuchOutput("too much was printed")
        return len(text)

    def flush(self) -> None:
        pass


# --- a submission, read without running it ---


def our_checks(folder: Path = EXERCISES) -> dict[str, str]:
    """{id: the text of its check cell} of the exercises as we hand them out."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if match := CHECK.search(cell.source):
                found[match[1]] = cell.source
    return found


def steps(notebook, ours: dict[str, str]) -> list[Step]:
    """A handed-in notebook as steps. Its own check cells are not used. Magics are left out."""
    found, label, code = [], "the first cells", []

    def close():
        if code or label in ours:
            found.append(Step(label, tuple(code), ours.get(label)))
        code.clear()

    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := HEADING.search(cell.source)):
            close()
            label = heading[1]
        elif cell.cell_type == "code" and not CHECK.search(cell.source):
            code.append(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M))
    close()
    return found


# --- in the process of a submission ---


def restrict(limits: Limits) -> None:
    """Limits that the system enforces, where it has them."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    if hasattr(os, "setsid"):
        os.setsid()  # so that what an answer starts ends with it
    pages = Path("/proc/self/statm")
    if pages.exists():
        import resource

        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        most = used + int(limits.gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.megabytes * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(connection, todo: list[Step], limits: Limits) -> None:
    """Run the steps, and say before each one that it begins, and after it what came of it."""
    import torch

    torch.set_num_threads(1)
    restrict(limits)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        namespace: dict = {"__name__": "__main__"}
        say = partial(send, connection)
        say("ready")
        for step in todo:
            say("begins", step.label)
            say("result", attempt(step, namespace, limits))
        say("done")
        os.chdir("/")


def send(connection, kind: str, value=None) -> None:
    """As JSON: what a submission's process says must not be able to run anything outside of it."""
    data = asdict(value) if isinstance(value, Result) else value
    connection.send_bytes(json.dumps([kind, data]).encode())


def attempt(step: Step, namespace: dict, limits: Limits) -> Result | None:
    """Run one step; None where it has no check. Nothing that the answer raises gets out."""
    trouble = ""
    try:
        output = Counted(limits.characters)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            for code in step.code:
                try:
                    exec(compile(code, f"<{step.label}>", "exec"), namespace)
                except MemoryError:
                    raise
                except Exception as error:
                    trouble = f"{type(error).__name__}: {error}"[:300]
            return judged(step.check, namespace, trouble) if step.check else None
    except TooMuchOutput:
        return Result(STOPPED, ["endless output"], "it printed too much")
    except MemoryError:
        return Result(STOPPED, ["out of memory"], "it asked for too much memory")
    except (SystemExit, KeyboardInterrupt) as error:
        return Result(STOPPED, [], f"it ended itself by {type(error).__name__}")


def judged(check: str, namespace: dict, trouble: str) -> Result:
    """Our check cell on the participant's names, with a `check` that keeps the verdict."""
    verdicts = []

    def keep(id, answer):
        verdicts.append(engine.examine(checks.exercise(id), answer, seed=1))

    try:
        exec(compile(check, "<check>", "exec"), {**namespace, "check": keep})
    except Exception as error:
        trouble = trouble or f"{type(error).__name__}: {error}"[:300]
    if not verdicts:
        return Result(WRONG, ["the answer cannot be run"], trouble)
    verdict = verdicts[0]
    if verdict.solved:
        return Result(SOLVED)
    if "nothing is written" in verdict.message:
        return Result(EMPTY)
    return Result(WRONG, [verdict.mistake] if verdict.mistake else [], verdict.message[:600])


# --- outside of it ---


def context():
    """Processes that start in milliseconds with torch imported, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    chapters = [f"dpo_mini.course.checks.ch{chapter}" for chapter in checks.CHAPTERS]
    made.set_forkserver_preload([__name__, *chapters])
    return made


def graded(notebook, ours: dict[str, str], limits: Limits) -> dict[str, Result]:
    """{exercise: result}. What ends or hangs its process is left out, and the rest tried again."""
    todo, results = steps(notebook, ours), {}
    while todo:
        label, why, found = tried(todo, limits)
        results.update(found)
        if label is None:
            return results
        if label in ours:
            results[label] = Result(STOPPED, [why], why)
        todo = [
            Step(step.label, step.code) if step.label in results else step  # judged already
            for step in todo if step.label != label
        ]  # fmt: skip
    return results


def tried(todo: list[Step], limits: Limits) -> tuple[str | None, str, dict[str, Result]]:
    """One process: the step that stopped it and why, or None, and the results until then."""
    start = context()
    ours, theirs = start.Pipe(duplex=False)
    process = start.Process(target=work, args=(theirs, todo, limits), daemon=True)
    process.start()
    theirs.close()
    results, label, until = {}, "the first cells", time.monotonic() + STARTING
    try:
        while ours.poll(max(0.0, until - time.monotonic())):
            kind, value = json.loads(ours.recv_bytes(LONGEST))
            if kind == "done":
                return None, "", results
            if kind == "begins":
                label = value
            elif kind == "result" and value:
                results[label] = Result(**value)
            until = time.monotonic() + limits.seconds
        return label, f"it ran longer than {limits.seconds:g} seconds", results
    except (EOFError, OSError, ValueError, TypeError):
        return label, "it ended its process", results
    finally:
        end(process)


def end(process) -> None:
    """End a process and all that it started."""
    if process.is_alive() and hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def submissions(places: list[Path]) -> dict[str, list[Path]]:
    """{participant: files}. A folder's entries are participants, by folder or by file name."""
    found: dict[str, list[Path]] = {}
    for place in places:
        if not place.exists():
            raise SystemExit(f"{place} is not there. Give folders, notebooks or progress files.")
        for entry in sorted(place.iterdir()) if place.is_dir() else [place]:
            inside = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
            files = [p for p in inside if p.suffix in (".ipynb", ".json") and not hidden(p, entry)]
            if files:
                name = entry.name if entry.is_dir() else entry.stem
                found.setdefault(name, []).extend(files)
    return found


def hidden(path: Path, inside: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(inside).parts)


def class_results(
    places: list[Path], limits: Limits, workers: int = 2
) -> dict[str, dict[str, Result]]:
    """{participant: {exercise: result}}; an unreadable file is said and skipped."""
    ours = our_checks()

    def of(files: list[Path]) -> dict[str, Result]:
        results: dict[str, Result] = {}
        for path in files:
            if path.suffix == ".json":
                for id, row in checks.read_progress(path).items():
                    merge(results, id, from_progress(row))
                continue
            try:
                notebook = nbformat.read(path, as_version=4)
            except Exception as error:
                print(f"{path.name} cannot be read as a notebook: {error}"[:200], file=sys.stderr)
                continue
            for id, result in graded(notebook, ours, limits).items():
                merge(results, id, result)
        return results

    people = submissions(places)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(people, pool.map(of, people.values())))


def from_progress(row: dict) -> Result:
    return Result(SOLVED if row["solved"] else WRONG, list(row["mistakes"]))


def merge(results: dict[str, Result], id: str, new: Result) -> None:
    """Add a result: the better state stays, mistakes add up."""
    old = results.get(id)
    order = [SOLVED, STOPPED, WRONG, EMPTY]
    best = new if old is None or order.index(new.state) < order.index(old.state) else old
    names = dict.fromkeys([*(old.mistakes if old else []), *new.mistakes])
    results[id] = Result(best.state, list(names), best.message)


def table(results: dict[str, dict[str, Result]]) -> str:
    """The class: a line a participant; mistakes met most; where people are stuck; what stopped."""
    ids = sorted({id for rows in results.values() for id in rows})
    width = max([len(name) for name in results] + [12])
    lines = [" " * width + "  " + "  ".join(ids) + "  solved"]
    for name, rows in sorted(results.items()):
        marks = "  ".join(f"{MARKS[rows[id].state] if id in rows else '-':^4}" for id in ids)
        done = sum(row.state == SOLVED for row in rows.values())
        lines.append(f"{name:{width}}  {marks}  {done} of {len(ids)}")
    lines += ["", "■ solved   x not yet   · nothing written   ! stopped   - not handed in"]
    met: Counter = Counter()
    for rows in results.values():
        met.update((id, mistake) for id, row in rows.items() for mistake in row.mistakes)
    lines += ["", "mistakes met most (people)"]
    lines += [f"{n:4d}  {id} {name}" for (id, name), n in met.most_common(15)] or ["   none"]
    lines += ["", "where people are stuck (of those who wrote, how many have not solved it)"]
    stuck = []
    for id in ids:
        wrote = [rows[id] for rows in results.values() if id in rows and rows[id].state != EMPTY]
        unsolved = sum(row.state != SOLVED for row in wrote)
        if unsolved:
            stuck.append((unsolved, len(wrote), id))
    stuck.sort(key=lambda row: (-row[0] / row[1], -row[0], row[2]))
    lines += [f"{n:4d} of {of}  {id} {checks.exercise(id).title}" for n, of, id in stuck]
    stops = [(name, id, row.message) for name, rows in sorted(results.items())
             for id, row in rows.items() if row.state == STOPPED]  # fmt: skip
    if stops:
        lines += ["", "stopped", *(f"      {name} {id}: {said}" for name, id, said in stops)]
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dpo_mini.course.workshop.grading", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("places", nargs="+", type=Path, help="folders, notebooks, progress files")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="an exercise's time")
    parser.add_argument("--gigabytes", type=float, default=Limits.gigabytes, help="its memory")
    parser.add_argument("--workers", type=int, default=2, help="submissions at a time")
    args = parser.parse_args(argv)
    limits = Limits(args.seconds, args.gigabytes)
    print(table(class_results(args.places, limits, args.workers)))


if __name__ == "__main__":
    main()
