"""The layout of rows that context parallelism has cut, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.loss.context_parallel import ContextShare, share_of

rows = st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), max_size=5)


def shares(lengths: list[tuple[int, int]], size: int) -> list[ContextShare]:
    totals, responses = [total for total, _ in lengths], [response for _, response in lengths]
    return [share_of(totals, responses, rank=rank, size=size) for rank in range(size)]


def slow_layout(lengths: list[tuple[int, int]], rank: int, size: int) -> list[tuple[int, int]]:
    """(row, position) of each local place, padding included: two chunks of each row."""
    places = []
    for row, (total, _) in enumerate(lengths):
        chunk = (total + 2 * size - 1) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            places += [(row, number * chunk + i) for i in range(chunk)]
    return places


@given(rows, st.integers(2, 4))
def test_the_layout(lengths: list[tuple[int, int]], size: int) -> None:
    flat = [(row, place) for row, (total, _) in enumerate(lengths) for place in range(total)]
    answers = [(row, place) for row, (total, n) in enumerate(lengths) for place in range(total - n, total)]
    owners = [0] * len(answers)
    for rank, share in enumerate(shares(lengths, size)):
        layout = slow_layout(lengths, rank, size)
        assert share.position_ids.tolist() == [place for _, place in layout] and share.num_places == len(layout)
        assert share.token_places.tolist() == [flat.index(x) if x in flat else -1 for x in layout]
        tokens = torch.arange(10, 10 + len(flat))
        assert share.local_tokens(tokens, -5).tolist() == [10 + flat.index(x) if x in flat else -5 for x in layout]
        own = [i for i, (row, place) in enumerate(answers) if (row, place - 1) in layout]
        assert share.own.tolist() == own and share.num_response == len(answers)
        assert share.places.tolist() == [layout.index((row, place - 1)) for row, place in (answers[i] for i in own)]
        assert share.own_lengths == [sum(answers[i][0] == row for i in own) for row in range(len(lengths))]
        padded = [0]
        for total, _ in lengths:
            padded.append(padded[-1] + -(-total // (2 * size)) * 2 * size)
        assert share.cu_seqlens().tolist() == padded and share.cu_seqlens().dtype == torch.int32
        for i in own:
            owners[i] += 1
    assert owners == [1] * len(answers)


@given(rows, st.integers(2, 3))
def test_pieces_of_a_column(lengths: list[tuple[int, int]], size: int) -> None:
    column = torch.arange(float(sum(n for _, n in lengths)))
    parts = [share.pieces(column) for share in shares(lengths, size)]
    assert all(len(pieces) == len(lengths) for pieces in parts)
    for row, (_, n) in enumerate(lengths):
        start = sum(m for _, m in lengths[:row])
        joined = sorted(x for pieces in parts for x in pieces[row].tolist())
        assert joined == list(range(start, start + n))


def test_the_example_of_the_docstring() -> None:
    share = share_of([10, 5], [4, 4], rank=0, size=2)
    assert share.chunk_sizes.tolist() == [3, 2] and share.local_lengths.tolist() == [6, 4] and share.num_response == 8
    assert (share.own.tolist(), share.places.tolist(), share.own_lengths) == ([4, 5], [6, 7], [0, 2])


def test_one_rank_owns_everything_where_it_stands() -> None:
    share = share_of([4, 3], [2, 1], rank=0, size=1)
    assert share.own.tolist() == [0, 1, 2] and share.places.tolist() == [1, 2, 5]
    assert share.token_places.tolist() == list(range(7))
    padded = share_of([4, 3], [2, 1], rank=0, size=1, padded_lengths=[5, 5])
    assert padded.places.tolist() == [1, 2, 6]
    assert padded.token_places.tolist() == [0, 1, 2, 3, -1, 4, 5, 6, -1, -1]


def test_a_response_without_a_prompt() -> None:
    with pytest.raises(ValueError, match="row 1: a response of 3 tokens in a row of 3"):
        share_of([4, 3], [2, 3], rank=0, size=2)
