"""Where the time of `dpo-mini demo` goes, stage by stage."""

import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import dpo_mini.demo as main_job


def stages() -> dict:
    """Run the demo with its defaults; each stage's share of the whole."""
    seconds = Counter()

    @contextmanager
    def timed(stage):
        start = time.perf_counter()
        yield
        seconds[stage] += time.perf_counter() - start

    def timing(function, stage):
        def call(*args, **kwargs):
            with timed(stage):
                return function(*args, **kwargs)

        return call

    names = {
        "sampled_pairs": "sample and label",
        "train_preferences": "train, with what is sampled on the way",
        "evaluate": "evaluate",
        "held_out_accuracy": "evaluate",
    }
    replaced = {name: timing(getattr(main_job, name), stage) for name, stage in names.items()}
    with tempfile.TemporaryDirectory() as folder, patch.multiple(main_job, **replaced):
        with timed("whole"):
            report = main_job.demo(folder, progress=False)
    whole = seconds.pop("whole")
    shares = {stage: part / whole for stage, part in seconds.items()}
    return {
        "shares": {**shares, "rest": 1 - sum(shares.values())},
        "P(positive)": report["reward_policy"]["mean"],
    }  # fmt: skip
