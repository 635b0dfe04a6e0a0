"""What a class solved, and which mistakes it made:

python -m dpo_mini.course.checks.collect PROGRESS.json...
"""

import argparse
from collections import Counter
from pathlib import Path

from dpo_mini.course import checks


def summary(paths: list[Path]) -> str:
    """A line a learner, then the mistakes that were recognised, the most frequent first."""
    mistakes: Counter = Counter()
    names = [e.id for chapter in checks.CHAPTERS for e in checks.exercises(chapter)]
    lines = [f"{'':24s} solved of {len(names)}, tries a solved one"]
    for path in paths:
        rows = checks.read_progress(path)
        solved = [row for id, row in rows.items() if row["solved"] and id in names]
        tries = sum(row["tries"] for row in solved) / max(1, len(solved))
        lines.append(f"{path.stem if path.stem != 'progress' else path.parent.name:24s} "
                     f"{len(solved):3d}, {tries:.1f}")  # fmt: skip
        mistakes.update((id, name) for id, row in rows.items() for name in row["mistakes"])
    lines += ["", "recognised mistakes"]
    lines += [f"{n:4d}  {id} {name}" for (id, name), n in mistakes.most_common(20)]
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m dpo_mini.course.checks.collect", description=__doc__
    )
    parser.add_argument("files", nargs="+", type=Path)
    print(summary(parser.parse_args(argv).files))


if __name__ == "__main__":
    main()
