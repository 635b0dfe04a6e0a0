"""What a check does: it runs a learner's answer on fresh cases beside a truth found in another way,
and where the two differ, it looks for the mistake that would give just these numbers.

An exercise is its truth, its cases, its right answers and its special mistakes; all common mistakes
are derived from the right answers (mistakes.py), and what an answer has in common with none of them
is read from how its numbers differ (symptoms.py).
"""

import inspect
import itertools
import linecache
import math
import numbers
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch
from torch import Tensor

from dpo_mini.course.checks import mistakes, symptoms
from dpo_mini.course.checks.mistakes import Mistake

PACKAGE = str(Path(__file__).parents[2])
FLOAT32 = 3e-6  # as many digits survive a few steps in float32
SECONDS = 5  # for the search among the derived mistakes
KINDS = ("derive", "implement", "predict", "diagnose", "design")


class Wrong(NamedTuple):
    """A mistake of this exercise alone: the answer that has it, and the thought that leads out.

    `answer` is a function; or the change that makes it of the first right answer:
    - "old -> new": this text of it is replaced (several with " | " between them);
    - "beta = 1": a statement that changes the arguments before the call;
    - "result = -result": a statement that changes the result after the call;
    - {"key": value}: of a result that is a dictionary, the entries that the mistake is about.
    """

    name: str
    answer: Callable | str | dict
    hint: str


class Edge(tuple):
    """A case with a property that a careless answer overlooks: Edge("two are tied", (a, b))."""

    def __new__(cls, about: str, case):
        new = super().__new__(cls, case)
        new.about = about
        return new


@dataclass(frozen=True)
class Exercise:
    """A task and all that is known about its answers.

    `cases(generator)` gives argument tuples, the smallest first, new ones for each generator;
    float tensors in them that require a gradient are differentiated. `truth` is computed in another
    way than the solution is (autograd, enumeration, a closed form, float64), and all answers in
    `right` must pass; the first is a plain function with the task's argument names. The numbers 1-5
    are the learner's guide. A tolerance below 1e-6 asks for float64, and the text must say so.
    """

    id: str  # "03.2": chapter and place
    title: str
    kind: str
    difficulty: int
    importance: int
    minutes: int
    truth: Callable
    cases: Callable[[torch.Generator], list[tuple]]
    wrong: tuple[Wrong, ...]
    right: tuple[Callable, ...] = ()
    tolerance: float = FLOAT32  # relative, and absolute near 0
    workshop: bool = False  # on the three-hour path
    float64: bool = False  # whether the result must have this dtype, as the text says

    @cached_property
    def listed(self) -> tuple[Mistake, ...]:
        return tuple(Mistake(w.name, made(w.answer, self), w.hint) for w in self.wrong)


class Verdict(NamedTuple):
    solved: bool
    mistake: str | None  # the name of a mistake, where one was recognised
    message: str
    unwritten: bool = False  # the answer's place still holds the stub


class Outcome(NamedTuple):
    """What an answer did with one case: a value and gradients, or an exception."""

    value: Any = None
    gradients: tuple = ()
    differentiable: bool = False
    changed: tuple[int, ...] = ()  # places of the arguments that it changed
    error: BaseException | None = None


class Trial(NamedTuple):
    """An answer on all cases, beside the truth."""

    cases: list[tuple]
    expected: list[Outcome]
    got: list[Outcome]
    names: list[str]  # of the arguments
    seed: int
    tolerance: float
    answer: Callable


def examine(exercise: Exercise, answer, seed: int | None = None) -> Verdict:
    """Judge an answer; never raises for what the answer does. `seed` fixes the cases."""
    if not callable(answer):
        said = f"expected a function, got {describe(answer)}. Pass the function itself, uncalled."
        return Verdict(False, None, said)
    trial = tried(exercise, answer, random.getrandbits(40) if seed is None else seed)
    if isinstance(trial.got[0].error, NotImplementedError):
        return Verdict(False, None, "not yet: nothing is written here so far.", unwritten=True)
    complaints = [
        complaint(e, g, allowed(exercise, g), trial.names)
        for e, g in zip(trial.expected, trial.got)
    ]
    if not any(complaints):
        return Verdict(True, None, "solved.")
    if misfit := signature_problem(answer, exercise):
        return Verdict(False, "the arguments", f"not yet: {misfit}")
    mistake = recognised(exercise, trial, complaints)
    first = next(i for i, said in enumerate(complaints) if said)
    right = complaints.count(None)
    also = f" ({right} of {len(complaints)} cases are right.)" if right else ""
    case = trial.cases[first]
    where = "\nThe case: " + show_arguments(trial.names, case) if case else ""
    if mistake:
        listed = mistake[0] in {w.name for w in exercise.wrong}
        shown = "" if listed else f" {complaints[first]}{also}{where}"
        return Verdict(False, mistake[0], f"not yet: {mistake[0]}. {mistake[1]}{shown}")
    return Verdict(False, None, f"not yet: {complaints[first]}{also}{where}")


def tried(exercise: Exercise, answer: Callable, seed: int) -> Trial:
    """Run an answer, and the truth, on the cases that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    cases = exercise.cases(generator)
    expected = [outcome(exercise.truth, case, seed) for case in cases]
    for truth in expected:
        if truth.error:
            raise truth.error  # ours to mend
    got = [outcome(answer, case, seed, e.value) for case, e in zip(cases, expected)]
    names = argument_names(exercise, answer)
    return Trial(cases, expected, got, names, seed, exercise.tolerance, answer)


def allowed(exercise: Exercise, got: Outcome) -> float:
    """The tolerance: a result that is float32 has no more digits than that."""
    single = any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in flatten(got.value))
    if single and not exercise.float64:
        return max(exercise.tolerance, FLOAT32)
    return exercise.tolerance


def recognised(exercise: Exercise, trial: Trial, complaints: list) -> tuple[str, str] | None:
    """Name and hint of the first mistake that does what the answer did with all cases."""
    wrong = [i for i, said in enumerate(complaints) if said]
    if changed := [i for g in trial.got for i in g.changed]:
        argument = trial.names[changed[0]]
        if all("in place" in complaints[i] for i in wrong):
            return f"{argument} is changed in place", "Whoever calls the function still needs it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a derived mistake does
        for mistake in exercise.listed:
            if matches(mistake.answer, trial):
                return mistake.name, mistake.hint
        if found := symptoms.six_digits(trial, wrong) or symptoms.overlooked(trial, wrong, most=1):
            return found
        until = time.process_time() + SECONDS
        for mistake in derived(exercise, trial.cases[0], trial.names):
            if matches(mistake.answer, trial, must_answer=True):
                return mistake.name, mistake.hint
            if time.process_time() > until:
                break
        for mistake in together(exercise):
            if matches(mistake.answer, trial, must_answer=True):
                return mistake.name, mistake.hint
            if time.process_time() > until:
                break
        if found := recognised_in_part(exercise, trial):
            return found
    return symptoms.read(trial, wrong)


def recognised_in_part(exercise: Exercise, trial: Trial) -> tuple[str, str] | None:
    """Of an answer of several values: a listed mistake that gives just one of them, and a wrong one.
    What follows from the mistake may be computed in another way.
    """
    values = [(e.value, g.value) for e, g in zip(trial.expected, trial.got)]
    if not all(isinstance(v, (list, tuple)) for pair in values for v in pair):
        return None
    if any(len(e) != len(g) for e, g in values) or len({len(e) for e, _ in values}) > 1:
        return None
    tolerance = max(trial.tolerance, FLOAT32)
    wrong = [
        k for k in range(len(values[0][0])) if any(difference(e[k], g[k], tolerance) for e, g in values)
    ]  # fmt: skip
    for mistake in exercise.listed:
        made_of_it = [
            outcome(mistake.answer, case, trial.seed, e.value).value
            for case, e in zip(trial.cases, trial.expected)
        ]
        if not all(isinstance(m, (list, tuple)) and len(m) > max(wrong, default=0) for m in made_of_it):
            continue
        for k in wrong:
            pairs = zip(made_of_it, values)
            if all(difference(m[k], g[k], tolerance, equal_nan=True) is None for m, (_, g) in pairs):
                return mistake.name, mistake.hint
    return None


def together(exercise: Exercise) -> Iterator[Mistake]:
    """Two listed mistakes at once, where both are changes of the first right answer."""
    changes = [w for w in exercise.wrong if isinstance(w.answer, str)]
    for one, other in itertools.combinations(changes, 2):
        texts = [w.answer for w in (one, other) if " -> " in w.answer]
        statements = [w.answer for w in (one, other) if " -> " not in w.answer]
        try:
            answer = edited(exercise.right[0], " | ".join(texts)) if texts else exercise.right[0]
            for statement in statements:
                answer = with_statement(answer, exercise.right[0], statement)
        except (ValueError, SyntaxError):  # they change the same place
            continue
        yield Mistake(f"{one.name}; and {other.name}", answer, f"Two things. {one.hint} {other.hint}")


def derived(exercise: Exercise, case: tuple, names: list[str]) -> Iterator[Mistake]:
    return mistakes.derived(exercise, tuple(copied(case, [])), names)


def matches(answer: Callable, trial: Trial, must_answer: bool = False) -> bool:
    """Whether an answer does with every case what the learner's did; `must_answer`: it counts only
    if it gives a value at all.
    """
    values = 0
    for case, expected, got in zip(trial.cases, trial.expected, trial.got):
        mine = outcome(answer, case, trial.seed, expected.value)
        if not same(mine, got, max(trial.tolerance, FLOAT32)):
            return False
        values += mine.error is None
    return values > 0 or not must_answer


def made(change, exercise: Exercise) -> Callable:
    """The wrong answer that a `Wrong` describes."""
    if callable(change):
        return change
    if isinstance(change, dict):
        return lambda *arguments: change
    right = exercise.right[0]
    return edited(right, change) if " -> " in change else with_statement(right, right, change)


def with_statement(function: Callable, right: Callable, statement: str) -> Callable:
    """The function with a statement that changes its arguments, or its result; `right` has the
    names that it may use.
    """
    names = list(inspect.signature(right).parameters)
    code, after = compile(statement, right.__name__, "exec"), "result" in statement

    def answer(*arguments):
        space = {**right.__globals__, **dict(zip(names, arguments))}
        if after:
            space["result"] = function(*arguments)
        exec(code, space)
        return space["result"] if after else function(*(space[name] for name in names))

    return answer


def edited(function: Callable, change: str) -> Callable:
    """The function with "old -> new" done to its text."""
    text = inspect.getsource(function)
    for edit in change.split(" | "):
        old, new = edit.split(" -> ")
        if text.count(old) < 1:
            raise ValueError(f"{function.__name__} does not contain {old!r}")
        text = text.replace(old, new)
    space = dict(function.__globals__)
    exec(compile(text, "<edited>", "exec"), space)
    new = space[function.__name__]
    return lambda *arguments: what_differs(new(*arguments), function, arguments)


def what_differs(result, right: Callable, arguments: tuple):
    """Of a dictionary the entries that a mistake changes: it may come together with another one."""
    if not isinstance(result, dict):
        return result
    kept = right(*arguments)
    return {k: v for k, v in result.items() if v != kept[k]} or result


def outcome(answer: Callable, case: tuple, seed: int, like: Any = None) -> Outcome:
    """Run an answer on its own copy of a case; its value is brought into the form of `like`."""
    leaves: list[Tensor] = []
    arguments = copied(case, leaves)
    state = torch.random.get_rng_state()
    try:
        value = conformed(plain(answer(*arguments)), like)
        tensors = [t for t in flatten(value) if isinstance(t, Tensor) and t.requires_grad]
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
        if leaves and tensors:
            total = sum((t * weights(t, seed + i)).sum() for i, t in enumerate(tensors))
            found = torch.autograd.grad(total, leaves, allow_unused=True)
            gradients = tuple(
                torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)
            )
        changed = tuple(i for i, (old, new) in enumerate(zip(case, arguments)) if altered(old, new))
        return Outcome(detached(value), gradients, bool(tensors), changed)
    except (Exception, SystemExit) as error:
        return Outcome(error=error)
    finally:
        torch.random.set_rng_state(state)


def weights(tensor: Tensor, seed: int) -> Tensor:
    """By which a tensor's entries are added up before they are differentiated."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def complaint(expected: Outcome, got: Outcome, tolerance: float, names: list[str]) -> str | None:
    """What is wrong with an outcome, in a sentence; None where nothing is."""
    if got.error:
        return raised(got.error)
    if got.value is None and expected.value is not None:
        return "your function returns None: is the `return` missing?"
    said = difference(expected.value, got.value, tolerance)
    if said:
        return said
    if expected.differentiable and not got.differentiable:
        return (
            "the value is right, but no gradient flows back from it: look for .item(), .detach(), "
            "torch.no_grad(), numpy, or a new tensor made of the numbers."
        )
    for i, (mine, yours) in enumerate(zip(expected.gradients, got.gradients)):
        if not close(mine, yours, tolerance):
            return f"the value is right, but not its gradient: {gradient_problem(mine, yours)}"
    if got.changed:
        argument = names[got.changed[0]] if got.changed[0] < len(names) else "an argument"
        return (
            f"the value is right, but your function changes `{argument}` in place. Work on a copy: "
            "tensor.clone(), list(...), or operations without a trailing underscore."
        )
    return None


def gradient_problem(mine: Tensor, yours: Tensor) -> str:
    """How a gradient differs, in a sentence."""
    if not yours.isfinite().all():
        return "it is infinite or not a number: inf - inf, 0 * inf or 1 / 0 is differentiated."
    if not yours.any():
        return "it is zero for an argument that counts: something detaches that argument."
    if not mine.any():
        return "there is one for an argument that should be a constant: detach it."
    return f"expected {show(mine)}, yours is {show(yours)}."


def difference(expected, got, tolerance: float, equal_nan: bool = False) -> str | None:
    """How two values differ, in a sentence; None where they do not."""
    if got is None or expected is None:
        return None if expected is got else f"expected {describe(expected)}, got {describe(got)}."
    if isinstance(expected, Tensor):
        return tensor_difference(expected, got, tolerance, equal_nan)
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return f"expected {len(expected)} values, got {describe(got)}."
        parts = (difference(e, g, tolerance, equal_nan) for e, g in zip(expected, got))
        return next((f"value {i + 1}: {p}" for i, p in enumerate(parts) if p), None)
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return f"expected a dictionary with the keys {sorted(expected)}, got {describe(got)}."
        if missing := [key for key in expected if key not in got]:
            return f"your dictionary has no key {missing[0]!r}."
        if foreign := [key for key in got if key not in expected]:
            return f"your dictionary has the key {foreign[0]!r}; expected only {sorted(expected)}."
        parts = [(k, difference(expected[k], got[k], tolerance, equal_nan)) for k in expected]
        return "; ".join(f"{k!r}: {p}" for k, p in parts if p) or None
    if isinstance(expected, sympy.Basic):
        return symbolic_difference(expected, got)
    if isinstance(expected, (bool, str)):
        if type(got) is not type(expected):
            quotes = ", in quotes" if isinstance(expected, str) else ""
            return f"expected {describe(expected, content=False)}{quotes}, got {describe(got)}."
        return None if got == expected else f"{got!r} is not it."
    if not isinstance(expected, (int, float)):
        return f"expected {describe(expected)}, got {describe(got)}."
    return number_difference(expected, got, tolerance, equal_nan)


def tensor_difference(expected: Tensor, got, tolerance: float, equal_nan: bool) -> str | None:
    if not isinstance(got, Tensor):
        return f"expected a tensor of shape {list(expected.shape)}, got {describe(got)}."
    if got.shape != expected.shape:
        return f"expected the shape {list(expected.shape)}, yours is {list(got.shape)}."
    if kind_of(got) != kind_of(expected):
        return f"expected {expected.dtype}, yours is {got.dtype}."
    if got.device != expected.device:
        return f"expected a tensor on {expected.device}, yours is on {got.device}."
    if close(expected, got, tolerance, equal_nan):
        return None
    if close(expected, got, FLOAT32):
        return "equal to six digits: compute in float64."
    return f"expected {show(expected)}, yours is {show(got)}."


def kind_of(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "int"


def number_difference(expected, got, tolerance: float, equal_nan: bool) -> str | None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return f"expected a number, got {describe(got)}."
    if isinstance(expected, int) and isinstance(got, float):
        return f"expected a whole number, an int, got {describe(got)}."
    if equal_nan and math.isnan(expected) and math.isnan(got):
        return None
    if math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance):
        return None
    if not math.isclose(expected, got, rel_tol=FLOAT32, abs_tol=FLOAT32):
        return f"expected {expected:.6g}, yours is {got:.6g}."
    return "equal to six digits: compute in float64, and round nothing."


def symbolic_difference(expected, got) -> str | None:
    """Two expressions are equal where they have the same value at random points."""
    if isinstance(got, (int, float)) and not isinstance(got, bool):
        got = sympy.sympify(got)
    if not isinstance(got, sympy.Expr):
        return f"expected a sympy expression, got {describe(got)}."
    foreign = got.free_symbols - expected.free_symbols
    if foreign:
        names = ", ".join(sorted(map(str, foreign)))
        if not expected.free_symbols:
            return f"expected a number, yours still contains {names}."
        known = ", ".join(sorted(map(str, expected.free_symbols)))
        return f"expected an expression in {known}; yours also contains {names}."
    for point in range(5):
        a, b = at_point(expected, point), at_point(got, point)
        if not (b.is_finite and abs(complex(a) - complex(b)) <= 1e-9 * (1 + abs(complex(a)))):
            symbols = sorted(expected.free_symbols, key=str)
            where = ", ".join(f"{s} = {float(coordinate(s, point)):.2f}" for s in symbols)
            return f"at {where or 'no symbols'} expected {a.n(6)}, yours is {b.n(6)}."
    return None


@lru_cache(maxsize=1000)
def at_point(expression: sympy.Expr, point: int) -> sympy.Expr:
    """An expression's value where each symbol has a random value of its own."""
    at = {s: coordinate(s, point) for s in expression.free_symbols}
    return sympy.N(expression.subs(at).doit(), 25)


def coordinate(symbol: sympy.Symbol, point: int) -> sympy.Float:
    return sympy.Float(random.Random(f"{symbol} {point}").uniform(0.3, 2.0), 30)


def same(one: Outcome, other: Outcome, tolerance: float) -> bool:
    """Whether an answer, `other`, did the same with a case as a known mistake, `one`; a mistake
    that is a dictionary names only the entries that it is about.
    """
    if one.error or other.error:
        return type(one.error) is type(other.error)
    if isinstance(one.value, dict) and isinstance(other.value, dict):
        return all(
            key in other.value
            and difference(entry, other.value[key], tolerance, equal_nan=True) is None
            for key, entry in one.value.items()
        )
    if difference(one.value, other.value, tolerance, equal_nan=True):
        return False
    if not symptoms.finite(one.value):
        return True  # gradients of what is no number say nothing
    return all(close(a, b, tolerance, True) for a, b in zip(one.gradients, other.gradients))


def close(a: Tensor, b: Tensor, tolerance: float, equal_nan: bool = False) -> bool:
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=equal_nan)


def raised(error: BaseException) -> str:
    """An exception in the learner's code as a sentence with its line, not as our traceback."""
    said = str(error).strip().splitlines()
    what = f"your code raised {type(error).__name__}" + (f": {said[0]}" if said else "")
    ours = (__file__, mistakes.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
    if not frames:
        return f"{what}. Does the function take the arguments of the task, in their order?"
    place = frames[0]
    for frame in frames:  # the deepest frame that is the learner's own
        if "site-packages" not in frame.filename and PACKAGE not in frame.filename:
            place = frame
    line = place.line or linecache.getline(place.filename, place.lineno).strip()
    return f"{what}, in the line\n    {line}" if line else f"{what}."


# --- arguments and values ---


def argument_names(exercise: Exercise, answer: Callable | None = None) -> list[str]:
    """The learner's own names for the arguments, where there are as many as the task has."""
    known = list(inspect.signature((exercise.right or (exercise.truth,))[0]).parameters)
    try:
        found = inspect.signature(answer).parameters.values()
    except (TypeError, ValueError):
        return known
    plain_ones = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return plain_ones if len(plain_ones) == len(known) else known


def signature_problem(answer: Callable, exercise: Exercise) -> str | None:
    """A sentence where the function cannot take the task's arguments."""
    known = argument_names(exercise)
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*known)
    except TypeError:
        task = f"the {len(known)} arguments {', '.join(known)}" if known else "no arguments"
        own = ", ".join(signature.parameters) or "none"
        return f"the task calls your function with {task}, in this order; yours takes {own}."
    return None


def plain(value):
    """numpy's and other libraries' numbers and arrays as Python's and torch's."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "fiub" else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, sympy.Basic) or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value] if isinstance(value, list) else tuple(map(plain, value))
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    return value


def conformed(value, like):
    """A value in the form of `like`, where they differ only in how the same thing is written."""
    if isinstance(like, Tensor):
        if isinstance(value, (tuple, list)) and value and like.dim():
            same_length = len(value) == len(like)
            tensors = [conformed(v, e) for v, e in zip(value, like)] if same_length else []
            shapes = {t.shape if isinstance(t, Tensor) else None for t in tensors}
            return torch.stack(tensors) if len(shapes) == 1 and None not in shapes else value
        if like.dim() == 0 and isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(value, dtype=like.dtype if kind_of(like) == "float" else None)
        return value
    if isinstance(like, (tuple, list)):
        if isinstance(value, Tensor) and value.dim() and len(value) == len(like):
            value = list(value.unbind())
        if isinstance(value, (tuple, list)) and len(value) == len(like):
            return [conformed(v, e) for v, e in zip(value, like)]
        return value
    if isinstance(like, dict) and isinstance(value, dict):
        return {k: conformed(v, like.get(k)) for k, v in value.items()}
    if like is not None and isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(like, str):
        return written(value, like)
    return value


def written(value, like: str):
    """A word or a number as the task writes it."""
    if isinstance(value, bool) and like in ("yes", "no"):
        return "yes" if value else "no"
    word = value.strip().strip("\"'") if isinstance(value, str) else value
    if (number := as_number(word)) is not None and as_number(like) is not None:
        text = f"{number:.{len(like.partition('.')[2])}f}"
        return text if float(text) == number else f"{number:g}"
    if not isinstance(word, str):
        return value
    return word.lower() if like == like.lower() else word


def as_number(word) -> float | None:
    """The finite number that a word or a number says; None where it says none."""
    try:
        number = None if isinstance(word, bool) else float(word)
    except (ValueError, TypeError):
        return None
    return number if number is not None and math.isfinite(number) else None


def flatten(value) -> list:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flatten(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flatten(item)]
    return [value]


def copied(value, leaves: list[Tensor]):
    """A copy whose tensors are new; those that need a gradient are added to `leaves`."""
    if isinstance(value, Tensor):
        new = value.detach().clone()
        if value.requires_grad:
            leaves.append(new.requires_grad_())
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(item, leaves) for item in value))
    if isinstance(value, Edge):
        return tuple(copied(item, leaves) for item in value)
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item, leaves) for item in value)
    if isinstance(value, dict):
        return {key: copied(item, leaves) for key, item in value.items()}
    return value


def altered(old, new) -> bool:
    """Whether an argument's copy is no longer what it was. What can be called, a model say, may
    remember something: that is its own affair.
    """
    if callable(old):
        return False
    if isinstance(old, Tensor):
        before, after = (t.detach().nan_to_num() for t in (old, new))
        return before.shape != after.shape or not torch.equal(before, after)
    if isinstance(old, (tuple, list)):
        return len(old) != len(new) or any(map(altered, old, new))
    if isinstance(old, dict):
        return list(old) != list(new) or any(altered(old[k], new[k]) for k in old)
    return old is not new and old != new


def detached(value):
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return [detached(item) for item in value]
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


# --- words ---


def describe(value, content: bool = True) -> str:
    """A value in a few words: "a tensor of shape [2, 3]", "a str, 'b'"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"a {name}, {value!r:.60}" if content else f"a {name}"


def show(value, digits: int = 5) -> str:
    """A value short enough for a line."""
    if isinstance(value, Tensor):
        if value.numel() > 24:
            return f"a tensor of shape {list(value.shape)} that begins {show(value.flatten()[:6])}"
        if value.dim() == 0:
            return f"{value.item():.{digits}g}" if value.is_floating_point() else str(value.item())
        return "[" + ", ".join(show(v, digits) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, dict):
        entries = [f"{key}: {show(entry, 3)}" for key, entry in list(value.items())[:6]]
        return "{" + ", ".join(entries) + (", …" if len(value) > 6 else "") + "}"
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        items = [show(v, digits) for v in value]
        items = [f"{n}={v}" for n, v in zip(names, items)] if names else items
        return "(" + ", ".join(items) + ")"
    text = str(value)
    return text if len(text) < 200 else text[:200] + " …"


def show_arguments(names: list[str], case: tuple) -> str:
    """The case with the names that the learner, or the task, gives its arguments."""
    said = "; ".join(f"{name} = {show(argument)}" for name, argument in zip(names, case))
    return f"{said} ({case.about})" if isinstance(case, Edge) else said


# --- what the tests try ---


def refuse_arguments(exercise: Exercise, seed: int) -> list[tuple[str, Callable]]:
    """Functions that no check may accept: a constant, for each argument one that ignores it, and
    for each argument that can be changed one that changes it in place.
    """
    cases = exercise.cases(torch.Generator().manual_seed(seed + 1))
    first = copied(cases[0], [])
    if not first:
        return []

    def ignoring(i):
        fixed = sympy.Integer(2) if isinstance(first[i], sympy.Basic) else first[i]
        return lambda *arguments: exercise.truth(*arguments[:i], fixed, *arguments[i + 1 :])

    def changing(i):
        def answer(*arguments):
            result = exercise.truth(*arguments)
            if isinstance(arguments[i], list):
                arguments[i].append(arguments[i][0])
            else:
                data = arguments[i].data
                data.copy_(~data if data.dtype == torch.bool else data + 1)
            return detached_copy(result)

        return answer

    constant = exercise.truth(*first)
    if isinstance(constant, sympy.Basic):
        constant = sympy.Integer(3)
    can_change = [i for i, a in enumerate(first) if isinstance(a, (Tensor, list)) and len(a)]
    return [
        ("a constant", lambda *arguments: detached(constant)),
        *((f"ignores argument {i + 1}", ignoring(i)) for i in range(len(first))),
        *((f"changes argument {i + 1}", changing(i)) for i in can_change),
    ]


def detached_copy(value):
    """So that a change of an argument afterwards does not reach the result."""
    return copied(value, []) if not isinstance(value, Tensor) else value * 1
