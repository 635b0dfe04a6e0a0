"""A folder for nbgrader, made of the solutions:

    python -m dpo_mini.course.workshop.nbgrader_course FOLDER [03_partition_function ...]

nbgrader itself belongs into an environment of its own, which has this course installed too. The
configuration runs unsolved checks as errors, so that they cost their points, and stops a cell that
does not end.
"""

import shutil
import sys
from pathlib import Path

from dpo_mini.course.workshop.short import SOLUTIONS

CONFIGURATION = '''"""Written by dpo_mini.course.workshop.nbgrader_course."""
import os

os.environ["DPO_MINI_CHECKS"] = "strict"  # an unsolved check raises, and costs its points
os.environ["DPO_MINI_PROGRESS"] = os.devnull
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "dpo_mini"
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\\nraise NotImplementedError()"}
c.Execute.timeout = 60  # seconds a cell
c.Execute.interrupt_on_timeout = True
'''


def prepare(folder: Path, names: list[str] | None = None) -> list[str]:
    """Write source/NAME/NAME.ipynb for each chapter, and nbgrader_config.py; returns the names."""
    paths = sorted(SOLUTIONS.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in paths if not names or path.stem in names]
    for path in chosen:
        place = folder / "source" / path.stem
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / path.name)
    (folder / "nbgrader_config.py").write_text(CONFIGURATION, encoding="utf-8")
    return [path.stem for path in chosen]


if __name__ == "__main__":
    for name in prepare(Path(sys.argv[1]), sys.argv[2:]):
        print(name)
