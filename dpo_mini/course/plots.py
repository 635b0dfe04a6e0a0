"""Figures, each a pure function from numbers to a matplotlib Figure."""

import io
import math

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and on light and dark pages.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"

# For `plt.rcParams.update`: white paper on light and dark pages, letters that survive half size.
STYLE = {
    "figure.figsize": (8, 3.6), "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2,
    "svg.hashsalt": "dpo_mini",
}  # fmt: skip


class Picture(Figure):
    """A figure that shows itself in a notebook in which pyplot has not drawn anything yet."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=72, metadata={"Software": None})
        return buffer.getvalue()


def training_figure(
    log: list[dict], title: str | None = None, start: float | None = math.log(2)
) -> Figure:
    """How a preference run went, in eight pictures: what the batches said (faint, and its running
    mean), and what was measured now and then on held-out pairs and fresh samples (dots).

    `start`: what the loss is before the policy has moved, DPO's unless said; None where that
    depends on the pairs.
    """
    steps = [row for row in log if "loss" in row]
    figure = Picture(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(2, 4)
    loss, rewards, accuracy, norm, logps, reward, kl, variety = axes.flat
    window = max(1, len(steps) // 15)

    def curve(axis, key, colour, label):
        values, x = [r[key] for r in steps if key in r], [r["step"] for r in steps if key in r]
        if not values:  # a loss without pairs has no chosen and rejected
            return
        recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
        axis.plot(x, values, color=colour, alpha=0.2, lw=1)
        axis.plot(x, [sum(r) / len(r) for r in recent], color=colour, label=label, lw=2)

    def dots(axis, key, colour, label):
        watched = [(r["step"], r[key]) for r in log if key in r]
        if watched:
            axis.plot(*zip(*watched), "o-", color=colour, label=label, ms=4, lw=1.5)

    if start is not None:
        name = "log 2: knows nothing" if start == math.log(2) else "knows nothing"
        loss.axhline(start, color=GREY, ls=":", lw=1, label=name)
    curve(loss, "loss", BLUE, "batch")
    dots(loss, "held_out/loss", ORANGE, "held out")
    curve(rewards, "rewards/chosen", GREEN, "chosen")
    curve(rewards, "rewards/rejected", VERMILION, "rejected")
    curve(rewards, "rewards/margins", BLUE, "margin")
    curve(rewards, "rewards/signed", BLUE, "with the label's sign")
    accuracy.axhline(0.5, color=GREY, ls=":", lw=1)
    curve(accuracy, "rewards/accuracies", BLUE, "batch")
    dots(accuracy, "held_out/accuracies", ORANGE, "held out")
    curve(norm, "grad_norm", BLUE, None)
    curve(logps, "logps/chosen", GREEN, "chosen")
    curve(logps, "logps/rejected", VERMILION, "rejected")
    curve(logps, "logps/completion", BLUE, "all")
    dots(reward, "reward", GREEN, "reward")
    dots(reward, "judge", ORANGE, "second judge")
    dots(kl, "kl", BLUE, None)
    dots(variety, "distinct_2", BLUE, None)
    accuracy.set_ylim(0, 1.02)
    reward.set_ylim(0, 1.03)
    variety.set_ylim(0, 1.03)
    names = (
        "Loss (nats)", "Implicit rewards", "Pairs ranked rightly", "Gradient norm",
        "Log-probabilities (nats)", "P(positive), fresh samples", "KL from reference (nats)",
        "Distinct word pairs",
    )  # fmt: skip
    for axis, name in zip(axes.flat, names):
        axis.set_title(name, fontsize=11, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9)
    figure.suptitle(title)
    return figure


def before_after_figure(rows: list[dict]) -> Figure:
    """P(positive) of the same prompts' completions before and after, as two histograms.

    `rows`: as in samples.jsonl, with `reward_reference` and `reward_policy`.
    """
    figure = Picture(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    bins = [i / 20 for i in range(21)]
    for key, colour, label in (
        ("reward_reference", GREY, "before: reviews of every kind"),
        ("reward_policy", GREEN, "after DPO"),
    ):
        axis.hist([r[key] for r in rows], bins, color=colour, alpha=0.75, label=label)
    axis.set(xlabel="P(positive) of a completion", ylabel="held-out prompts", xlim=(0, 1))
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
