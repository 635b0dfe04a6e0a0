"""What the command line prints: in one place, so that any console can show it."""

import shlex
import sys

from dpo_mini.outputs import is_main_process


def say(options, text: str) -> None:
    """Print for a person: nothing with --json, and of several processes only the first."""
    if not options.json and is_main_process():
        print(printable(text, sys.stdout.encoding))


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """The text without what a console would obey or cannot show.

    Control characters become their escapes: a sample may hold a sequence that moves the cursor or
    renames the window. Characters that `encoding` lacks become "?".
    """
    escaped = "".join(
        c if c.isprintable() or c in "\n " else c.encode("unicode_escape").decode() for c in text
    )
    encoding = encoding or "utf-8"
    return escaped.encode(encoding, "replace").decode(encoding)


def one_line(text: str) -> str:
    return " ".join(text.split())


def command(*words) -> str:
    """A command to be copied: a name with a space in it is quoted."""
    return " ".join(["dpo-mini", *(shlex.quote(str(word)) for word in words)])


def interval(estimate: dict) -> str:
    if estimate["low"] is None:
        return "one prompt: no interval"
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def comparison(
    report: dict, rows: list[dict], heading: str, pairs: str = "pairs", reward: str = "P(positive)"
) -> str:
    """Before and after as a table, then the first prompts with a completion of each.

    `heading` names the prompts, `pairs` the pairs that were ranked, `reward` what the reward's
    number is (`rewards.shown_as`).
    """
    its_name = "reward (a model's output)" if reward == "reward" else f"{reward}, the reward"
    lines = [f"\n{heading:<43}{'before':>9}{'after':>9}   95% interval after"]
    for title, key in (
        (its_name, "reward"),
        ("P(positive), the second judge", "judge"),
        ("tokens", "length"),
    ):
        if f"{key}_policy" not in report:  # no second judge was asked
            continue
        before, after = report[f"{key}_reference"], report[f"{key}_policy"]
        lines.append(f"{title:<43}{before['mean']:>9.3f}{after['mean']:>9.3f}   {interval(after)}")
    before, after = report["distinct_2_reference"], report["distinct_2_policy"]
    lines.append(f"{'distinct word pairs':<43}{before:>9.3f}{after:>9.3f}")
    for title, key in (
        ("win rate against the reference", "win_rate"),
        ("KL from the reference (nats)", "kl"),
        (f"{pairs} ranked rightly", "preference_accuracy"),
        ("  those half a logit apart or more", "preference_accuracy_clear"),
    ):
        if key in report:
            lines.append(f"{title:<52}{report[key]['mean']:>9.3f}   {interval(report[key])}")
    lines.append(f"\nThe same prompts, before and after, with {reward}:")
    for row in rows[:4]:
        lines.append(f"\n  {one_line(prompt_text(row['prompt']))} ...")
        for name, label in (("reference", "before"), ("policy", "after")):
            lines.append(f"    {label:<7}{row['reward_' + name]:.2f}  {one_line(row[name])}")
    return "\n".join(lines)


def prompt_text(prompt) -> str:
    """A prompt as a person wrote it: of messages, what the last one says."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
