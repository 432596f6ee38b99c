"""Number partitioning: distribute lengths over k partitions so that their sums are as equal as possible.

The published functions (`miles.utils.seqlen_balancing` re-exports them). All return lists of indices into the lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Any

Bin = tuple[int, list[int]]


def karmarkar_karp(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """The largest differencing method (Karmarkar and Karp 1982), for k partitions.

    Partial solutions of k bins each start as one length apiece (`equal_size`: as k lengths, one per bin, so that all
    bins end with equally many). The two with the widest spread are merged, the fullest bin of one with the emptiest of
    the other, until one is left. ValueError where `equal_size` and the number of lengths is no multiple of k.
    """
    n = len(seqlen_list)
    if equal_size and n % k_partitions:
        raise ValueError(f"{n} lengths cannot be split into {k_partitions} partitions of equal size")
    ascending = sorted(range(n), key=lambda i: (seqlen_list[i], i))
    step = k_partitions if equal_size else 1
    serial = count()
    heap: list[tuple[int, int, list[Bin]]] = []
    for start in range(0, n, step):
        bins: list[Bin] = [(seqlen_list[i], [i]) for i in reversed(ascending[start : start + step])]
        bins += [(0, [])] * (k_partitions - len(bins))
        heap.append((bins[-1][0] - bins[0][0], next(serial), bins))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, wide = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = [(a + b, left + right) for (a, left), (b, right) in zip(wide, reversed(other))]
        # Fullest first; an empty bin after a bin of zero lengths, so that no bin stays empty while others hold several.
        merged.sort(key=lambda bin_: (-bin_[0], -len(bin_[1])))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], next(serial), merged))
    return [indices for _, indices in heap[0][2]] if heap else [[] for _ in range(k_partitions)]


def greedy_partition(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Longest first, each to the partition with the smallest sum (`equal_size`: among those with fewest entries)."""
    if equal_size and len(seqlen_list) % k_partitions:
        raise ValueError(f"{len(seqlen_list)} lengths cannot be split into {k_partitions} partitions of equal size")
    partitions: list[list[int]] = [[] for _ in range(k_partitions)]
    heap = [(0, 0, k) for k in range(k_partitions)]  # entries (if they count), sum, partition
    for i in sorted(range(len(seqlen_list)), key=lambda i: (-seqlen_list[i], i)):
        entries, total, k = heapq.heappop(heap)
        partitions[k].append(i)
        heapq.heappush(heap, (entries + int(equal_size), total + seqlen_list[i], k))
    return partitions


def get_seqlen_balanced_partitions(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """`karmarkar_karp`, each partition in ascending order and none empty. ValueError for fewer lengths than k."""
    if len(seqlen_list) < k_partitions:
        raise ValueError(f"{len(seqlen_list)} lengths cannot fill {k_partitions} partitions")
    return [sorted(indices) for indices in karmarkar_karp(seqlen_list, k_partitions, equal_size)]


def get_reverse_idx(idx_map: Sequence[int]) -> list[int]:
    """The inverse of a permutation: `result[idx_map[i]] == i`."""
    inverse: list[Any] = [None] * len(idx_map)
    for i, target in enumerate(idx_map):
        inverse[target] = i
    return inverse
