"""The published import path of `miles.batch.seqlen_balancing`."""

from __future__ import annotations

from miles.batch.seqlen_balancing import (
    get_reverse_idx,
    get_seqlen_balanced_partitions,
    greedy_partition,
    karmarkar_karp,
)

__all__ = ["get_reverse_idx", "get_seqlen_balanced_partitions", "greedy_partition", "karmarkar_karp"]
