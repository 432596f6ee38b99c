"""Which rows each optimizer step takes, and how a step is cut into micro batches.

Inside a step, rows are sorted by length, so that the rows of one micro batch are about equally long: attention then
pads little, and token budgets fill well. Neither the loss nor its gradient depends on the cut (sums over samples);
results of passes come back in the order of the batch with `ragged.put_back`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from miles.batch.ragged import IntArray
from miles.errors import UsageError


def step_rows(num_rows: int, rows_per_step: int) -> list[IntArray]:
    """Consecutive rows of this rank per optimizer step; rows that fill no whole step are left out.

    Example: 7 rows, 3 per step: [0, 1, 2], [3, 4, 5].
    """
    assert rows_per_step >= 1, f"rows_per_step must be >= 1, got {rows_per_step}"
    return [
        np.arange(start, start + rows_per_step, dtype=np.int64)
        for start in range(0, num_rows - rows_per_step + 1, rows_per_step)
    ]


def by_count(rows: IntArray, lengths: IntArray, micro_batch_size: int) -> list[IntArray]:
    """Micro batches of `micro_batch_size` rows (`--micro-batch-size`), sorted by length; the last may be smaller.

    `lengths` are those of the whole batch, `rows` the part of it to cut.
    """
    assert micro_batch_size >= 1, f"micro_batch_size must be >= 1, got {micro_batch_size}"
    ordered = sorted_by_length(rows, lengths)
    return [ordered[start : start + micro_batch_size] for start in range(0, len(ordered), micro_batch_size)]


def by_tokens(
    rows: IntArray,
    lengths: IntArray,
    max_tokens: int,
    *,
    num_ranks: int = 1,
    at_least: int = 1,
    name_of: Callable[[int], str] = "row {}".format,
) -> list[IntArray]:
    """Micro batches of at most `max_tokens` tokens (`--max-tokens-per-gpu`) on each of the `num_ranks` context-parallel
    ranks that rows are divided among.

    Each holds rows of about equal length, consecutive ones once all are sorted: rows are padded to the longest of their
    micro batch inside attention, whose cost grows with the square of that. Among such cuts it is one with the fewest
    micro batches, but no fewer than `at_least` (what the data-parallel rank with the most needs: all ranks must run
    equally many), in which the fullest is as empty as can be. UsageError names a row that alone is longer than the
    budget, or says that there are fewer rows than `at_least`.
    """
    budget = max_tokens * num_ranks
    for row in rows[lengths[rows] > budget][:1].tolist():
        shared = f" for each of the {num_ranks} ranks that share it (--context-parallel-size)" if num_ranks > 1 else ""
        raise UsageError(
            f"{name_of(row)} has {lengths[row]} tokens, more than one micro batch may hold: --max-tokens-per-gpu is "
            f"{max_tokens}{shared}. Raise it, or keep samples shorter: lower --rollout-max-response-len, or cut the "
            "conversations."
        )
    if len(rows) < at_least:
        raise UsageError(
            f"{len(rows)} rows cannot fill the {at_least} micro batches that another data-parallel rank needs. Raise "
            "--max-tokens-per-gpu, or give --balance-data."
        )
    ordered = sorted_by_length(rows, lengths)
    ends = np.cumsum(lengths[ordered])
    number = max(len(consecutive(ends, budget)), at_least)
    if len(ordered) == 0:
        return []
    parts = consecutive(ends, least_capacity(ends, number, budget))
    return [np.array(part, dtype=np.int64) for part in halved([ordered[part].tolist() for part in parts], number)]


def num_by_tokens(rows: IntArray, lengths: IntArray, max_tokens: int) -> int:
    """How many micro batches `by_tokens` makes of these rows: what ranks compare before they cut."""
    return len(consecutive(np.cumsum(lengths[sorted_by_length(rows, lengths)]), max_tokens))


def consecutive(ends: IntArray, capacity: int) -> list[slice]:
    """Consecutive rows until the next would exceed `capacity`, again and again; `ends` are cumulative lengths.

    Example: lengths 2, 3, 3, 6 are ends = [2, 5, 8, 14]; with a capacity of 6 they give the rows 0:2, 2:3, 3:4.
    """
    parts: list[slice] = []
    start, taken = 0, 0
    while start < len(ends):
        end = int(np.searchsorted(ends, taken + capacity, side="right"))
        parts.append(slice(start, max(end, start + 1)))
        start = parts[-1].stop
        taken = int(ends[start - 1])
    return parts


def least_capacity(ends: IntArray, number: int, max_tokens: int) -> int:
    """The smallest capacity with which `consecutive` makes at most `number` parts, found by bisection."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        fits = np.diff(ends, prepend=0).max() <= middle and len(consecutive(ends, middle)) <= number
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def halved(bins: list[list[int]], number: int) -> list[list[int]]:
    """As many bins as asked for, by halving those with the most rows; each part holds neighbours."""
    bins = list(bins)
    while len(bins) < number:
        bins.sort(key=len)
        largest = bins.pop()
        bins += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return bins


def sorted_by_length(rows: IntArray, lengths: IntArray) -> IntArray:
    """Shortest first; equal lengths in the order of the batch."""
    rows = np.asarray(rows, dtype=np.int64)
    return rows[np.argsort(lengths[rows], kind="stable")]
