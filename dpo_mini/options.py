"""Options of the command line as dataclasses: a field is an option, checked where it is made.

A verb of the command line is a dataclass of its options. `--help`, the parsing and the checks are
all made from the fields, so that an option is written down once.
"""

import argparse
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from types import UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from dpo_mini.settings import SettingsError, TrainingConfig

LARGE = 10**9  # nobody means a count beyond this


def option(default, help: str, **more):
    """A dataclass field that is an option.

    `more`: `above`, `at_least`, `at_most` bound a number (a count is 1 to a billion by itself);
    `metavar` names the value in the help; `required` for an option that must be given.
    """
    return field(default=default, metadata={"help": help, **more})


# A verb is written like this; `dpo-mini greet --times 2` then calls `Greet(times=2).run()`:
#
#     @dataclass(frozen=True, kw_only=True)
#     class Greet(Options):
#         """greet somebody"""                                  the verb's line in --help
#         times: int = option(1, "how often", at_most=9)        --times N, checked: 1 to 9
#         def run(self) -> dict: ...                            what --json prints


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb takes. Raises SettingsError for a value that no verb could use."""

    json: bool = option(False, "print the result as JSON and nothing else")
    seed: int = option(0, "of sampling and of the order of the data", at_least=0, at_most=2**31 - 1)

    def __post_init__(self):
        for f in fields(self):
            values = getattr(self, f.name)
            for value in values if isinstance(values, tuple) else (values,):
                check(flag(f.name), value, f.metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """The options that are the fields of `TrainingConfig`, for the verbs that train."""

    resume: bool = option(False, "go on with the run in --output")
    settings: dict = field(default_factory=dict, metadata={"options_of": TrainingConfig})
    DEFAULTS: ClassVar[dict] = {}  # where a verb's differ from TrainingConfig's
    DERIVED: ClassVar[dict] = {}  # what a verb finds by itself where it is not given: in words
    WITHOUT: ClassVar = ("monitor_every",)  # settings that would change nothing

    def __post_init__(self):
        super().__post_init__()
        self.config()

    def config(self, **derived) -> TrainingConfig:
        """The settings: as given; else as the verb derives them; else the verb's defaults.

        A warm-up that was not given takes half of the steps at most: a longer one would end before
        the learning rate is reached.
        """
        config = TrainingConfig(
            **{**self.DEFAULTS, **derived, **self.settings, "seed": self.seed}
        )
        if "warmup_steps" in self.settings:
            return config
        return replace(config, warmup_steps=min(config.warmup_steps, config.steps // 2))


def check(name: str, value, bounds) -> None:
    """Raise SettingsError for a number out of its bounds, or a text that no file could hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise SettingsError(f"{name} must be text, got {value!r}: half a character.") from None
        if "\0" in value:
            raise SettingsError(f"{name} must be text, got {value!r}: it holds a NUL character.")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not math.isfinite(value):
        raise SettingsError(f"{name} must be a finite number, got {value}.")
    if "above" in bounds and not value > bounds["above"]:
        raise SettingsError(f"{name} must be above {bounds['above']}, got {value}.")
    least = bounds.get("at_least", 1 if isinstance(value, int) else -math.inf)
    if not value >= least:
        raise SettingsError(f"{name} must be at least {least}, got {value}.")
    most = bounds.get("at_most", LARGE)
    if not value <= most:
        raise SettingsError(f"{name} must be at most {most}, got {value}.")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, verb: type[Options]) -> None:
    """An option of the parser for each field of the dataclass; what is not given stays unset."""
    hints = get_type_hints(verb)
    for f in fields(verb):
        if "options_of" not in f.metadata:
            default = None if f.default is MISSING else f.default
            add_option(parser, f.name, hints[f.name], default, f.metadata["help"], f.metadata)
            continue
        config = f.metadata["options_of"]
        kinds, left_out = get_type_hints(config), {*verb.WITHOUT, "seed"}  # --seed is there
        for g in fields(config):
            if g.name not in left_out:
                default = {g.name: g.default, **verb.DEFAULTS, **verb.DERIVED}[g.name]
                kind = bool | None if kinds[g.name] is bool else kinds[g.name]
                add_option(parser, g.name, kind, default, g.metadata["help"], {})


def add_option(parser, name, kind, default, help, more) -> None:
    given = {"dest": name, "default": argparse.SUPPRESS}
    if default not in (None, "", ()) and not isinstance(default, bool):
        help += f" (default: {default})"
    given["help"] = help.replace("%", "%%")
    if get_origin(kind) is tuple:
        given |= {"action": "append", "metavar": more.get("metavar", "TEXT")}
    elif kind is bool:
        given["action"] = "store_true"
    elif kind == bool | None:
        given["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        given["choices"] = get_args(kind)
    else:
        if get_origin(kind) in (Union, UnionType):  # int | None: None is "not given"
            kind = get_args(kind)[0]
        metavar = {int: "N", float: "X"}.get(kind, "NAME")
        given |= {"type": kind, "metavar": more.get("metavar", metavar)}
    parser.add_argument(flag(name), required=more.get("required", False), **given)


def options_of(verb: type[Options], given: dict) -> Options:
    """The verb's options from those given on the command line. Raises SettingsError."""
    names = {f.name for f in fields(verb)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
    settings = {k: v for k, v in given.items() if k not in names}
    return verb(**values, **({"settings": settings} if settings else {}))
