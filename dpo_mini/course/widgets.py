"""What the course's sliders move. Each picture is a pure function from numbers to SVG; `explore`
puts sliders on top of it.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

import torch

from dpo_mini import exact
from dpo_mini.course.plots import BLUE, GREEN, ORANGE, VERMILION
from dpo_mini.course.svg import GREY, Panel, picture, small_multiples
from dpo_mini.data import as_text

# A world of eight answers, used wherever the course needs one at a glance.
REFERENCE = torch.tensor([0.22, 0.18, 0.16, 0.14, 0.11, 0.09, 0.06, 0.04]).double().log()
REWARDS = torch.tensor([-1.0, 0.4, -0.3, 1.0, -1.6, 0.8, 2.0, 1.4]).double()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def bradley_terry(reward_a: float = 1.0, reward_b: float = 0.0) -> str:
    """P(a beats b) on the logistic curve: only the difference of the rewards matters."""
    gap = reward_a - reward_b
    chance = sigmoid(gap)
    panel = Panel(
        (70, 40, 620, 220), (-6, 6), (0, 1), xlabel="difference of rewards, r(a) - r(b)",
        ylabel="P(a beats b)", title=f"P(a beats b) = sigmoid({gap:+.2f}) = {chance:.3f}",
    )  # fmt: skip
    panel.ticks(range(-6, 7, 2), (0, 0.5, 1)).curve(sigmoid, BLUE)
    panel.line([(-6, 0.5), (6, 0.5)], GREY, "2 4", 1)
    panel.line([(gap, 0), (gap, chance), (-6, chance)], ORANGE, "5 4", 1.5)
    panel.dots([(gap, chance)], VERMILION, 7)
    return picture([panel], caption=f"With a difference of {gap:.2f}, a wins {chance:.3f}")


def tilting(beta: float = 1.0, reference=REFERENCE, rewards=REWARDS) -> str:
    """pi_ref bent towards reward: pi* = pi_ref exp(r / beta) / Z, and what it gains and costs."""
    optimum = exact.optimal_policy(reference, rewards, beta)
    kl = exact.kl(optimum, reference).item()
    reward = exact.expectation(optimum, rewards).item()
    log_z = exact.log_partition(reference, rewards, beta).item()
    panel = Panel(
        (70, 40, 620, 200), (-0.6, len(rewards) - 0.4), (0, 1), ylabel="probability",
        xlabel="answers, each with its reward", title=f"beta = {beta:.2f}",
    )  # fmt: skip
    panel.ticks(ys=(0, 0.5, 1))
    for i, r in enumerate(rewards.tolist()):
        panel.bar(i - 0.18, reference[i].exp().item(), 0.34, GREY)
        panel.bar(i + 0.18, optimum[i].exp().item(), 0.34, BLUE)
        panel.label(i, f"{r:+.1f}")
    panel.note(len(rewards) - 0.5, 0.95, "grey: pi_ref", GREY, "end")
    panel.note(len(rewards) - 0.5, 0.86, "blue: pi*", BLUE, "end")
    said = f"log Z = {log_z:.3f} · KL = {kl:.3f} nats · E[r] = {reward:.3f}"
    said += f" · J = E[r] - beta KL = {reward - beta * kl:.3f} = beta log Z"
    panel.label(3.5, said, lines=3)
    return picture([panel], caption=said)


def frontier(beta: float = 1.0, reference=REFERENCE, rewards=REWARDS) -> str:
    """The most reward that a KL can buy, and the slope there: beta."""

    def point(b):
        policy = exact.optimal_policy(reference, rewards, b)
        return exact.kl(policy, reference).item(), exact.expectation(policy, rewards).item()

    betas = [10 ** (i / 30) for i in range(-40, 61)]
    kl, reward = point(beta)
    panel = Panel(
        (70, 40, 620, 220), (0, 3), (-0.2, 2.1), xlabel="KL(pi || pi_ref), nats",
        ylabel="E[r]", title=f"beta = {beta:.2f}: KL = {kl:.3f}, E[r] = {reward:.3f}",
    )  # fmt: skip
    panel.ticks((0, 1, 2, 3), (0, 1, 2)).line([point(b) for b in betas], BLUE)
    back = min(0.6, kl, (reward + 0.2) / beta)  # no further than the axes: a tangent stays straight
    ahead = min(0.6, 3 - kl, (2.1 - reward) / beta)
    panel.line([(kl + d, reward + beta * d) for d in (-back, ahead)], ORANGE, "5 4", 1.5)
    panel.dots([(kl, reward)], VERMILION, 7)
    panel.note(1.7, 0.6, "dashed: the tangent, of slope beta", ORANGE)
    panel.note(1.7, 0.4, "above the curve: out of reach", GREY)
    return picture([panel], caption=f"At beta {beta:.2f}: KL {kl:.3f}, reward {reward:.3f}")


def gradient_weighting(
    beta: float = 0.1, margins: Sequence[float] = (), texts: Sequence[tuple] = ()
) -> str:
    """A pair's weight in DPO's gradient, sigmoid(-beta * margin), a constant factor beta left out.

    `margins`: log-ratio of chosen minus that of rejected, in nats, a pair each; `texts`: their
    (chosen, rejected), to show the pairs that weigh most and least.
    """
    weights = [sigmoid(-beta * m) for m in margins]
    mean = sum(weights) / len(weights) if weights else 0.5
    panel = Panel(
        (70, 40, 620, 220), (-30, 30), (0, 1), ylabel="weight in the gradient",
        xlabel="margin: log-ratio of chosen minus log-ratio of rejected (nats)",
        title=f"beta = {beta:.2f}: weight = sigmoid(-beta * margin), {mean:.3f} on average",
    )  # fmt: skip
    panel.ticks(range(-30, 31, 10), (0, 0.5, 1))
    panel.line([(0, 0), (0, 1)], GREY, "2 4", 1)
    panel.curve(lambda margin: sigmoid(-beta * margin), BLUE)
    panel.dots(list(zip(margins, weights)), VERMILION, 4, 0.5)
    panel.note(-29, 0.08, "ranked wrongly: weight above 1/2", GREY)
    panel.note(29, 0.9, "ranked rightly: weight below 1/2", GREY, "end")
    drawn = picture([panel], caption=f"Average weight {mean:.3f} at beta {beta:.2f}")
    if not texts:
        return drawn
    order = sorted(range(len(margins)), key=lambda i: margins[i])
    rows = [("most", order[0], VERMILION), ("least", order[-1], GREEN)]
    return drawn + "".join(pair_text(*row, weights, texts) for row in rows)


def pair_text(which: str, i: int, colour: str, weights, texts) -> str:
    """A pair in words, beneath the picture."""
    chosen, rejected = (escape(" ".join(text.split())) for text in texts[i])
    return (
        f"<p style='max-width:720px;margin:6px 0;font-size:13px;border-left:4px solid {colour};"
        f"padding-left:8px'><b>Weighs {which}: {weights[i]:.3f}</b><br>chosen: {chosen}<br>"
        f"rejected: {rejected}</p>"
    )


def explore(draw: Callable[..., str], still: Sequence[float] = (), **sliders: tuple):
    """Show `draw(**values)` with a slider for each argument: name=(low, high, step, start).

    `still`: values of the first argument that are first drawn side by side. That picture is stored
    with the page, so that it teaches without a kernel, where no slider can be. Returns the box of
    widgets.
    """
    import ipywidgets
    from IPython.display import display

    starts = {name: start for name, (*_, start) in sliders.items()}
    first = next(iter(sliders))
    drawn = [draw(**{**starts, first: value}) for value in still or [starts[first]]]
    pictures = [part[: part.index("</svg>") + len("</svg>")] for part in drawn]
    values = ", ".join(f"{value:g}" for value in still or [starts[first]])
    said = {"text/plain": f"Pictures at {first} = {values}; run this cell for a slider"}
    display({**said, "image/svg+xml": small_multiples(pictures)}, raw=True)

    controls = {
        name: ipywidgets.FloatSlider(
            value=start, min=low, max=high, step=step, description=name,
            readout_format=".2f", layout={"width": "480px"},
        )
        for name, (low, high, step, start) in sliders.items()
    }  # fmt: skip
    for name, slider in controls.items():
        slider.tooltip = f"{name}: move it, and the picture follows"  # read out by screen readers

    def redraw(_=None):
        view.value = draw(**{name: slider.value for name, slider in controls.items()})

    view = ipywidgets.HTML()
    redraw()
    for slider in controls.values():
        slider.observe(redraw, "value")
    box = ipywidgets.VBox([*controls.values(), view])
    display(box)
    return box


def pair_to_label(
    pair,
    number: int,
    of: int,
    chosen_is_left: bool = True,
    question: str = "Which one is the more positive review?",
) -> str:
    """A pair as a labeller sees it, HTML: the prompt, then the two completions side by side.

    Whatever a text or the question holds is shown as it is written: nothing in it runs as HTML.
    """
    ends = (pair.chosen, pair.rejected) if chosen_is_left else (pair.rejected, pair.chosen)
    style = "width:50%;vertical-align:top;text-align:left;padding:6px 12px;border:1px solid #7F7F7F"
    cells = "".join(f"<td style='{style}'>{escape(as_text(e))}</td>" for e in ends)
    return (
        f"<p>Pair {number} of {of}: <b>{escape(as_text(pair.prompt))}</b> … "
        f"{escape(question)}</p><table style='width:100%'><tr>{cells}</tr></table>"
    )


def label_yourself(pairs: Sequence, seed: int = 0):
    """Buttons to choose the better of two texts, pair by pair; returns (box, choices).

    `choices` grows with every press: True where the press agreed with the pair's label. Which side
    the chosen text stands on is drawn anew for each pair, so that position tells nothing.
    """
    import random

    import ipywidgets as ipw

    choices: list[bool] = []
    sides = random.Random(seed)
    left_is_chosen = [sides.random() < 0.5 for _ in pairs]
    text = ipw.HTML()
    left, right = ipw.Button(description="the left one"), ipw.Button(description="the right one")

    def draw():
        if len(choices) == len(pairs):
            text.value = f"You agree with the label in {sum(choices)} of {len(pairs)} pairs."
            left.disabled = right.disabled = True
            return
        i = len(choices)
        text.value = pair_to_label(pairs[i], i + 1, len(pairs), left_is_chosen[i])

    def press(button):
        choices.append((button is left) == left_is_chosen[len(choices)])
        draw()

    left.on_click(press)
    right.on_click(press)
    draw()
    return ipw.VBox([text, ipw.HBox([left, right])]), choices
