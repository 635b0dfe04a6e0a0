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
    """What a preference run saw in its pairs: loss, implicit rewards, accuracy, log-probabilities.

    Lines are batches (faint) and their running mean; dots are held-out pairs. `start`: what the
    loss is before the policy has moved, DPO's unless said; None where that depends on the pairs.
    """
    figure, (loss, accuracy, rewards, logps) = four_panels(
        "Loss (nats)", "Pairs ranked rightly", "Implicit rewards", "Log-probabilities (nats)", title
    )
    if start is not None:
        name = "log 2: knows nothing" if start == math.log(2) else "knows nothing"
        loss.axhline(start, color=GREY, ls=":", lw=1, label=name)
    curve(loss, log, "loss", BLUE, "batch")
    dots(loss, log, "held_out/loss", ORANGE, "held out")
    accuracy.axhline(0.5, color=GREY, ls=":", lw=1, label="a coin's")
    curve(accuracy, log, "rewards/accuracies", BLUE, "batch")
    dots(accuracy, log, "held_out/accuracies", ORANGE, "held out")
    accuracy.set_ylim(0, 1.02)
    curve(rewards, log, "rewards/chosen", GREEN, "chosen")
    curve(rewards, log, "rewards/rejected", VERMILION, "rejected", "--")
    curve(rewards, log, "rewards/margins", BLUE, "margin", "-.")
    curve(rewards, log, "rewards/signed", BLUE, "with the label's sign")
    curve(logps, log, "logps/chosen", GREEN, "chosen")
    curve(logps, log, "logps/rejected", VERMILION, "rejected", "--")
    curve(logps, log, "logps/completion", BLUE, "all")
    return legends(figure)


def monitor_figure(log: list[dict], title: str | None = None) -> Figure:
    """What a run did to the model: P(positive), KL and variety of fresh samples where the log has
    them, and the gradient's norm.
    """
    figure, (reward, kl, variety, norm) = four_panels(
        "P(positive), fresh samples", "KL from reference (nats)", "Distinct word pairs",
        "Gradient norm", title,
    )  # fmt: skip
    dots(reward, log, "reward", GREEN, "reward")
    dots(reward, log, "judge", ORANGE, "second judge", "s--")
    reward.set_ylim(0, 1.03)
    dots(kl, log, "kl", BLUE, None)
    dots(variety, log, "distinct_2", BLUE, None)
    variety.set_ylim(0, 1.03)
    curve(norm, log, "grad_norm", BLUE, None)
    return legends(figure)


def four_panels(*titles):
    """A figure of two rows of two panels, with their titles and the figure's own; its panels."""
    *names, title = titles
    figure = Picture(figsize=(9, 5.6), layout="constrained")
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    for axis, name in zip(axes, names):
        axis.set_title(name, fontsize=12, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=10)
    for axis in axes[2:]:
        axis.set_xlabel("step", fontsize=11)
    figure.suptitle(title)
    return figure, axes


def legends(figure: Figure) -> Figure:
    """The figure, with a legend in each panel that has names for its lines."""
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=10)
    return figure


def curve(axis, log, key, colour, label, style="-") -> None:
    """A number of every step, faint, and its running mean over a fifteenth of the run."""
    x = [row["step"] for row in log if "loss" in row and key in row]
    values = [row[key] for row in log if "loss" in row and key in row]
    if not values:  # a loss without pairs has no chosen and rejected
        return
    window = max(1, sum("loss" in row for row in log) // 15)
    recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    axis.plot(x, values, color=colour, alpha=0.2, lw=1)
    axis.plot(x, [sum(r) / len(r) for r in recent], style, color=colour, label=label, lw=2)


def dots(axis, log, key, colour, label, style="o-") -> None:
    """A number that is measured now and then."""
    watched = [(row["step"], row[key]) for row in log if key in row]
    if watched:
        axis.plot(*zip(*watched), style, color=colour, label=label, ms=4, lw=1.5)


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
