"""The command line: a verb for each stage, thin layers over what the notebooks call."""

import argparse
import json
import os
import sys
from functools import cache

# Only light modules here: --help answers at once, and torch is loaded by the verb that needs it.
from dpo_mini.console import one_line, printable
from dpo_mini.data import DataError
from dpo_mini.hub import HubError
from dpo_mini.options import add_options, options_of
from dpo_mini.outputs import is_main_process
from dpo_mini.settings import SettingsError, TrainingError
from dpo_mini.verbs import VERBS

DESCRIPTION = """\
Direct Preference Optimization, small enough to read.

Start with `dpo-mini demo`: in a few minutes on a laptop's CPU, and with no network, a small model
that writes movie reviews learns to write positive ones. The verbs below are its stages, and take
other models and data by name:

  sft -> pairs -> train -> evaluate -> sample
"""


def main(argv=None) -> int:
    """Run a command line; returns 0, 1 after an error told in a sentence, 130 after Ctrl-C.

    A command line that cannot be read ends with SystemExit(2), as argparse does.
    """
    given = vars(parser().parse_args(argv))
    name = given.pop("verb")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice stays off the screen
    try:
        options = options_of(VERBS[name], given)
        result = options.run()
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped.'}", file=sys.stderr)
        return 130
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"dpo-mini {name}: {printable(one_line(said), sys.stderr.encoding)}", file=sys.stderr)
        return 1
    if options.json and is_main_process():
        print(json.dumps(result, indent=1))
    return 0


def sentence(error: Exception) -> str | None:
    """What to tell about an error that a user can mend; None for a fault of ours."""
    if isinstance(error, DataError | HubError | SettingsError | TrainingError):
        return str(error)
    if isinstance(error, OSError):  # with a number it is the system's, without one it is ours
        return f"{error}." + " What was written before is unharmed." * (error.errno is not None)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "the memory is not enough. Ask for fewer things at once: a smaller --micro-batch-size, "
            "fewer --samples or a smaller model. What was written before is unharmed."
        )
    return None


class Parser(argparse.ArgumentParser):
    """An argparse parser that tells a mistake in a sentence, without the list of all options."""

    def error(self, message):
        said = printable(one_line(message), sys.stderr.encoding)
        self.exit(2, f"{self.prog}: {said}. See {self.prog} --help.\n")


@cache
def parser() -> argparse.ArgumentParser:
    top = Parser(
        "dpo-mini", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        said = " ".join(verb.__doc__.split())
        add_options(verbs.add_parser(name, help=said, description=said), verb)
    return top
