"""A run that is watched while it trains: its curves, and a few samples changing."""

import base64
import io
from html import escape

import torch

from dpo_mini.course.plots import monitor_figure, training_figure
from dpo_mini.sampling import sample_completions


def page(log: list[dict], samples: list[tuple[int, list[str], list[float]]]) -> str:
    """HTML of the curves and of each prompt's text at the first and the last time of watching.

    `samples`: for each time the step, the texts and their P(positive), prompts in the same order.
    """
    curves = ""
    if len(log) > 1:
        curves = picture(training_figure(log), "loss, accuracy, rewards, log-probabilities")
        curves += picture(monitor_figure(log), "P(positive), KL, variety, gradient norm")
    (first, texts, chances), (last, new_texts, new_chances) = samples[0], samples[-1]
    rows = "".join(
        f"<tr>{cell(text, chance)}{cell(new_text, new_chance)}</tr>"
        for text, chance, new_text, new_chance in zip(texts, chances, new_texts, new_chances)
    )
    return f"{curves}<table><tr><th>step {first}</th><th>step {last}</th></tr>{rows}</table>"


def picture(figure, says: str) -> str:
    """The figure as an HTML image that carries its own data; `says` stands for it in words."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72, metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{says}" style="width:49%" src="data:image/png;base64,{data}">'


def cell(text: str, chance: float) -> str:
    """A table cell with a text, its background from orange (negative) to blue (positive)."""
    return (
        f'<td style="text-align:left;color:#000;background:{shade(chance)}">'
        f"{escape(' '.join(text.split()))} <i>{chance:.2f}</i></td>"
    )


def heat_map(tokens: list[str], values: list[float], scale: float) -> str:
    """A text whose tokens are coloured by their value: blue above 0, orange below; `scale` is the
    value at which the colour is full. The number appears when the pointer rests on a token.
    """
    spans = "".join(
        f'<span title="{value:+.2f}" style="color:#000;background:'
        f'{shade(0.5 + max(-0.5, min(0.5, value / scale / 2)))}">{escape(token)}</span>'
        for token, value in zip(tokens, values)
    )
    return f'<p style="line-height:1.8">{spans} <b>{sum(values):+.2f}</b></p>'


def shade(chance: float) -> str:
    """0: orange, 1/2: white, 1: blue; pale, so that black letters stay readable."""
    end = (0, 114, 178) if chance > 0.5 else (213, 94, 0)
    weight = abs(2 * chance - 1) * 0.45
    return "rgb({},{},{})".format(*(round(255 + weight * (c - 255)) for c in end))


def live(monitor, tokenizer, prompts, reward, max_new_tokens: int = 32):
    """`monitor` as before, and a picture below the notebook's cell that follows the run."""
    from IPython.display import HTML, display

    handle = display(HTML("<i>The first look at the model …</i>"), display_id=True)
    samples = []

    def watching(model, log) -> dict:
        values = monitor(model, log)
        drawn = sample_completions(model, tokenizer, prompts, 1, max_new_tokens, seed=11)
        texts = [row[0].full_text for row in drawn]
        chances = torch.as_tensor(reward(texts)).sigmoid().tolist()
        samples.append((log[-1]["step"], texts, chances))
        handle.update(HTML(page([*log[:-1], {**log[-1], **values}], samples)))
        return values

    return watching
