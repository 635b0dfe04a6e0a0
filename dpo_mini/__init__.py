"""dpo_mini: Direct Preference Optimization, small enough to read and complete enough to use."""

__version__ = "0.1.0"
