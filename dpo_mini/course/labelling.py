"""The labelling page: two texts, five keys, and a file that has every verdict at once.

It is made of plain widgets, without a script of its own, so that it works wherever widgets do:
JupyterLab, Notebook, VS Code, Voila.
"""

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from dpo_mini.course import labels as people
from dpo_mini.course.widgets import pair_to_label
from dpo_mini.data import DataError, PreferencePair

KEYS = {"1": "left", "2": "right", "3": "tie", "4": "skip", "0": "undo"}
SAID = {"left": "left", "right": "right", "tie": "can't tell", "skip": "skip", "undo": "undo"}
LEAST_SECONDS = 0.25  # faster than anyone reads: the key was meant for the pair before


class Page(NamedTuple):
    """What `labelling_page` makes."""

    box: object  # the widgets, to be displayed
    shown: list[people.Showing]  # what is shown, in this order
    labels: list[people.Label]  # those given so far; it grows and shrinks as keys are pressed
    press: Callable[[str], None]  # a key of KEYS: what a button and the keyboard call


def labelling_page(
    pairs: Sequence[PreferencePair], path, question: str = "Which one do you prefer?",
    every: int = 6, apart: int = 8, seed: int = 0, least_seconds: float = LEAST_SECONDS,
) -> Page:  # fmt: skip
    """A page that shows `pairs` one by one and saves each verdict in the file `path` at once.

    Keys: 1 left, 2 right, 3 can't tell, 4 skip, 0 undo, typed into the page's box, or the same
    buttons. Sides are drawn by `seed` and recorded; `every` and `apart` say how pairs are repeated
    (`labels.showings`). A page that is opened again on the same pairs, file and seed goes on where
    it was. The pairs that the verdicts decide are in `labels.pairs_file(path)`. Raises DataError
    where the file holds labels of other pairs.
    """
    shown = people.showings(pairs, every, apart, seed)
    given = people.resumed(path, pairs, shown)
    view, state = page_widgets(), {"since": 0.0}

    def draw(said: str = "") -> None:
        done = len(given) == len(shown)
        view.text.value = (
            finished(given, path) if done else two_texts(given, shown, pairs, question)
        )
        view.said.value = f"<p role='status'>{escape(said)}&nbsp;</p>"
        for key, button in view.buttons.items():
            button.disabled = not given if key == "0" else done
        state["since"] = time.monotonic()

    def press(key: str) -> None:
        new, said = next_labels(key, time.monotonic() - state["since"])
        if new is None:
            view.said.value = f"<p role='status'>{escape(said)}</p>"
            return
        try:
            if people.read_labels(path) != given:
                raise DataError(f"{path} was changed by another page. Run this cell again.")
            people.save_labels(path, new, pairs)
        except (OSError, DataError) as error:
            view.said.value = f"<p role='status'>Nothing was saved: {escape(str(error))}</p>"
            return
        given[:] = new
        draw(said)

    def next_labels(key: str, seconds: float) -> tuple[list[people.Label] | None, str]:
        """The labels after a key, and what to say; None where the key does nothing."""
        verdict = KEYS.get(key)
        if verdict is None:
            return None, f"The key {key!r} does nothing. Keys: {explained()}."
        if verdict == "undo":
            return (given[:-1], "The last verdict is undone.") if given else (None, "None to undo.")
        if len(given) == len(shown):
            return None, "All pairs are labelled."
        if seconds < least_seconds:
            return None, "That was too fast to have been read. Press the key again."
        label = people.label(pairs, shown[len(given)], verdict, seconds)
        return [*given, label], f"Saved: {SAID[verdict]}."

    def typed(change) -> None:
        before, now = change["old"], change["new"]
        if now.startswith(before) and now != before:
            press(now[len(before)])  # of several keys at once the others were pressed unseen

    view.keyboard.observe(typed, "value")
    for key, button in view.buttons.items():
        button.on_click(lambda _, key=key: press(key))
    draw(f"{len(given)} verdicts were here already." if given else "")
    return Page(view.box, shown, given, press)


class View(NamedTuple):
    box: object
    text: object
    said: object
    keyboard: object
    buttons: dict[str, object]


def page_widgets() -> View:
    """The page's widgets, empty: the texts, what was done last, the keyboard's box, the buttons."""
    import ipywidgets as ipw

    text, said = ipw.HTML(), ipw.HTML()
    keyboard = ipw.Text(
        placeholder="type here", description="keys", continuous_update=True,
        layout={"width": "640px"},
    )  # fmt: skip
    keyboard.tooltip = f"Keys: {explained()}"  # read out by screen readers
    buttons = {k: ipw.Button(description=f"{k} · {SAID[verdict]}") for k, verdict in KEYS.items()}
    box = ipw.VBox([text, keyboard, ipw.HBox(list(buttons.values())), said])
    return View(box, text, said, keyboard, buttons)


def explained() -> str:
    return ", ".join(f"{key} {SAID[verdict]}" for key, verdict in KEYS.items())


def two_texts(given, shown, pairs, question: str) -> str:
    """The next showing, HTML."""
    now = shown[len(given)]
    return pair_to_label(
        pairs[now.item], len(given) + 1, len(shown), now.first_is_left, question=question
    )


def finished(given: Sequence[people.Label], path) -> str:
    """What stands on the page when all is labelled, HTML."""
    first, second = people.repeated(given)
    same = sum(a == b for a, b in zip(first, second))
    return (
        f"<p>Done: {len(given)} verdicts, in <code>{escape(Path(path).name)}</code>. "
        f"Of {len(first)} repeated pairs you said the same of {same}.</p>"
    )
