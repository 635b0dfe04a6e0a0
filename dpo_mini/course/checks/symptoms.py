"""What can be said of an answer that no known mistake explains: from how its numbers differ."""

import math

import torch
from torch import Tensor

from dpo_mini.course.checks import engine


def read(trial, wrong: list[int]) -> tuple[str, str] | None:
    """Name and hint of the first symptom that an answer shows; `wrong` are its wrong cases."""
    for symptom in SYMPTOMS:
        found = symptom(trial, wrong)
        if found:
            return found
    return None


def leaves(outcome) -> list:
    return engine.flatten(outcome.value)


def six_digits(trial, wrong):
    """Right but for rounding."""
    said = [
        engine.complaint(trial.expected[i], trial.got[i], tolerance, trial.names) or ""
        for i in wrong
        for tolerance in (trial.tolerance, 1e-4)
    ]
    if any(said[1::2]) or not any("equal to six digits" in s for s in said):
        return None
    return "six digits", "The formula is right, and something in it is float32 or rounded."


def finite(value) -> bool:
    numbers = [v for v in engine.flatten(value) if isinstance(v, (int, float, Tensor))]
    return all(v.isfinite().all() if isinstance(v, Tensor) else math.isfinite(v) for v in numbers)


def overflow(trial, wrong):
    """nan or infinite where the truth is a number."""
    bad = [i for i in wrong if isinstance(trial.got[i].error, (OverflowError, ZeroDivisionError))]
    bad += [
        i for i in wrong
        if not trial.got[i].error and finite(trial.expected[i].value)
        and not finite([trial.got[i].value, *trial.got[i].gradients])
    ]  # fmt: skip
    if not bad or len(bad) < len(wrong):
        return None
    return "not a number, or infinite", (
        "An exponential of a large number, a logarithm of 0, or a division by 0: which function does "
        "two of your steps at once and stays finite?"
    )


def leaf_changed(trial, wrong):
    """torch refuses to change a tensor in place that requires a gradient: the argument itself."""
    if all("leaf" in str(trial.got[i].error) and "in-place" in str(trial.got[i].error) for i in wrong):
        hint = "An operator such as *= or += writes into the argument. Give the result a new name."
        return "an argument is changed in place", hint
    return None


def overlooked(trial, wrong, most=3):
    """Wrong only in cases that have one property, or one of a few."""
    about = {getattr(trial.cases[i], "about", None) for i in wrong}
    right = len(trial.cases) - len(wrong)
    if len(about) > most or None in about or not right:
        return None
    hint = "All other cases are right: what does the task say of this one?"
    return f"wrong only where {' or '.join(sorted(about))}", hint


def detached(trial, wrong):
    """Values right, gradients missing."""
    for i in wrong:
        expected, got = trial.expected[i], trial.got[i]
        if got.error or engine.difference(expected.value, got.value, trial.tolerance):
            return None
    if all(trial.expected[i].differentiable and not trial.got[i].differentiable for i in wrong):
        return "detached", "A number has left the graph on the way."
    return "the gradient", "The values are right: it is how they depend on the arguments that differs."


def unused(trial, wrong):
    """An argument that makes no difference, though it should."""
    if len(trial.cases) < 2 or any(g.error for g in trial.got):
        return None
    for place, name in enumerate(trial.names):
        checked = 0
        for case, expected, got in zip(trial.cases, trial.expected, trial.got):
            other = changed(case[place])
            if other is None:
                break
            probe = (*case[:place], other, *case[place + 1 :])
            mine = engine.outcome(trial.answer, probe, trial.seed, expected.value)
            if mine.error or engine.difference(got.value, mine.value, 1e-12, True):
                break
            checked += 1
        if checked == len(trial.cases):
            return f"{name} has no effect", f"Your function gives the same result whatever `{name}` is."
    return None


def changed(argument):
    if isinstance(argument, Tensor) and argument.is_floating_point():
        places = torch.arange(argument.numel()).view(argument.shape)
        return argument.detach() * 1.3 + 0.1 * places.to(argument)
    if isinstance(argument, float):
        return 1.37 * argument + 0.01
    return None


def always(trial, wrong):
    """One and the same result for every case."""
    values = [g.value for g in trial.got]
    if len(values) < 2 or any(g.error for g in trial.got):
        return None
    if all(engine.difference(values[0], v, 1e-12, True) is None for v in values[1:]):
        return "the same result for every case", "Your result does not depend on the arguments."
    return None


def one_word(trial, wrong):
    """Of results that are words or truth values: what is mistaken for what."""
    confused = set()
    for i in wrong:
        expected, got = trial.expected[i].value, trial.got[i].value
        if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
            pairs = [(k, got[k]) for k in expected if expected[k] != got[k]]
            if not pairs or not all(isinstance(v, str) for v in expected.values()):
                return None
            return "{}: {!r}".format(*pairs[0]), "Work this one out with numbers of your own."
        if not isinstance(expected, (str, bool)) or type(expected) is not type(got):
            return None
        confused.add((expected, got))
    if len(confused) != 1:
        return None
    expected, got = confused.pop()
    return f"{got!r} where it is {expected!r}", "Only these two are confused: what tells them apart?"


def factor(trial, wrong):
    """Off by the same factor, or by the same term, in every number of every case."""
    expected, got = [], []
    for e, g in zip(trial.expected, trial.got):
        if g.error or not all(isinstance(o.value, (Tensor, int, float)) for o in (e, g)):
            return None
        a, b = torch.as_tensor(e.value), torch.as_tensor(g.value)
        if a.shape != b.shape or not finite(e.value) or not finite(g.value):
            return None
        expected.append(a.double().flatten())
        got.append(b.double().flatten())
    a, b = torch.cat(expected), torch.cat(got)
    if len(a) < 3:
        return None
    nonzero = a.abs() > 1e-9
    ratios = b[nonzero] / a[nonzero]
    if len(ratios) > 2 and torch.allclose(ratios, ratios[:1], rtol=1e-5) and not b[~nonzero].any():
        return "a constant factor", f"Your result is {ratios[0]:.5g} times the right one, in all cases."
    if torch.allclose(b - a, (b - a)[:1], rtol=1e-5):
        return "a constant is added", f"Your result is off by {(b - a)[0]:.5g}, in all cases."
    return None


def part(trial, wrong):
    """Of several values some are right in all cases."""
    bad, size = set(), set()
    for expected, got in zip(trial.expected, trial.got):
        right, mine = (
            dict(enumerate(o.value)) if isinstance(o.value, list) else o.value
            for o in (expected, got)
        )
        if not isinstance(right, dict) or not isinstance(mine, dict) or set(right) != set(mine):
            return None
        size.add(len(right))
        bad |= {k for k in right if engine.difference(right[k], mine[k], trial.tolerance)}
    if len(size) != 1 or not bad or len(bad) == size.pop() or len(bad) > 3:
        return None
    names = " and ".join(repr(k) if isinstance(k, str) else f"value {k + 1}" for k in sorted(bad))
    return f"{names} alone", "All other values are right, in every case."


FORMS = (
    "your code raised TypeError", "expected the shape", "expected a tensor", "expected torch",
    "expected a number", "expected a whole", "expected a str", "expected a dict",
    "your function returns None", "your dictionary has",
)  # fmt: skip


def fits_another(trial, wrong):
    """The shape or the number of entries is wrong everywhere."""
    for i in wrong:
        said = engine.complaint(trial.expected[i], trial.got[i], trial.tolerance, trial.names)
        if not said.startswith(FORMS) and " values, got" not in said:
            return None
    return "another form of result", "Look at what the task asks for: how many numbers, in which shape?"


SYMPTOMS = (leaf_changed, overflow, overlooked, detached, unused, always, one_word, factor, part, fits_another)
