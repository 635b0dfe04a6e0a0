"""The workshop's plans, and what they really ask of a participant:

    python -m dpo_mini.course.workshop.plan [--check]

writes the tables of workshop/GUIDE.md. A cell of a notebook is on the way of a plan by its tag:
"workshop-1h" for the one-hour plan and the longer ones, "workshop-3h" for the three-hour plan.
With "workshop-run" too, it is run and not read. The two-day plan takes whole chapters.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

from dpo_mini.course import checks

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS, GUIDE = ROOT / "notebooks", ROOT / "workshop" / "GUIDE.md"
RUN = "workshop-run"
TAGS = {"1h": ("workshop-1h",), "3h": ("workshop-1h", "workshop-3h"), "2d": None}

# A reader's pace, English often being the second language.
WORDS_A_MINUTE = 150
LINES_A_MINUTE = 20  # of code that is read
GUESS = 1.0  # minutes for a Predict
FIGURE = 0.5  # minutes to look at a figure
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@dataclass(frozen=True)
class Part:
    """A slot of a plan: its minutes, and the chapters and exercises that fill it."""

    minutes: int
    title: str
    chapters: tuple[str, ...] = ()
    exercises: tuple[str, ...] = ()


ONE_HOUR = (
    Part(5, "Open notebook 00. Who cannot run it sits beside somebody who can"),
    Part(14, "A model changes its mind", ("00",)),
    Part(6, "Slides: preference, objective, optimum"),
    Part(21, "The partition function cancels", ("03",), ("03.1",)),
    Part(10, "What beta does", ("04",)),
    Part(4, "Slack: the five questions"),
)
THREE_HOURS = (
    Part(10, "Installing, with notebook 00 open"),
    Part(12, "A model changes its mind", ("00",)),
    Part(16, "Preferences", ("01",), ("01.4",)),
    Part(20, "The objective, its optimum, the slider", ("02",), ("02.5",)),
    Part(32, "The derivation", ("03",), ("03.1", "03.3")),
    Part(10, "Break. Notebook 08 is running: choose *Run all* before you go"),
    Part(24, "The gradient, and which way beta turns", ("04",), ("04.4",)),
    Part(30, "The code, and its bugs", ("06",), ("06.5",)),
    Part(18, "The whole experiment, reward against KL", ("08",)),
    Part(8, "Slack: the five questions"),
)
TWO_DAYS = (
    Part(30, "Day 1, 9:00. Installing"),
    Part(20, "A model changes its mind", ("00",)),
    Part(50, "Preferences", ("01",), ("01.2", "01.4")),
    Part(20, "Break"),
    Part(60, "The objective and its optimum", ("02",), ("02.1", "02.3", "02.5")),
    Part(60, "Lunch"),
    Part(55, "The derivation", ("03",), ("03.1", "03.2", "03.3", "03.4")),
    Part(60, "The gradient and beta", ("04",), ("04.1", "04.2", "04.4")),
    Part(20, "Break"),
    Part(75, "An exact world", ("05",), ("05.1", "05.5")),
    Part(30, "Slack, questions. Ends at 17:00"),
    Part(10, "Day 2, 9:00. What yesterday left open"),
    Part(80, "The code, and its bugs", ("06",), ("06.1", "06.2", "06.5")),
    Part(20, "Break"),
    Part(70, "Preference data", ("07",), ("07.2", "07.3")),
    Part(60, "Lunch"),
    Part(55, "The whole experiment", ("08",), ("08.4", "08.5")),
    Part(20, "Break"),
    Part(80, "Evaluate like a researcher", ("09",), ("09.2", "09.5")),
    Part(85, "A chapter of one's own choice, slack, questions. Ends at 17:00"),
)
PLANS = {"1h": ONE_HOUR, "3h": THREE_HOURS, "2d": TWO_DAYS}
MINUTES = {"1h": 60, "3h": 180, "2d": 960}
TITLES = {"1h": "One hour", "3h": "Three hours", "2d": "Two days"}


def notebook_path(chapter: str) -> Path:
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    return path


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def on_the_way(cell, form: str) -> bool:
    """Whether a plan asks for this cell. The two-day plan asks for all but the navigation."""
    if TAGS[form] is None:
        return "navigation" not in tags(cell)
    return any(tag in tags(cell) for tag in TAGS[form])


def is_read(cell, form: str) -> bool:
    """Whether the cell's source is read, and not only run."""
    return cell.cell_type == "markdown" or form == "2d" or RUN not in tags(cell)


def has_figure(cell) -> bool:
    kinds = {"image/png", "image/svg+xml"}
    return any(kinds & set(output.get("data", {})) for output in cell.get("outputs", []))


def minutes_of(cell, form: str) -> float:
    """Minutes that a cell on the way asks for, without running it."""
    if cell.cell_type == "markdown":
        return len(cell.source.split()) / WORDS_A_MINUTE
    lines = [line for line in cell.source.splitlines() if line.strip()]
    reading = len(lines) / LINES_A_MINUTE if is_read(cell, form) else 0.0
    return reading + GUESS * ("answer" in tags(cell)) + FIGURE * has_figure(cell)


def chapter_minutes(chapter: str, form: str) -> float:
    """Minutes to read a chapter's cells of a plan, with its guesses and figures."""
    cells = nbformat.read(notebook_path(chapter), as_version=4).cells
    return sum(minutes_of(cell, form) for cell in cells if on_the_way(cell, form))


def running_minutes(chapter: str) -> int:
    """Minutes that the whole chapter runs on two quiet cores, the most that its first cell says. A
    short form runs some of its cells, so no longer.
    """
    opening = nbformat.read(notebook_path(chapter), as_version=4).cells[0].source
    said = re.findall(r"(\w+) minutes? (?:to run|on two)", opening)
    return NUMBERS[said[-1]]


def exercise_minutes(part: Part) -> int:
    return sum(checks.exercise(id).minutes for id in part.exercises)


def asked(part: Part, form: str) -> float:
    """Minutes that a part asks of a participant: reading, running, exercises."""
    chapters = sum(chapter_minutes(c, form) + running_minutes(c) for c in part.chapters)
    return chapters + exercise_minutes(part)


def exercises_of(form: str) -> dict[str, list[str]]:
    """{chapter: its exercises in the plan}."""
    found: dict[str, list[str]] = {}
    for part in PLANS[form]:
        for id in part.exercises:
            found.setdefault(id[:2], []).append(id)
    return found


def chapters_of(form: str) -> list[str]:
    return [chapter for part in PLANS[form] for chapter in part.chapters]


def skipped(chapter: str, form: str) -> list[str]:
    """The sections of a chapter of which the plan takes no cell."""
    left, section, kept = [], "", True
    for cell in nbformat.read(notebook_path(chapter), as_version=4).cells:
        heading = re.search(r"^##+ (.+)$", cell.source, flags=re.M)
        if cell.cell_type == "markdown" and heading:
            left += [section] if not kept else []
            section, kept = heading[1], False
        kept = kept or on_the_way(cell, form)
    return left + ([section] if not kept else [])


def table(form: str) -> str:
    """The plan as Markdown: each slot, what fills it, and the minutes that this asks for."""
    lines = ["| minutes | part | notebook | exercises | asks for |", "|---|---|---|---|---|"]
    start = 0
    for part in PLANS[form]:
        books = ", ".join(f"[{c}](../notebooks/{notebook_path(c).name})" for c in part.chapters)
        needs = f"{asked(part, form):.0f}" if part.chapters else ""
        slot, tasks = f"{start}–{start + part.minutes}", ", ".join(part.exercises)
        row = [slot, part.title, books, tasks, needs]
        lines.append("| " + " | ".join(row) + " |")
        start += part.minutes
    if form != "2d":
        gone = [(c, skipped(c, form)) for c in chapters_of(form)]
        lines += ["", "Skip these sections; the short notebooks leave them out:", ""]
        lines += [f"- {c}: {'; '.join(names)}." for c, names in gone if names]
    return "\n".join(lines)


def page() -> str:
    """The guide with its tables as they should be."""
    text = GUIDE.read_text(encoding="utf-8")
    for form in PLANS:
        begin, end = f"<!-- plan {form} -->\n", f"<!-- end {form} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"workshop/GUIDE.md needs {begin.strip()} and {end} once")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = before + begin + table(form) + "\n" + end + after
    return text


def main(arguments: list[str]) -> int:
    wanted = page()
    if wanted != GUIDE.read_text(encoding="utf-8"):
        if "--check" in arguments:
            print("The plans changed: run python -m dpo_mini.course.workshop.plan.")
            return 1
        GUIDE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
