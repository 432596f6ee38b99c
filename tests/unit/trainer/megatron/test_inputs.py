"""One micro batch as Megatron's models read it, in every layout, against loops over rows and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from miles.batch import PackedBatch, from_published_dict, pack
from miles.batch.pack import one_token
from miles.trainer.megatron.inputs import Inputs, arrange

# Prompt lengths (equal numbers are the same prompt) and response lengths of the rows.
BATCHES = {
    "unequal": [(3, 5), (4, 1), (1, 9), (6, 0)],
    "one token each": [(1, 1), (2, 1), (1, 1)],
    "a group": [(4, 3), (4, 6), (4, 1), (2, 2)],
    "one long row": [(7, 25)],
}


def positions_of(inputs: Inputs) -> Tensor:
    """Of packed rows those that travel with them; padded ones count from 0."""
    if inputs.packed is None:
        return torch.arange(inputs.tokens.shape[1])
    assert inputs.packed.positions is not None
    return inputs.packed.positions



def rows_of(name: str) -> list[list[int]]:
    """Token ids of each row; every response token of the batch has a number of its own."""
    made, fresh = [], iter(range(100, 1000))
    for prompt, response in BATCHES[name]:
        made.append([10 * prompt + i for i in range(prompt)] + [next(fresh) for _ in range(response)])
    return made


def micro_of(name: str, *, share_prompts: bool = False) -> PackedBatch:
    lengths = [response for _, response in BATCHES[name]]
    batch = from_published_dict(
        {
            "tokens": rows_of(name),
            "response_lengths": lengths,
            "rewards": [0.0] * len(lengths),
            "raw_reward": [0.0] * len(lengths),
            "truncated": [0] * len(lengths),
            "sample_indices": [*range(len(lengths))],
            "loss_masks": [[1] * n for n in lengths],
        }
    )
    return pack(batch, range(len(batch)), share_prompts=share_prompts)


@dataclass
class Group:
    """A context-parallel rank without a process: `arrange` asks only who it is."""

    number: int
    of: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.of


def predicted(inputs: Inputs) -> list[tuple[int, int]]:
    """(token, position) under each state that predicts a response token, in their order."""
    rows, positions = len(inputs.tokens), positions_of(inputs)
    return [
        (int(inputs.tokens[state % rows, state // rows]), int(positions[state // rows]))
        for state in inputs.states.tolist()
    ]


def wanted(name: str) -> list[tuple[int, int]]:
    """The token before each response token, and its position in its row."""
    found = []
    for row, (prompt, response) in zip(rows_of(name), BATCHES[name]):
        found += [(row[t - 1], t - 1) for t in range(prompt, prompt + response)]
    return found


def at_places(inputs: Inputs, micro: PackedBatch) -> None:
    """`places` names the token of each state, and -1 the padding, which is token 0."""
    states = inputs.tokens.T.reshape(-1).tolist()
    for token, place in zip(states, inputs.places.tolist(), strict=True):
        assert token == (0 if place < 0 else int(micro.tokens[place]))
    named = [place for place in inputs.places.tolist() if place >= 0]
    assert sorted(named) == [*range(len(micro.tokens))]


# ---- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("share", [False, True], ids=["whole prompts", "shared prompts"])
@pytest.mark.parametrize("name", BATCHES)
def test_packed_rows(name: str, share: bool, multiple: int) -> None:
    micro = micro_of(name, share_prompts=share)
    inputs = arrange(micro, multiple_of=multiple)
    size = len(micro.tokens)
    assert inputs.tokens.shape == (1, -(-size // multiple) * multiple) and inputs.share is None
    assert positions_of(inputs)[:size].tolist() == micro.position_ids.tolist() and not positions_of(inputs)[size:].any()
    at_places(inputs, micro)
    assert predicted(inputs) == wanted(name)
    # Attention sees each row whole, prompt first, and padding as a row of its own.
    padding = [[0] * (-size % multiple)] if size % multiple else []
    seen = [[int(inputs.tokens[0, place]) for place in row] for row in attended(inputs.packed)]
    assert seen == rows_of(name) + padding


def attended(packed: Any) -> list[list[int]]:
    """Row after row, the packed places that attention lays out."""
    packing = packed.packing
    padded = packing.to_padded.view(packing.rows, packing.width)
    return [row[:length].tolist() for row, length in zip(padded, packing.cu_seqlens.diff().tolist(), strict=True)]


def test_a_shared_prompt_is_there_once() -> None:
    inputs = arrange(micro_of("a group", share_prompts=True))
    assert inputs.tokens.shape[1] == (4 + 3 + 6 + 1) + (2 + 2)
    assert [row[:4] for row in attended(inputs.packed)[:3]] == [[0, 1, 2, 3]] * 3
    assert inputs.published is None  # the published description knows no row that stands in two places


def test_what_other_models_are_told() -> None:
    """PackedSeqParams as published: cumulative lengths of the rows, and of padding as one more."""
    micro = micro_of("unequal")
    published = arrange(micro, multiple_of=8).published
    assert published is not None and published.qkv_format == "thd"
    assert published.cu_seqlens_q.tolist() == published.cu_seqlens_kv.tolist() == [0, 8, 13, 23, 29, 32]
    assert published.cu_seqlens_q.dtype == torch.int32 and published.max_seqlen_q == published.max_seqlen_kv == 10


@pytest.mark.parametrize("layout", ["thd", "bshd"])
def test_the_smallest_micro_batch(layout: Any) -> None:
    inputs = arrange(one_token("cpu"), layout=layout, multiple_of=4)
    assert inputs.tokens.tolist() == [[0, 0, 0, 0]] and inputs.places.tolist() == [0, -1, -1, -1]
    assert len(inputs.states) == 0


# ---- padded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("name", BATCHES)
def test_padded_rows(name: str, multiple: int) -> None:
    micro = micro_of(name)
    inputs = arrange(micro, layout="bshd", multiple_of=multiple)
    rows = rows_of(name)
    longest = max(map(len, rows))
    width = -(-longest // multiple) * multiple
    assert inputs.tokens.tolist() == [row + [0] * (width - len(row)) for row in rows]
    at_places(inputs, micro)
    assert predicted(inputs) == wanted(name)
    assert inputs.packed is None and inputs.published is None


# ---- cut over ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_are_cut_over_ranks(name: str, size: int, multiple: int) -> None:
    micro, rows = micro_of(name), rows_of(name)
    ranks: list[Any] = [arrange(micro, context=Group(r, size), multiple_of=multiple) for r in range(size)]  # type: ignore[arg-type]
    states: dict[int, tuple[int, int]] = {}
    for r, inputs in enumerate(ranks):
        tokens, positions = zigzag(rows, r, size)
        room = -len(tokens) % multiple
        assert inputs.tokens[0].tolist() == tokens + [0] * room
        assert positions_of(inputs).tolist() == positions + [0] * room
        for token, place in zip(inputs.tokens[0].tolist(), inputs.places.tolist(), strict=True):
            assert token == (0 if place < 0 else int(micro.tokens[place]))
        assert inputs.share is not None
        for number, pair in zip(inputs.share.own.tolist(), predicted(inputs), strict=True):
            assert number not in states
            states[number] = pair
    # Every token is with one rank, and so is every state that predicts one.
    assert sorted(p for i in ranks for p in i.places.tolist() if p >= 0) == [*range(len(micro.tokens))]
    assert [states[n] for n in range(len(states))] == wanted(name)


def zigzag(rows: list[list[int]], rank: int, size: int) -> tuple[list[int], list[int]]:
    """Tokens and positions of one rank: of each row, cut into 2 * size chunks, numbers rank and 2 * size - 1 - rank."""
    tokens, positions = [], []
    for row in rows:
        length = -(-len(row) // (2 * size))
        padded = row + [0] * (2 * size * length - len(row))
        for chunk in (rank, 2 * size - 1 - rank):
            span = range(chunk * length, (chunk + 1) * length)
            tokens += [padded[i] for i in span]
            positions += [*span]
    return tokens, positions


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_over_ranks_is_attention_to_the_whole_row(name: str, size: int, multiple: int) -> None:
    """Keys and values of all ranks, put together, against plain causal attention of each row."""
    torch.manual_seed(0)
    micro, rows, scaling = micro_of(name), rows_of(name), 0.3
    ranks: list[Any] = [arrange(micro, context=Group(r, size), multiple_of=multiple) for r in range(size)]  # type: ignore[arg-type]
    table = torch.randn(3, 1100, 2, 4)  # what a token of this id has as query, key and value
    keys, values = (torch.cat([table[i, inputs.tokens[0]] for inputs in ranks]) for i in (1, 2))
    found: dict[int, Tensor] = {}
    for inputs in ranks:
        context = Gathered(inputs.packed.context, keys, values)
        out = context.attend(table[0, inputs.tokens[0]], scaling)
        for place, state in zip(inputs.places.tolist(), out, strict=True):
            if place >= 0:
                found[place] = state
    place = 0
    for row in rows:
        for t in range(len(row)):
            q, k, v = table[0, row[t]], table[1, row[: t + 1]], table[2, row[: t + 1]]
            weights = (torch.einsum("hd,shd->hs", q, k) * scaling).softmax(-1)
            assert torch.allclose(found[place], torch.einsum("hs,shd->hd", weights, v).flatten(), atol=1e-5)
            place += 1


class Gathered:
    """`ContextRows` of one rank, for which the gathering has been done."""

    def __init__(self, rows: Any, keys: Tensor, values: Tensor) -> None:
        self.rows, self.both = rows, iter((keys, values))

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        placed = (x.index_select(0, self.rows.gathered_places) for x in self.both)
        given = type(self.rows)(None, self.rows.own, self.rows.whole, self.rows.gathered_places, self.rows.mask)
        object.__setattr__(given, "_of_all_ranks", lambda _: next(placed))
        nothing = query.new_zeros(0)
        out: Tensor = given.attend(query, nothing, nothing, scaling=scaling, dropout=0.0)
        return out
