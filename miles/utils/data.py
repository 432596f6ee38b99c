"""Published path of `miles.rollout.dataset`, and of a count that batch planning of plug-ins uses."""

from __future__ import annotations

from collections.abc import Sequence

from miles.rollout.dataset import Dataset, filter_long_prompt, read_file

__all__ = ["Dataset", "filter_long_prompt", "get_minimum_num_micro_batch_size", "read_file"]


def get_minimum_num_micro_batch_size(total_lengths: Sequence[int], max_tokens_per_gpu: int) -> int:
    """How many micro batches first-fit needs for rows in this order; a row longer than the budget gets its own.

    Example: `get_minimum_num_micro_batch_size([3, 4, 2], 5)` is 2.
    """
    rooms: list[int] = []
    for length in total_lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(max_tokens_per_gpu - length)
        else:
            rooms[place] -= length
    return len(rooms)
