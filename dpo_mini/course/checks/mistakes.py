"""The mistakes that nobody has to write down: they are derived from an exercise's right answers.

Three sources, in this order: the result is changed (its sign, half of it, its logarithm, ...), an
argument is changed before the call (beta is 1, two arguments are swapped, the mask is rolled, ...),
or the text of a right answer is changed in one place (a sign, a factor, a comparison, a slice, ...).
Each has a name and a hint that speak of the learner's own arguments.
"""

import ast
import copy
import itertools
import math
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor


class Mistake(NamedTuple):
    name: str
    answer: Callable
    hint: str


def derived(exercise, case: tuple, names: list[str]) -> Iterator[Mistake]:
    """All of them for an exercise; `case` shows the types of its arguments, `names` names them."""
    right = guarded(exercise.right[0] if exercise.right else exercise.truth)
    yield from results(right, case, names)
    yield from arguments(right, case, names)
    for answer in exercise.right:
        yield from slips(answer, names)


def short_range(*bounds) -> range:
    """A range that no mistake can make endless."""
    steps = range(*bounds)
    if len(steps) > 20_000:
        raise OverflowError("too many steps")
    return steps


def guarded(function: Callable) -> Callable:
    """The function with loops that end soon, whatever its arguments."""
    if not isinstance(function, types.FunctionType):
        return function
    space = {**function.__globals__, "range": short_range}
    return types.FunctionType(function.__code__, space, None, function.__defaults__, function.__closure__)


# --- the result is changed ---


def dispatch(name: str, x):
    """exp, log or sqrt of a number, a tensor or an expression."""
    home = torch if isinstance(x, Tensor) else sympy if isinstance(x, sympy.Basic) else math
    return getattr(home, name)(x)


def narrowed(x):
    """Through float32 and back, as a tensor that was made without a dtype."""
    if isinstance(x, Tensor):
        return x.float().to(x.dtype) if x.is_floating_point() else x.float()
    return torch.tensor(float(x), dtype=torch.float32).item()


ANY = (  # name, change, hint
    ("minus the result", lambda x: -x, "The size is right, the sign is not: which way should it go?"),
    ("zero", lambda x: 0 * x, "That is right only where nothing differs: work out the example by hand."),
    ("half", lambda x: x / 2, "It is half of what it should be: check the example for a factor that is too much."),
    ("twice", lambda x: 2 * x, "It is twice what it should be: is something counted twice, or a division forgotten?"),
    ("the exponential of the result", partial(dispatch, "exp"), "The task asks for the logarithm of this, or for the number without an exponential."),
    ("the logarithm of the result", partial(dispatch, "log"), "The task asks for the number itself, not for its logarithm."),
    ("the square root of the result", partial(dispatch, "sqrt"), "The task asks for the number without a root: is yours the square root of it?"),
    ("the square of the result", lambda x: x * x, "One square is too many: in which unit is your result, and in which should it be?"),
    ("one divided by the result", lambda x: 1 / x, "Numerator and denominator are exchanged."),
    ("one minus the result", lambda x: 1 - x, "That is the share, or the probability, of the opposite."),
    ("the result without its sign", abs, "Where the right number is below 0, yours is above: the sign carries the meaning."),
    ("in percent", lambda x: 100 * x, "The task asks for a share, of which 1 is the whole."),
    ("in bits", lambda x: x / math.log(2), "The course counts in nats: take the natural logarithm."),
    ("one too many", lambda x: x + 1, "Yours is one too large everywhere: is something counted from 1, or counted twice?"),
    ("one too few", lambda x: x - 1, "Yours is one too small everywhere: is the first or the last one left out?"),
    ("rounded", lambda x: torch.round(x, decimals=3) if isinstance(x, Tensor) else round(x, 3), "Return the number as it is: rounding is for the reader, not for the next computation."),
    ("rounded down to a whole number", lambda x: x.floor() if isinstance(x, Tensor) else math.floor(x), "Something drops the fraction: floor, int or the operator //."),
    ("float32 in the middle", narrowed, "Equal to six digits: compute in float64. Where do you convert, or make a new tensor without a dtype?"),
    ("below 0 becomes 0", lambda x: x.clamp(min=0) if isinstance(x, Tensor) else max(x, 0 * x), "A result below 0 is possible here, and it means something: nothing may be cut off."),
)  # fmt: skip
TENSORS = (
    ("detached", lambda x: x.detach(), "The value is right, but no gradient flows back from it: something leaves the graph."),
    ("the sum of the result", lambda x: x.sum(), "Your function adds up what the task wants one by one: look at the shape asked for."),
    ("the mean of the result", lambda x: x.mean(), "Your function averages what the task wants one by one: look at the shape asked for."),
    ("the first dimension is summed away", lambda x: x.sum(0), "One dimension too many is added up: which one should stay?"),
    ("a dimension is kept", lambda x: x.unsqueeze(-1), "The numbers are right, but the shape has a dimension of size 1 too many."),
    ("a dimension in front", lambda x: x.unsqueeze(0), "The numbers are right, but the shape has a dimension of size 1 too many."),
    ("a dimension of size 1 is squeezed away", lambda x: x.squeeze(), "squeeze() without a dimension also removes the batch where there is only one. Name the dimension."),
    ("transposed", lambda x: x.transpose(-1, -2), "Rows and columns are exchanged."),
    ("in reverse order", lambda x: x.flip(-1), "These are the right numbers, in the opposite order."),
    ("sorted", lambda x: x.sort().values, "These are the right numbers, but not in the order that the task asks for."),
    ("of another type", lambda x: x.float() if not x.is_floating_point() else x.long(), "The numbers are right, but not their dtype: look at what the task asks for."),
    ("of booleans", lambda x: x.bool(), "The numbers are right, but not their dtype: look at what the task asks for."),
)  # fmt: skip
SEQUENCES = (
    ("in reverse order", lambda x: list(reversed(x)), "These are the right entries, in the opposite order."),
    ("sorted", sorted, "These are the right entries, but not in the order that the task asks for."),
    ("counted from 1", lambda x: [i + 1 for i in numbers(x)], "Python counts from 0: the first place of a list is 0."),
    ("the first entry is missing", lambda x: x[1:], "An entry is missing at the beginning: where does your loop or slice start?"),
    ("the last entry is missing", lambda x: x[:-1], "An entry is missing at the end: where does your loop or slice stop?"),
    ("only the first entry", lambda x: x[:1], "There are more entries than one: does your loop return too early?"),
    ("only the last entry", lambda x: x[-1:], "Only the last entry is left: is the list made anew inside the loop?"),
    ("nothing", lambda x: [], "Your result is empty: does your condition ever hold?"),
    ("a set, not a list", lambda x: sorted(set(x)), "Entries that occur more than once must stay as often as they occur."),
    ("every entry is the first one", lambda x: [x[0]] * len(x), "Every entry is its own case: does your loop change what it looks at?"),
)  # fmt: skip


def numbers(x):
    if not all(isinstance(i, (int, float)) and not isinstance(i, bool) for i in x):
        raise TypeError
    return x


def linear(expression: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """The first two terms of an expression's expansion at symbol = 0."""
    return expression.subs(symbol, 0) + symbol * sympy.diff(expression, symbol).subs(symbol, 0)


def results(right: Callable, case: tuple, names: list[str]) -> Iterator[Mistake]:
    """The right answer, its result changed as a whole or in one of its parts."""
    value = right(*case)
    scalars = [i for i, a in enumerate(case) if scalar(a)]
    sizes = [i for i, a in enumerate(case) if isinstance(a, (Tensor, list, tuple)) and numel(a)]

    def after(change, part=None, of=None):
        def answer(*given):
            result = right(*given)
            one = partial(change, given[of]) if of is not None else change
            return at_part(result, part, one)

        return answer

    parts: list = [None]
    if isinstance(value, (tuple, list, dict)):
        parts += list(value if isinstance(value, dict) else range(len(value)))[:8]
    for part in parts:
        label = "" if part is None else f" ({part!r})" if isinstance(part, str) else f" (value {part + 1})"
        inner = value if part is None else value[part]
        tables = ANY + (TENSORS if holds(inner, Tensor) else ())
        for name, change, hint in tables:
            yield Mistake(name + label, after(change, part), hint)
        for i in scalars:
            for word, change in (("multiplied", lambda a, x: x * a), ("divided", lambda a, x: x / a)):
                hint = f"Your result is the right one {word} by `{names[i]}`: does it enter once too often, or is it missing?"
                yield Mistake(f"{word} by {names[i]}" + label, after(change, part, i), hint)
        for i in sizes:
            for word, change in (("a sum for the mean", lambda a, x: x * numel(a)), ("a mean for the sum", lambda a, x: x / numel(a))):
                hint = f"Your result is off by the number of entries of `{names[i]}`: sum or mean, which does the task ask for?"
                yield Mistake(word + label, after(change, part, i), hint)
    for i in [i for i, a in enumerate(case) if isinstance(a, sympy.Symbol)]:
        hint = f"Your result is right only where `{names[i]}` is small: the task asks for it at any `{names[i]}`."
        yield Mistake(f"an approximation at small {names[i]}", lambda *g, i=i: linear(right(*g), g[i]), hint)
    if isinstance(value, list):
        for name, change, hint in SEQUENCES:
            yield Mistake(name, lambda *given, c=change: c(right(*given)), hint)
    if isinstance(value, tuple) and len(value) > 1:
        for i, j in itertools.combinations(range(len(value)), 2):
            hint = "These are the right values, in another order than the task asks for."
            yield Mistake(f"values {i + 1} and {j + 1} swapped", lambda *g, i=i, j=j: swap(right(*g), i, j), hint)
            hint = f"Value {j + 1} repeats value {i + 1}: they answer different questions."
            yield Mistake(f"value {j + 1} is value {i + 1}", lambda *g, i=i, j=j: put(right(*g), j, right(*g)[i]), hint)
    if isinstance(value, dict) and len(value) == 2:
        hint = "The two entries are exchanged."
        yield Mistake("the two entries are swapped", lambda *g: dict(zip(value, reversed(right(*g).values()))), hint)


def holds(value, kind) -> bool:
    if isinstance(value, (tuple, list)):
        return any(holds(v, kind) for v in value)
    return any(map(lambda v: holds(v, kind), value.values())) if isinstance(value, dict) else isinstance(value, kind)


def numel(a) -> int:
    return len(a) if isinstance(a, (list, tuple)) or a.dim() else 1


def scalar(a) -> bool:
    return isinstance(a, (int, float, sympy.Basic)) and not isinstance(a, bool)


def at_part(result, part, change):
    """The result with `change` at one part of it, or at every number in it. A dictionary comes back
    with the changed entry alone: the others are not what the mistake is about.
    """
    if isinstance(result, dict):
        return {k: at_part(v, None, change) for k, v in result.items() if part in (None, k)}
    if isinstance(result, (tuple, list)):
        return type(result)([
            at_part(v, None, change) if part in (None, i) else v for i, v in enumerate(result)
        ]) if not hasattr(result, "_fields") else tuple(at_part(tuple(result), part, change))  # fmt: skip
    if result is None or isinstance(result, (str, bool)):
        raise TypeError
    return change(result)


def swap(values, i, j):
    return put(put(values, i, values[j]), j, values[i])


def put(values, i, value):
    return tuple(value if k == i else v for k, v in enumerate(values))


# --- an argument is changed ---


def marks(a) -> bool:
    """Whether an argument is a mask."""
    return isinstance(a, Tensor) and not a.is_floating_point() and a.numel() > 0 and bool(((a == 0) | (a == 1)).all())


NUMBER = (
    ("{0} is left out", lambda a: 1 + 0 * a, "`{0}` has no effect where it should: with {0} = 1 your result would be right."),
    ("1/{0} for {0}", lambda a: 1 / a, "You divide by `{0}` where one multiplies, or the reverse: should the result grow with it?"),
    ("{0} twice", lambda a: a * a, "`{0}` enters once too often, as its square."),
    ("the root of {0}", lambda a: a**0.5, "`{0}` enters as its square root: is a square missing?"),
    ("minus {0}", lambda a: -a, "`{0}` has the wrong sign, or is subtracted where it should be added."),
    ("{0} is taken to be 0", lambda a: 0 * a, "`{0}` has no effect: with {0} = 0 your result would be right."),
    ("twice {0}", lambda a: 2 * a, "You use twice what the task calls `{0}`."),
    ("half of {0}", lambda a: a / 2, "You use half of what the task calls `{0}`."),
    ("1 - {0} for {0}", lambda a: 1 - a, "You use `1 - {0}` where `{0}` belongs."),
)  # fmt: skip
COUNT = (
    ("{0} + 1 for {0}", lambda a: a + 1, "You count one too many: what happens at the smallest `{0}`?"),
    ("{0} - 1 for {0}", lambda a: a - 1, "You count one too few: what happens at the smallest `{0}`?"),
)


def moved(a: Tensor, by: int) -> Tensor:
    """The entries `by` places later along the last dimension, with zeros moving in."""
    size = a.shape[-1] if a.dim() else 0
    return torch.nn.functional.pad(a, (by, -by)) if size > abs(by) else 0 * a


MASK = (
    ("{0} is one place late", lambda a: moved(a, 1), "`{0}` is used one place off: which entry belongs to which token?"),
    ("{0} is one place early", lambda a: moved(a, -1), "`{0}` is used one place off: which entry belongs to which token?"),
    ("{0} is all ones", torch.ones_like, "`{0}` says which places count, and yours counts them all."),
    ("{0} is inverted", lambda a: 1 - a if a.dtype != torch.bool else ~a, "You keep what `{0}` leaves out."),
    ("{0} is one place late", lambda a: a.roll(1, -1), "`{0}` is used one place off: which entry belongs to which token?"),
    ("{0} is one place early", lambda a: a.roll(-1, -1), "`{0}` is used one place off: which entry belongs to which token?"),
    ("{0} reaches back to the start", lambda a: a.flip(-1).cumsum(-1).flip(-1).clamp(max=1), "What comes before the first marked place of `{0}` must not count."),
    ("{0} reaches on to the end", lambda a: a.cumsum(-1).clamp(max=1), "What comes after the last marked place of `{0}` must not count."),
    ("the first marked place of {0} is lost", lambda a: a * (a.cumsum(-1) > 1), "The first place that `{0}` marks counts too."),
    ("the last marked place of {0} is lost", lambda a: a * (a.flip(-1).cumsum(-1).flip(-1) > 1), "The last place that `{0}` marks counts too."),
)  # fmt: skip
TENSOR = (
    ("{0} is left out", lambda a: 0 * a, "`{0}` does not enter where it should: as if it were 0."),
    ("minus {0}", lambda a: -a, "`{0}` is added where it should be subtracted, or the reverse."),
    ("the exponential of {0}", torch.exp, "`{0}` is a logarithm, or used like one: is an exponential too much?"),
    ("the logarithm of {0}", torch.log, "`{0}` is no logarithm yet, or a logarithm is taken twice."),
    ("{0} is detached", lambda a: a.detach(), "The value is right, but no gradient reaches `{0}`: something detaches it."),
    ("{0} without its sign", torch.abs, "An entry of `{0}` may be below 0, and its sign matters."),
    ("the mean of {0} for each entry", lambda a: a.mean().expand_as(a), "Each entry of `{0}` counts by itself: the mean comes too early."),
    ("{0} in reverse order", lambda a: a.flip(-1), "The entries of `{0}` are read in the opposite order."),
    ("{0} is sorted", lambda a: a.sort().values, "Sorting `{0}` alone breaks its order: what belongs to each entry?"),
    ("{0} is centred", lambda a: a - a.mean(), "A mean is subtracted from `{0}` that should stay in."),
    ("{0} in float32", lambda a: a.float(), "Equal to six digits: compute in float64. `{0}` passes through float32."),
    ("only the first entry of {0}", lambda a: a[:1].expand_as(a), "Every entry of `{0}` counts, not only the first."),
    ("only the last entry of {0}", lambda a: a[-1:].expand_as(a), "Every entry of `{0}` counts, not only the last."),
    ("{0} is one place late", lambda a: moved(a, 1), "`{0}` is used one place off: which entry belongs to which?"),
    ("{0} is one place early", lambda a: moved(a, -1), "`{0}` is used one place off: which entry belongs to which?"),
    ("rows and columns of {0} exchanged", lambda a: a.transpose(-1, -2), "Rows and columns of `{0}` are exchanged."),
)  # fmt: skip
LIST = (
    ("{0} in reverse order", lambda a: a[::-1], "`{0}` is read from its other end."),
    ("the first of {0} is left out", lambda a: a[1:], "The first entry of `{0}` does not count in yours."),
    ("the last of {0} is left out", lambda a: a[:-1], "The last entry of `{0}` does not count in yours."),
    ("only the first of {0}", lambda a: a[:1], "Only the first entry of `{0}` counts in yours: does the loop return too early?"),
    ("only the last of {0}", lambda a: a[-1:], "Only the last entry of `{0}` counts in yours: is something overwritten?"),
    ("{0} is sorted", sorted, "The order of `{0}` matters, or what belongs to each entry: sorting breaks it."),
    ("each of {0} counts once", lambda a: list(dict.fromkeys(a)), "What occurs twice in `{0}` counts twice."),
)  # fmt: skip


def table(a) -> tuple:
    if scalar(a):
        return NUMBER + (COUNT if isinstance(a, int) else ())
    if marks(a):
        return MASK
    if isinstance(a, Tensor):
        return TENSOR if a.is_floating_point() else ()
    return LIST if isinstance(a, list) else ()


def like(a, b) -> bool:
    """Whether two arguments could be taken for one another."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()
    return scalar(a) and scalar(b) or (type(a) is type(b) and not isinstance(a, Tensor))


def arguments(right: Callable, case: tuple, names: list[str]) -> Iterator[Mistake]:
    """The right answer, given changed arguments."""

    def before(changes: dict[int, Callable]):
        def answer(*given):
            return right(*(changes[i](given) if i in changes else a for i, a in enumerate(given)))

        return answer

    def one(change, i):
        return lambda given: change(given[i])

    def other(i):
        return lambda given: given[i]

    for i, a in enumerate(case):
        for name, change, hint in table(a):
            yield Mistake(name.format(names[i]), before({i: one(change, i)}), hint.format(names[i]))
    tensors = [i for i, a in enumerate(case) if isinstance(a, Tensor) and a.is_floating_point()]
    references = [i for i in tensors if "ref" in names[i]]
    for name, change in (("left out", lambda a: 0 * a), ("added", lambda a: -a)):
        hint = f"The reference is {name}: a log-ratio subtracts the reference's log-probability of the same text."
        yield Mistake(f"the reference is {name}", before({i: one(change, i) for i in references}), hint)
    hint = "Values are right, gradients are not: the arguments must stay in the graph."
    yield Mistake("all arguments are detached", before({i: one(torch.detach, i) for i in tensors}), hint)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(case)), 2) if like(case[i], case[j])]
    for i, j in pairs:
        a, b = names[i], names[j]
        hint = f"Where `{a}` belongs stands `{b}`, and the reverse: check the order of the arguments."
        yield Mistake(f"{a} and {b} swapped", before({i: other(j), j: other(i)}), hint)
        for this, that in ((i, j), (j, i)):
            hint = f"`{names[that]}` is used where `{names[this]}` belongs; `{names[this]}` does not enter at all."
            yield Mistake(f"{names[that]} for {names[this]}", before({this: other(that)}), hint)
    for (i, j), (k, l) in itertools.combinations(pairs, 2):
        if len({i, j, k, l}) == 4:
            hint = f"`{names[i]}` and `{names[j]}` are exchanged, and `{names[k]}` and `{names[l]}` too."
            swapped = {i: other(j), j: other(i), k: other(l), l: other(k)}
            yield Mistake(f"{names[i]}, {names[k]} swapped with {names[j]}, {names[l]}", before(swapped), hint)


# --- the text of a right answer is changed in one place ---

HINTS = {
    "a sign is the other way round": "One plus and minus are confused{0}: test each term's sign with numbers of your own.",
    "multiplied for divided": "Somewhere you multiply where one divides, or the reverse{0}: should the result grow or shrink with it?",
    "a part is left out": "One term or factor is missing{0}: put your formula beside the task's, part by part.",
    "a part stands alone": "A whole part of the formula is missing{0}: what remains is right.",
    "upside down": "A difference or a quotient is the wrong way round{0}: which of the two comes first?",
    "the edge": "Only exact equality is treated wrongly{0}: does the task say 'at least' or 'more than'?",
    "a comparison is the wrong way round": "A comparison points the wrong way{0}: try it with one small and one large number.",
    "and for or": "Two conditions are joined wrongly{0}: must both hold, or is one enough?",
    "a condition is missing": "One condition is missing, or never asked{0}: go through the task's cases one by one.",
    "a step is left out": "The step `{1}` is missing{0}: what does it do to the numbers, and why does the task need it?",
    "another function": "One function is not the right one{0}: does the task say {2}?",
    "a number is off": "A number in your formula is off, by one, by a factor, or of the wrong sign{0}: check every constant.",
    "the divisor is off by one": "You divide by one too many or one too few{0}: what is counted there?",
    "n (n - 1) for a square": "The square has become a product of two neighbours{0}: here the same number is multiplied with itself.",
    "the maximum of each part": "The parts have their maximum in different entries{0}: add up first, then take the maximum.",
    "a slice is cut otherwise": "A slice or an index takes one entry too many, too few, or others{0}: write down what it takes for a list of 3.",
    "one argument for another": "One name stands where another belongs{0}: read your formula once more, name by name.",
    "detached in one place": "The value is right, but part of the gradient is missing{0}: something detaches it there.",
    "an option is missing": "A function is called without an option that it needs{0}: look at its documentation, and at the dimension.",
}  # fmt: skip
SWAPS = {
    "mean": "sum", "sum": "mean", "max": "min", "min": "max", "amax": "amin", "amin": "amax",
    "argmax": "argmin", "argmin": "argmax", "floor": "ceil", "ceil": "floor", "any": "all",
    "all": "any", "log_softmax": "softmax", "logsigmoid": "sigmoid", "sigmoid": "logsigmoid",
    "exp": "log", "log": "exp", "fsum": "fmean", "fmean": "fsum", "var": "std", "std": "var",
    "mul": "add", "add": "mul", "cumsum": "cumprod", "median": "mean", "square": "abs",
    "abs": "square", "sqrt": "square", "len": "sum", "sub": "add", "maximum": "minimum",
    "minimum": "maximum",
}  # fmt: skip
EDGES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
TURNS = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip


@cache
def module_tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def node_of(function: Callable) -> ast.FunctionDef | ast.Lambda | None:
    """The syntax tree of a function; None where there is none, or where it needs a closure."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or not Path(code.co_filename).exists():
        return None
    found = []
    for node in ast.walk(module_tree(code.co_filename)):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            found += [node] if node.lineno == code.co_firstlineno else []
        elif isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
            same = compile(ast.Expression(node), "", "eval").co_consts[0]
            found += [node] if same.co_code == code.co_code and same.co_consts == code.co_consts else []
    return found[0] if found else None


def built(node, function: Callable) -> Callable:
    """A function from its changed tree, in the module where it was written."""
    space = {**function.__globals__, "range": short_range}
    if isinstance(node, ast.Lambda):
        return eval(compile(ast.Expression(node), "<derived>", "eval"), space)
    exec(compile(ast.Module([node], []), "<derived>", "exec"), space)
    return space[node.name]


def slips(function: Callable, names: list[str]) -> Iterator[Mistake]:
    """The function with one place of its text changed, for each place and each change."""
    for kind, before, node, _ in changes(function):
        own = [a.arg for a in node.args.args]
        used = {n.id for n in ast.walk(before) if isinstance(n, ast.Name)}
        which = [names[i] for i, name in enumerate(own[: len(names)]) if name in used]
        where = f" where {' and '.join(f'`{w}`' for w in which[:3])} come{'s' * (len(which) == 1)} in" if which else ""
        step = called(before) or "?"
        name = f"{kind}: {step}" if kind == "a step is left out" else kind + where
        hint = HINTS[kind].format(where, step, f"`{step}` or `{SWAPS.get(step, step)}`")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = built(node, function)
        except (SyntaxError, ValueError, TypeError):
            continue
        yield Mistake(name, answer, hint)


def changes(function: Callable) -> Iterator[tuple[str, ast.AST, Any, ast.AST]]:
    """(kind, what stood there, the whole tree with the change in it, what stands there now)."""
    node = node_of(function)
    if node is None:
        return
    own = [a.arg for a in node.args.args]
    yield from everywhere(node)
    for holder, field, index, child in list(slots(node)):
        for kind, new in replacements(child, own):
            new = ast.fix_missing_locations(ast.copy_location(copy.deepcopy(new), child))
            put_node(holder, field, index, new)
            try:
                yield kind, child, node, new
            finally:  # the tree is shared: also when nobody asks for the next one
                put_node(holder, field, index, child)


def everywhere(node) -> Iterator[tuple]:
    """Changes of a number that stands in several places, in all of them."""
    found: dict = {}
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and type(child.value) is float:
            found.setdefault(child.value, []).append(child)
    for value, places in found.items():
        for _, new in of_constant(places[0]) if len(places) > 1 else ():
            for place in places:
                place.value = new.value
            try:
                yield "a number is off", places[0], node, new
            finally:
                for place in places:
                    place.value = value


def put_node(holder, field, index, node):
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


def slots(node) -> Iterator[tuple]:
    """Every place of a tree where an expression or a statement stands. What is repeated by `while`
    is left alone, so that no change can run for ever.
    """
    for field, value in ast.iter_fields(node):
        if isinstance(node, ast.While) or field in ("decorator_list", "annotation", "returns", "args") and not isinstance(node, ast.Call):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                if isinstance(child, (ast.expr, ast.If)):
                    yield node, field, index, child
                yield from slots(child)


def called(node) -> str | None:
    if isinstance(node, ast.Call):
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    return {ast.USub: "minus", ast.Not: "not"}.get(type(getattr(node, "op", None)))


def replacements(node, own: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """What a learner may have written in a node's place."""
    kinds = {ast.BinOp: of_operation, ast.UnaryOp: of_sign, ast.Compare: of_comparison, ast.BoolOp: of_logic,
             ast.Call: of_call, ast.Constant: of_constant, ast.Subscript: of_subscript}  # fmt: skip
    yield from kinds.get(type(node), lambda node: ())(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in own:
        yield "detached in one place", ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])
        for other in own:
            if other != node.id:
                yield "one argument for another", ast.Name(other, ast.Load())
    if isinstance(node, ast.IfExp):
        yield "a condition is missing", node.body
        yield "a condition is missing", node.orelse
    if isinstance(node, ast.If):
        yield "a condition is missing", ast.If(ast.Constant(True), node.body, node.orelse)
        yield "a condition is missing", ast.If(ast.Constant(False), node.body, node.orelse)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
        for i, loop in enumerate(node.generators):
            if loop.ifs:
                bare = ast.comprehension(loop.target, loop.iter, [], 0)
                loops = [*node.generators[:i], bare, *node.generators[i + 1 :]]
                yield "a condition is missing", type(node)(node.elt, loops)


def of_operation(node):
    a, b = node.left, node.right
    signs, factors = {ast.Add: ast.Sub, ast.Sub: ast.Add}, {ast.Mult: ast.Div, ast.Div: ast.Mult}
    if type(node.op) in signs:
        yield "a sign is the other way round", ast.BinOp(a, signs[type(node.op)](), b)
    if type(node.op) in factors:
        yield "multiplied for divided", ast.BinOp(a, factors[type(node.op)](), b)
    if isinstance(node.op, ast.Mult):
        yield "multiplied for divided", ast.BinOp(b, ast.Div(), a)
    if isinstance(node.op, (ast.Sub, ast.Div)):
        yield "upside down", ast.BinOp(b, node.op, a)
    if isinstance(node.op, ast.FloorDiv):
        yield "another function", ast.BinOp(a, ast.Div(), b)
    if isinstance(node.op, ast.Div):
        for sign in (ast.Add(), ast.Sub()):
            yield "the divisor is off by one", ast.BinOp(a, node.op, ast.BinOp(b, sign, ast.Constant(1)))
    if isinstance(node.op, ast.Pow) and getattr(b, "value", None) == 2:
        for sign in (ast.Add(), ast.Sub()):
            yield "n (n - 1) for a square", ast.BinOp(a, ast.Mult(), ast.BinOp(a, sign, ast.Constant(1)))
    yield "a part is left out", a
    yield "a part stands alone", b
    if isinstance(node.op, (ast.Sub, ast.Div)):
        one = ast.Constant(1 if isinstance(node.op, ast.Div) else 0)
        yield "a part stands alone", ast.BinOp(one, node.op, b)


def of_sign(node):
    yield "a sign is the other way round" if isinstance(node.op, ast.USub) else "a step is left out", node.operand


def of_comparison(node):
    for table, kind in ((EDGES, "the edge"), (TURNS, "a comparison is the wrong way round")):
        for i, op in enumerate(node.ops):
            if type(op) in table:
                ops = [*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]]
                yield kind, ast.Compare(node.left, ops, node.comparators)
    if len(node.ops) == 2:
        yield "a condition is missing", ast.Compare(node.left, node.ops[:1], node.comparators[:1])
        yield "a condition is missing", ast.Compare(node.comparators[0], node.ops[1:], node.comparators[1:])


def of_logic(node):
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "and for or", ast.BoolOp(other, node.values)
    for i in range(len(node.values)):
        rest = node.values[:i] + node.values[i + 1 :]
        yield "a condition is missing", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def of_call(node):
    name = called(node)
    if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in ("torch", "math", "F", "sympy"):
        if not isinstance(node.func.value, ast.Attribute):
            yield "a step is left out", node.func.value
    for argument in node.args[:3]:
        if not isinstance(argument, (ast.Constant, ast.Starred)):
            yield "a step is left out", argument
    if name in ("max", "min") and isinstance(node.args[0] if node.args else None, ast.GeneratorExp):
        entries = node.args[0]
        if isinstance(entries.elt, ast.BinOp):
            parts = (entries.elt.left, entries.elt.right)
            each = [ast.Call(node.func, [ast.GeneratorExp(p, entries.generators)], []) for p in parts]
            yield "the maximum of each part", ast.BinOp(each[0], entries.elt.op, each[1])
    if name in SWAPS:
        other = SWAPS[name]
        func = ast.Attribute(node.func.value, other, ast.Load()) if isinstance(node.func, ast.Attribute) else ast.Name(other, ast.Load())
        yield "another function", ast.Call(func, node.args, node.keywords)
    for i in range(len(node.keywords)):
        yield "an option is missing", ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if len(node.args) > 1:
        for i in range(len(node.args)):
            yield "an option is missing", ast.Call(node.func, node.args[:i] + node.args[i + 1 :], node.keywords)
    elif node.args and isinstance(node.func, ast.Attribute):
        yield "an option is missing", ast.Call(node.func, [], node.keywords)


def of_constant(node):
    if isinstance(node.value, bool):
        yield "a condition is missing", ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        x = node.value
        quantiles = (1.0, 1.645, 2.0, 2.576) if abs(x - 1.96) < 1e-3 else ()
        for new in dict.fromkeys((x + 1, x - 1, -x, 2 * x, x / 2, 0, x * x, *quantiles)):
            if new != x and not (isinstance(x, int) and new != int(new)):
                yield "a number is off", ast.Constant(int(new) if isinstance(x, int) else new)


def of_subscript(node):
    yield "a slice is cut otherwise", node.value
    inner = node.slice
    if isinstance(inner, ast.Slice):
        low, high = inner.lower, inner.upper
        one, last = ast.Constant(1), ast.UnaryOp(ast.USub(), ast.Constant(1))
        for new in ((None, last), (one, None), (None, None), (high, low), (low, None), (None, high)):
            if new != (low, high):
                yield "a slice is cut otherwise", ast.Subscript(node.value, ast.Slice(*new), node.ctx)
