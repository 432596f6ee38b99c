"""One batch to one shard per data-parallel rank."""

from __future__ import annotations

import numpy as np

from miles.batch.ragged import IntArray
from miles.batch.seqlen_balancing import get_seqlen_balanced_partitions
from miles.batch.types import TrainBatch
from miles.errors import UsageError


def rows_per_rank(total_lengths: IntArray, dp_size: int, *, balance: bool) -> list[IntArray]:
    """The rows of each data-parallel rank, ascending, equally many for all.

    Strided by default: rank i gets rows i, i + dp_size, ... so that the ranks' k-th steps together hold the rollout's
    k-th samples. With `balance` (`--balance-data`) the ranks' token counts are made equal instead.
    """
    n = len(total_lengths)
    if n % dp_size:
        raise UsageError(
            f"{n} samples cannot be shared equally by {dp_size} data-parallel ranks. Let --global-batch-size be a "
            "multiple of the data-parallel size, and do not give --disable-rollout-trim-samples."
        )
    if not balance or dp_size == 1:
        return [np.arange(rank, n, dp_size, dtype=np.int64) for rank in range(dp_size)]
    if n == 0:
        return [np.empty(0, dtype=np.int64) for _ in range(dp_size)]
    partitions = get_seqlen_balanced_partitions(total_lengths.tolist(), dp_size, equal_size=True)
    return [np.array(rows, dtype=np.int64) for rows in partitions]


def split_batch(batch: TrainBatch, dp_size: int, *, balance: bool) -> list[TrainBatch]:
    """One shard per data-parallel rank."""
    if dp_size == 1:
        return [batch]
    return [batch.select(rows) for rows in rows_per_rank(batch.total_lengths, dp_size, balance=balance)]
