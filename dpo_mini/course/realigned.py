"""One policy's text at any beta: the words that a strength draws, coloured by how it shifted them.

`shown` samples and measures a text, `picture` draws texts as one SVG, and `explore_strength` puts a
prompt and a slider on top of the two.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from typing import NamedTuple

from dpo_mini.course.dashboard import shade
from dpo_mini.course.svg import DARKER, FONT, GREY, INK, PAPER
from dpo_mini.data import DataError
from dpo_mini.evaluation import token_shifts
from dpo_mini.models import prompt_prefix
from dpo_mini.sampling import sample_mixture
from dpo_mini.tokens import completion_text

MAX_NEW_TOKENS = 32
FULL_COLOUR = 3.0  # nats: a shift at which the colour is full
LINE_FROM = 0.5  # nats: a shift from which a word is underlined
WIDTH, MARGIN, LINE, LETTER = 720, 16, 26, 8.4  # pixels; a letter of 14 pixels is 8.4 wide
MONO = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"


class Shown(NamedTuple):
    """A text, and what is known of it."""

    prompt: str
    strength: float
    words: list[tuple[str, float]]  # each with its log-ratio to the reference, in nats
    positive: float  # P(positive) of prompt and text
    kl: float  # of the tokens' distributions, summed over this text, nats


def shown(
    policy, reference, tokenizer, reward, prompt: str, strength: float, seed: int = 0
) -> Shown:
    """One completion by the mixture of this strength; with one seed all strengths share the random
    numbers, so that a word changes only where its probabilities moved past the number.
    """
    ((completion,),) = sample_mixture(
        policy, reference, tokenizer, [prompt_prefix(policy) + prompt], strength,
        max_new_tokens=MAX_NEW_TOKENS, seed=seed,
    )  # fmt: skip
    shifts = token_shifts(policy, reference, completion, strength)
    log_ratios = (shifts.logps - shifts.reference_logps).tolist()
    words = grouped(pieces(tokenizer, completion), log_ratios)
    positive = reward([completion.full_text]).sigmoid().item()
    return Shown(prompt, strength, words, positive, shifts.kl.sum().item())


def pieces(tokenizer, completion) -> list[str]:
    """The text that each token of a completion adds; of EOS it is " ■"."""
    prompt_ids, ids = completion.prompt_ids, completion.ids
    texts = [completion_text(tokenizer, prompt_ids, ids[:k]) for k in range(len(ids) + 1)]
    ends = [" ■" if token == tokenizer.eos_token_id else "" for token in ids]
    return [after[len(before) :] + end for before, after, end in zip(texts, texts[1:], ends)]


def grouped(tokens: Sequence[str], values: Sequence[float]) -> list[tuple[str, float]]:
    """Tokens joined into words, which begin where white space does, with the sums of their values.

    >>> grouped([" fun", "ny", " film"], [0.5, 0.25, -1.0])
    [('funny', 0.75), ('film', -1.0)]
    """
    words: list[list] = []
    for token, value in zip(tokens, values):
        if not words or token[:1].isspace():
            words.append(["", 0.0])
        words[-1][0] += token
        words[-1][1] += value
    return [(" ".join(word.split()), value) for word, value in words if word.strip()]


def picture(texts: Sequence[Shown], beta: float | None = None) -> str:
    """Texts one below the other as one SVG. `beta`: what the policy was trained with.

    Blue with a solid line: likelier than under the reference. Orange with a dotted line: less
    likely. The pointer on a word shows by how much. The SVG's title says all of it in words.
    """
    parts, top = [], MARGIN
    for text in texts:
        block, top = drawn(text, beta, top)
        parts += block
    parts.append(key(top + 14))
    caption = " ".join(said(text, beta) for text in texts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {top + 28}' "
        f"width='{WIDTH}' role='img' style='max-width:100%;height:auto'>"
        f"<title>{escape(caption)}</title>"
        f"<rect width='{WIDTH}' height='{top + 28}' rx='8' fill='{PAPER}'/>{''.join(parts)}</svg>"
    )


def numbers(text: Shown, beta: float | None) -> str:
    of_beta = f" · beta {beta / text.strength:.2f}" if beta and text.strength > 0 else ""
    measured = f"P(positive) {text.positive:.2f} · KL {text.kl:.1f} nats"
    return f"strength {text.strength:g}{of_beta} · {measured}"


def said(text: Shown, beta: float | None) -> str:
    """A text and its numbers as one sentence, for readers who hear rather than see it."""
    words = " ".join(word for word, _ in text.words)
    return f"{numbers(text, beta).capitalize()}: {text.prompt} {words}."


def drawn(text: Shown, beta: float | None, top: float) -> tuple[list[str], float]:
    """The SVG of one text, and where it ends."""
    top += 14
    parts = [letters(MARGIN, top, numbers(text, beta), "bold", INK, FONT)]
    words = [(word, None) for word in text.prompt.split()] + text.words
    x, y = MARGIN, top + LINE
    for word, shift in words:
        width = len(word) * LETTER
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + LINE
        parts.append(word_drawn(word, shift, x, y, width))
        x += width + LETTER
    return parts, y + LINE


def word_drawn(word: str, shift: float | None, x: float, y: float, width: float) -> str:
    """A word of the prompt (no shift, grey), or one on its colour with its line beneath."""
    if shift is None:
        return letters(x, y, word, "normal", DARKER[GREY], MONO, width)
    colour = shade(0.5 + max(-0.5, min(0.5, shift / FULL_COLOUR / 2)))
    dash = "" if shift > 0 else " stroke-dasharray='2 3'"
    line = f"<path d='M{x:.1f},{y + 5}h{width:.1f}' stroke='{INK}'{dash}/>"
    return (
        f"<g><title>{shift:+.2f} nats</title><rect x='{x - 2:.1f}' y='{y - 14}' "
        f"width='{width + 4:.1f}' height='21' rx='3' fill='{colour}'/>"
        f"{letters(x, y, word, 'normal', INK, MONO, width)}{line * (abs(shift) >= LINE_FROM)}</g>"
    )


def letters(x, y, text, weight, colour, font, width=0) -> str:
    fit = f" textLength='{width:.1f}' lengthAdjust='spacingAndGlyphs'" if width else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='14' font-weight='{weight}' fill='{colour}' "
        f"{font}{fit}>{escape(text)}</text>"
    )


def key(y: float) -> str:
    meaning = "blue, solid line: likelier than under the reference · orange, dotted: less likely"
    return letters(MARGIN, y, meaning, "normal", DARKER[GREY], FONT).replace("'14'", "'12'")


def explore_strength(
    draw: Callable[[str, float, int], Shown],
    beta: float,
    still: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    prompt: str = "This movie",
    most: float = 3.0,
):
    """A prompt, a slider of strength and a choice of random numbers; below them the text.

    `draw(prompt, strength, seed)` gives a `Shown`. The texts at the strengths `still` are drawn
    first, as one picture that is stored with the page. Returns the box of widgets.
    """
    import ipywidgets
    from IPython.display import display

    values = ", ".join(f"{strength:g}" for strength in still)
    strip = picture([draw(prompt, strength, 0) for strength in still], beta)
    note = f"The text at strengths {values}; run this cell for a slider"
    display({"text/plain": note, "image/svg+xml": strip}, raw=True)

    remembered = lru_cache(1000)(draw)
    wide = {"width": "480px"}
    asked = ipywidgets.Text(
        value=prompt, description="prompt", layout=wide, continuous_update=False
    )
    asked.tooltip = "prompt: the beginning that the model continues"
    slider = ipywidgets.FloatSlider(
        value=1.0, min=-1.0, max=most, step=0.05, description="strength", readout_format=".2f",
        layout=wide,
    )  # fmt: skip
    slider.tooltip = "strength: 0 is the reference, 1 the policy; move it, and the text follows"
    number = ipywidgets.IntSlider(value=0, min=0, max=20, description="draw", layout=wide)
    number.tooltip = "draw: which random numbers; each gives another text"
    view = ipywidgets.HTML()

    def redraw(_=None):
        try:
            text = remembered(asked.value, round(slider.value, 2), number.value)
            view.value = picture([text], beta)
        except DataError as error:  # a prompt that leaves no room, say
            view.value = f"<p>{escape(str(error))}</p>"

    redraw()
    for control in (asked, slider, number):
        control.observe(redraw, "value")
    box = ipywidgets.VBox([asked, slider, number, view])
    display(box)
    return box
