"""What a check does: it runs a learner's answer on fresh cases beside a truth found in another way,
and where the two differ, it looks for the mistake that would give just these numbers.
"""

import inspect
import linecache
import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

PACKAGE = str(Path(__file__).parents[2])
KINDS = ("derive", "implement", "predict", "diagnose", "design")


@dataclass(frozen=True)
class Wrong:
    """A mistake that learners make: the answer that has it, and the thought that leads out."""

    name: str
    answer: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """A task and all that is known about its answers.

    `cases(generator)` gives argument tuples, the smallest first, new ones for each generator;
    float tensors in them that require a gradient are differentiated. `truth` is computed in another
    way than the solution is (autograd, enumeration, a closed form, float64), and `others` are right
    answers written differently, which must pass. The numbers 1-5 are the learner's guide.
    """

    id: str  # "03.2": chapter and place
    title: str
    kind: str
    truth: Callable
    cases: Callable[[torch.Generator], list[tuple]]
    wrong: tuple[Wrong, ...]
    others: tuple[Callable, ...] = ()
    tolerance: float = 1e-6  # relative, and absolute near 0
    difficulty: int = 2
    importance: int = 3
    minutes: int = 10
    workshop: bool = False  # on the three-hour path


class Verdict(NamedTuple):
    solved: bool
    mistake: str | None  # the name of a known mistake, where it was recognised
    message: str


class Outcome(NamedTuple):
    """What an answer did with one case: a value and gradients, or an exception."""

    value: Any = None
    gradients: tuple = ()
    differentiable: bool = False
    error: BaseException | None = None


def examine(exercise: Exercise, answer, seed: int | None = None) -> Verdict:
    """Judge an answer; never raises for what the answer does. `seed` fixes the cases."""
    if not callable(answer):
        said = f"expected a function, got {describe(answer)}. Pass the function itself, uncalled."
        return Verdict(False, None, said)
    generator = torch.Generator().manual_seed(random.getrandbits(40) if seed is None else seed)
    cases = exercise.cases(generator)
    weights = generator.initial_seed()
    expected = [outcome(exercise.truth, case, weights) for case in cases]
    for truth in expected:
        if truth.error:
            raise truth.error  # ours to mend
    got = [outcome(answer, case, weights) for case in cases]
    if isinstance(got[0].error, NotImplementedError):
        return Verdict(False, None, "not yet: nothing is written here so far.")
    complaints = [complaint(e, g, exercise.tolerance) for e, g in zip(expected, got)]
    if not any(complaints):
        return Verdict(True, None, "solved.")
    for wrong in exercise.wrong:
        theirs = [outcome(wrong.answer, case, weights) for case in cases]
        if all(same(a, b, exercise.tolerance) for a, b in zip(theirs, got)):
            return Verdict(False, wrong.name, f"not yet: {wrong.name}. {wrong.hint}")
    first = next(i for i, said in enumerate(complaints) if said)
    right = complaints.count(None)
    also = f" ({right} of {len(cases)} cases are right.)" if right else ""
    where = f"\nThe case: {show_arguments(exercise, cases[first])}" if cases[first] else ""
    return Verdict(False, None, f"not yet: {complaints[first]}{also}{where}")


def outcome(answer: Callable, case: tuple, seed: int) -> Outcome:
    """Run an answer on its own copy of a case."""
    leaves: list[Tensor] = []
    arguments = copied(case, leaves)
    state = torch.random.get_rng_state()
    try:
        value = answer(*arguments)
        tensors = [t for t in flatten(value) if isinstance(t, Tensor) and t.requires_grad]
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
        if leaves and tensors:
            generator = torch.Generator().manual_seed(seed)
            total = sum(
                (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
                for t in tensors
            )
            found = torch.autograd.grad(total, leaves, allow_unused=True)
            gradients = tuple(
                torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)
            )
        return Outcome(detached(value), gradients, bool(tensors))
    except (Exception, SystemExit) as error:
        return Outcome(error=error)
    finally:
        torch.random.set_rng_state(state)


def complaint(expected: Outcome, got: Outcome, tolerance: float) -> str | None:
    """What is wrong with an outcome, in a sentence; None where nothing is."""
    if got.error:
        return raised(got.error)
    if got.value is None:
        return "your function returns None: is the `return` missing?"
    said = difference(expected.value, got.value, tolerance)
    if said:
        return said
    if expected.differentiable and not got.differentiable:
        return (
            "the value is right, but no gradient flows back from it: look for .item(), .detach(), "
            "torch.no_grad(), numpy, or a new tensor made of the numbers."
        )
    for mine, yours in zip(expected.gradients, got.gradients):
        if not close(mine, yours, tolerance):
            return (
                f"the value is right, but not its gradient: expected {show(mine)}, yours is "
                f"{show(yours)}. Something is detached that should not be, or the reverse."
            )
    return None


def difference(expected, got, tolerance: float, equal_nan: bool = False) -> str | None:
    """How two values differ, in a sentence; None where they do not."""
    if got is None:
        return None if expected is None else "expected a value, got None."
    if isinstance(expected, Tensor):
        if expected.dim() == 0 and isinstance(got, (int, float)) and not isinstance(got, bool):
            got = torch.tensor(got, dtype=expected.dtype)
        if not isinstance(got, Tensor):
            return f"expected a tensor of shape {list(expected.shape)}, got {describe(got)}."
        if got.shape != expected.shape:
            return f"expected the shape {list(expected.shape)}, yours is {list(got.shape)}."
        if got.dtype != expected.dtype:
            return f"expected {expected.dtype}, yours is {got.dtype}."
        if got.device != expected.device:
            return f"expected a tensor on {expected.device}, yours is on {got.device}."
        if not close(expected, got, tolerance, equal_nan):
            return f"expected {show(expected)}, yours is {show(got)}."
        return None
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
    if isinstance(expected, bool) or isinstance(expected, str):
        if type(got) is not type(expected):
            quotes = ", in quotes" if isinstance(expected, str) else ""
            return f"expected {describe(expected, content=False)}{quotes}, got {describe(got)}."
        return None if got == expected else f"{got!r} is not it."
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return f"expected a number, got {describe(got)}."
    near = math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)
    return None if near else f"expected {expected:.6g}, yours is {got:.6g}."


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
    points = random.Random(0)
    for _ in range(5):
        at = {
            s: sympy.Float(points.uniform(0.3, 2.0), 30)
            for s in sorted(expected.free_symbols, key=str)
        }
        a, b = (sympy.N(e.subs(at).doit(), 25) for e in (expected, got))
        close_by = b.is_finite and abs(complex(a) - complex(b)) <= 1e-9 * (1 + abs(complex(a)))
        if not close_by:
            where = ", ".join(f"{s} = {float(v):.2f}" for s, v in at.items())
            return f"at {where or 'no symbols'} expected {a.n(6)}, yours is {b.n(6)}."
    return None


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
    return difference(one.value, other.value, tolerance, equal_nan=True) is None and all(
        close(a, b, tolerance, True) for a, b in zip(one.gradients, other.gradients)
    )


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
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if not frames:
        return f"{what}. Does the function take the arguments of the task, in their order?"
    place = frames[0]
    for frame in frames:  # the deepest frame that is the learner's own
        if "site-packages" not in frame.filename and PACKAGE not in frame.filename:
            place = frame
    line = place.line or linecache.getline(place.filename, place.lineno).strip()
    return f"{what}, in the line\n    {line}"


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
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item, leaves) for item in value)
    if isinstance(value, dict):
        return {key: copied(item, leaves) for key, item in value.items()}
    return value


def detached(value):
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return [detached(item) for item in value]
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


def describe(value, content: bool = True) -> str:
    """A value in a few words: "a tensor of shape [2, 3]", "a str, 'b'"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"a {name}, {value!r:.60}" if content and value is not None else f"a {name}"


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


def show_arguments(exercise: Exercise, case: tuple) -> str:
    """The case with the names that the task gives its arguments."""
    names = list(inspect.signature(exercise.truth).parameters)
    return "; ".join(f"{name} = {show(argument)}" for name, argument in zip(names, case))


def refuse_arguments(exercise: Exercise, seed: int) -> list[tuple[str, Callable]]:
    """Functions that no check may accept: a constant, and for each argument one that ignores it."""
    cases = exercise.cases(torch.Generator().manual_seed(seed + 1))
    first = copied(cases[0], [])
    if not first:
        return []

    def ignoring(i):
        fixed = sympy.Integer(2) if isinstance(first[i], sympy.Basic) else first[i]
        return lambda *arguments: exercise.truth(*arguments[:i], fixed, *arguments[i + 1 :])

    constant = exercise.truth(*first)
    if isinstance(constant, sympy.Basic):
        constant = sympy.Integer(3)
    return [
        ("a constant", lambda *arguments: detached(constant)),
        *((f"ignores argument {i + 1}", ignoring(i)) for i in range(len(first))),
    ]
