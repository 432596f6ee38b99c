"""Published path of `miles.rollout.dataset`."""

from miles.rollout.dataset import Dataset, filter_long_prompt, read_file

__all__ = ["Dataset", "filter_long_prompt", "read_file"]
