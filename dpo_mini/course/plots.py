"""Figures, each a pure function from numbers to a matplotlib Figure."""

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


def training_figure(log: list[dict]) -> Figure:
    """How a preference run went: loss, margin, accuracy, the two log-probabilities, reward and KL
    of fresh samples.
    """
    steps = [row for row in log if "loss" in row]
    watched = [row for row in log if "kl" in row]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)

    window = max(1, len(steps) // 15)

    def curve(axis, key, colour, label=None):
        """What each batch said, faint, and its mean over the last `window` batches."""
        values, x = [r[key] for r in steps], [r["step"] for r in steps]
        recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
        axis.plot(x, values, color=colour, alpha=0.2, lw=1)
        axis.plot(x, [sum(r) / len(r) for r in recent], color=colour, label=label, lw=2)

    loss, margin, accuracy, logps, reward, kl = axes.flat
    curve(loss, "loss", BLUE)
    loss.axhline(0.6931, color=GREY, ls=":", lw=1)
    loss.text(
        0.98,
        0.6931,
        "log 2: knows nothing ",
        color=GREY,
        ha="right",
        va="bottom",
        transform=loss.get_yaxis_transform(),
    )
    loss.set_title("Loss (nats)")
    curve(margin, "rewards/chosen", GREEN, "chosen")
    curve(margin, "rewards/rejected", VERMILION, "rejected")
    curve(margin, "rewards/margins", BLUE, "margin")
    margin.set_title("Implicit rewards")
    curve(accuracy, "rewards/accuracies", BLUE)
    accuracy.axhline(0.5, color=GREY, ls=":", lw=1)
    accuracy.set_ylim(0.3, 1.02)
    accuracy.set_title("Pairs ranked rightly")
    curve(logps, "logps/chosen", GREEN, "chosen")
    curve(logps, "logps/rejected", VERMILION, "rejected")
    logps.set_title("Log-probabilities (nats)")
    if watched:
        for axis, key, colour in ((reward, "reward", GREEN), (kl, "kl", ORANGE)):
            axis.plot([r["step"] for r in watched], [r[key] for r in watched], "o-", color=colour)
    reward.set_ylim(0, 1)
    reward.set_title("P(positive) of fresh samples")
    kl.set_title("KL from the reference (nats)")
    for axis in (margin, logps):
        axis.legend(frameon=False)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def before_after_figure(rows: list[dict]) -> Figure:
    """P(positive) of the same prompts' completions before and after, as two histograms.

    `rows`: as in samples.jsonl, with `reward_reference` and `reward_policy`.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
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
