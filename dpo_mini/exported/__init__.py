"""Scripts that `dpo-mini export` writes beside a run's pairs. Nothing here imports dpo_mini."""
