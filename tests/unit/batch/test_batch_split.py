"""Flattening, trimming, splitting over ranks, number partitioning, micro batches, and results put back in order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import miles.utils.seqlen_balancing as published_path
from miles.batch import (
    by_count,
    by_tokens,
    flatten_groups,
    from_published_dict,
    num_by_tokens,
    put_back,
    rows_per_rank,
    split_batch,
    step_rows,
    trim_rollout,
)
from miles.batch.micro import halved
from miles.batch.ragged import offsets_of
from miles.batch.seqlen_balancing import (
    get_reverse_idx,
    get_seqlen_balanced_partitions,
    greedy_partition,
    karmarkar_karp,
)
from miles.errors import UsageError
from miles.types import Sample

lengths_lists = st.lists(st.integers(0, 50), min_size=1, max_size=30)


def samples(n: int) -> list[Sample]:
    return [Sample(index=i) for i in range(n)]


# ---- flatten and trim --------------------------------------------------------------------------------------------


def test_flatten_any_nesting() -> None:
    a, b, c, d = samples(4)
    for nested in ([a, b, c, d], [[a, b], [c, d]], [[[a], [b, c]], [[d]]], [[a, [b, c]], [d]]):
        assert [s.index for s in flatten_groups(nested)] == [0, 1, 2, 3]
    assert flatten_groups([]) == []


@pytest.mark.parametrize(
    ("n", "size", "options", "kept", "used"),
    [
        (8, 4, {}, 8, 4),
        (11, 4, {}, 8, 4),
        (11, 4, {"enabled": False}, 11, 4),
        (11, 4, {"dynamic": True, "dp_size": 2}, 10, 10),
        (11, None, {"dynamic": True}, 11, 11),
        (11, 4, {"dynamic": True, "enabled": False}, 11, 4),
    ],
)
def test_trim(n: int, size: int | None, options: dict[str, Any], kept: int, used: int) -> None:
    result = trim_rollout(samples(n), size, **options)
    assert [s.index for s in result.samples] == list(range(kept))
    assert (result.global_batch_size, len(result.samples)) == (used, kept)


@pytest.mark.parametrize(
    ("n", "size", "options", "message"),
    [
        (3, 4, {}, "The rollout gave 3 samples, fewer than one optimizer step of 4 .--global-batch-size"),
        (0, 4, {}, "The rollout gave 0 samples"),
        (3, 4, {"enabled": False}, "fewer than one optimizer step"),
        (3, 4, {"dynamic": True, "dp_size": 4}, "--use-dynamic-global-batch-size"),
        (3, None, {}, "--global-batch-size: expected .* Give it, or --num-steps-per-rollout"),
    ],
)
def test_nothing_left_names_the_flags(n: int, size: int | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trim_rollout(samples(n), size, **options)


# ---- number partitioning -----------------------------------------------------------------------------------------


def test_published_path() -> None:
    assert published_path.karmarkar_karp is karmarkar_karp


@given(lengths_lists, st.integers(1, 6), st.booleans(), st.sampled_from([karmarkar_karp, greedy_partition]))
def test_partitions_hold_every_index_once(lengths: list[int], k: int, equal_size: bool, method: Any) -> None:
    if equal_size:
        lengths = lengths * k
    parts = method(lengths, k, equal_size)
    assert len(parts) == k
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    if equal_size:
        assert {len(part) for part in parts} == {len(lengths) // k}
    sums = [sum(lengths[i] for i in part) for part in parts]
    if not equal_size:
        assert max(sums) - min(sums) <= max(lengths)


@example([0, 0, 0], 3)
@given(lengths_lists, st.integers(1, 6))
def test_balanced_partitions_are_ascending_and_not_empty(lengths: list[int], k: int) -> None:
    if len(lengths) < k:
        with pytest.raises(ValueError, match="cannot fill"):
            get_seqlen_balanced_partitions(lengths, k, False)
        return
    parts = get_seqlen_balanced_partitions(lengths, k, False)
    assert all(part and part == sorted(part) for part in parts)


def test_karmarkar_karp_beats_greedy_on_the_textbook_case() -> None:
    """{8, 7, 6, 5, 4} in two: differencing leaves 2, greedy 4 (Karmarkar and Karp's own example)."""

    def spread(parts: list[list[int]]) -> int:
        sums = [sum((8, 7, 6, 5, 4)[i] for i in part) for part in parts]
        return max(sums) - min(sums)

    assert spread(karmarkar_karp([8, 7, 6, 5, 4], 2, False)) == 2
    assert spread(greedy_partition([8, 7, 6, 5, 4], 2, False)) == 4


@pytest.mark.parametrize("method", [karmarkar_karp, greedy_partition])
def test_equal_size_needs_a_multiple(method: Any) -> None:
    with pytest.raises(ValueError, match="5 lengths cannot be split into 2"):
        method([1, 2, 3, 4, 5], 2, True)


@given(st.permutations(list(range(8))))
def test_reverse_index(permutation: list[int]) -> None:
    inverse = get_reverse_idx(permutation)
    assert [inverse[target] for target in permutation] == list(range(8))


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_strided_ranks() -> None:
    assert [r.tolist() for r in rows_per_rank(np.ones(6, np.int64), 2, balance=False)] == [[0, 2, 4], [1, 3, 5]]


@given(lengths_lists, st.integers(1, 4))
def test_balanced_ranks(lengths: list[int], dp_size: int) -> None:
    total = np.array(lengths * dp_size, dtype=np.int64)
    ranks = rows_per_rank(total, dp_size, balance=True)
    assert sorted(itertools.chain(*(r.tolist() for r in ranks))) == list(range(len(total)))
    assert {len(r) for r in ranks} == {len(lengths)}
    assert all(r.tolist() == sorted(r.tolist()) for r in ranks)


def test_balance_evens_out_tokens() -> None:
    total = np.array([100, 1, 100, 1], dtype=np.int64)
    sums = [[int(total[r].sum()) for r in rows_per_rank(total, 2, balance=balance)] for balance in (False, True)]
    assert sums == [[200, 2], [101, 101]]


def test_shards_are_batches() -> None:
    data = {"tokens": [[1, 2], [3, 4, 5], [6, 7], [8, 9]], "response_lengths": [1, 2, 1, 1]}
    batch = from_published_dict(data | {"loss_masks": [[1], [1, 0], [1], [0]], "rewards": [1.0, 2.0, 3.0, 4.0]})
    shards = split_batch(batch, 2, balance=False)
    assert shards[1].as_dict()["tokens"] == [[3, 4, 5], [8, 9]]
    assert shards[1].as_dict()["rewards"] == [2.0, 4.0]
    assert split_batch(batch, 1, balance=True) == [batch]


def test_ranks_must_get_equally_many() -> None:
    with pytest.raises(UsageError, match="5 samples cannot be shared equally by 2 data-parallel ranks"):
        rows_per_rank(np.ones(5, np.int64), 2, balance=False)


# ---- steps and micro batches -------------------------------------------------------------------------------------


def test_steps_are_consecutive() -> None:
    assert [s.tolist() for s in step_rows(7, 3)] == [[0, 1, 2], [3, 4, 5]]
    assert step_rows(2, 3) == []


@given(lengths_lists, st.integers(1, 7))
def test_micro_batches_by_count(lengths: list[int], size: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    micros = by_count(np.arange(len(lengths)), array, size)
    assert sorted(itertools.chain(*(m.tolist() for m in micros))) == list(range(len(lengths)))
    assert [len(m) for m in micros[:-1]] == [size] * (len(micros) - 1) and 1 <= len(micros[-1]) <= size
    in_order = [lengths[i] for m in micros for i in m]
    assert in_order == sorted(lengths)


@given(lengths_lists, st.integers(50, 120), st.integers(1, 8))
def test_micro_batches_by_tokens(lengths: list[int], budget: int, at_least: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = np.arange(len(lengths))
    needed = num_by_tokens(rows, array, budget)
    assert -(-sum(lengths) // budget) <= max(needed, 1) <= max(2 * -(-sum(lengths) // budget), 1)
    if len(lengths) < at_least:
        with pytest.raises(UsageError, match="cannot fill"):
            by_tokens(rows, array, budget, at_least=at_least)
        return
    micros = by_tokens(rows, array, budget, at_least=at_least)
    assert len(micros) == max(needed, at_least)
    assert sorted(itertools.chain(*(m.tolist() for m in micros))) == list(range(len(lengths)))
    assert all(len(m) and array[m].sum() <= budget for m in micros)


def test_only_the_given_rows_are_cut() -> None:
    lengths = np.array([9, 3, 9, 1], dtype=np.int64)
    assert [m.tolist() for m in by_count(np.array([1, 3]), lengths, 1)] == [[3], [1]]
    assert [m.tolist() for m in by_tokens(np.array([1, 3]), lengths, 4)] == [[3, 1]]


def test_bins_are_halved_until_there_are_enough() -> None:
    bins = [[1, 2, 3, 4], [5], [6, 7]]
    assert halved(bins, 2) == bins
    for number in (4, 5, 6, 7):
        parts = halved(bins, number)
        assert len(parts) == number and all(parts)
        assert sorted(itertools.chain(*parts)) == [1, 2, 3, 4, 5, 6, 7]
        assert all(any(set(part) <= set(bin_) for bin_ in bins) for part in parts)


def test_a_row_over_the_budget_is_named() -> None:
    with pytest.raises(UsageError, match=r"sample 24 has 9 tokens, .* --max-tokens-per-gpu is 8"):
        by_tokens(np.array([0, 1]), np.array([3, 9]), 8, name_of={1: "sample 24"}.__getitem__)


def test_context_parallel_ranks_share_a_row() -> None:
    rows, lengths = np.array([0, 1]), np.array([3, 9])
    assert [m.tolist() for m in by_tokens(rows, lengths, 5, num_ranks=2)] == [[0], [1]]
    assert [m.tolist() for m in by_tokens(rows, lengths, 6, num_ranks=2)] == [[0, 1]]
    with pytest.raises(UsageError, match=r"has 9 tokens, .* is 4 for each of the 2 ranks that share it"):
        by_tokens(rows, lengths, 4, num_ranks=2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_results_come_back_in_order(lengths: list[int], size: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    flat = torch.arange(sum(lengths), dtype=torch.float64)
    offsets = offsets_of(array)
    micros = by_count(np.arange(len(lengths)), array, size)
    pieces = [torch.cat([flat[offsets[i] : offsets[i + 1]] for i in m]) for m in micros]
    assert torch.equal(put_back(pieces, micros, array), flat)


def test_put_back_refuses_missing_rows() -> None:
    with pytest.raises(AssertionError, match="exactly once"):
        put_back([torch.zeros(1)], [np.array([0])], np.array([1, 1]))
