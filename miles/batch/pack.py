"""Rows of a batch as one packed micro batch: what a model's forward pass and a loss need, as flat tensors.

Rows stand one after another without padding, `cu_seqlens` says where each begins. Tokens never see another row:
position ids start at 0 in every row, and the attention of the backend cuts at `cu_seqlens`.

With `share_prompts`, rows with the same prompt (the samples of a group) have it once: under causal attention the states
of a prompt do not depend on what follows it, so one copy serves all of them, in the forward pass and with the sum of
their gradients in the backward pass. `row_places` then says where each row's tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miles.batch.ragged import IntArray, gathered, offsets_of, places_of, sliced
from miles.batch.types import TrainBatch


@dataclass(frozen=True)
class PackedBatch:
    """n rows with T tokens, R of them response tokens, in P <= T packed places, on one device.

    Example, rows [12, 9, 4, 5] (two response tokens) and [12, 8, 6] (one)::

        tokens = [12, 9, 4, 5, 12, 8, 6]    cu_seqlens = [0, 4, 7]    position_ids = [0, 1, 2, 3, 0, 1, 2]
        predicting = [1, 2, 5]    targets = [4, 5, 6]    response_lengths = [2, 1]    sample_ids = [0, 0, 1]
        row_places = [0, 1, 2, 3, 4, 5, 6]

    and rows [12, 9, 4, 5] and [12, 9, 6] with a shared prompt::

        tokens = [12, 9, 4, 5, 6]    cu_seqlens = [0, 4, 7]    predicting = [1, 2, 1]
        row_places = [0, 1, 2, 3, 0, 1, 4]

    The state at `predicting[r]` (the place t - 1) predicts the response token `targets[r]` (at place t).
    """

    rows: IntArray  # int64 [n], the rows of the batch they came from
    tokens: Tensor  # int64 [P]
    position_ids: Tensor  # int64 [P]
    cu_seqlens: Tensor  # int32 [n + 1], cumulative lengths of the rows
    row_places: Tensor  # int64 [T], row after row: the packed place of each of its tokens
    max_seqlen: int
    total_lengths: list[int]
    response_lengths: list[int]
    predicting: Tensor  # int64 [R], places in tokens
    targets: Tensor  # int64 [R], token ids
    sample_ids: Tensor  # int64 [R], which of the n rows each response token belongs to
    loss_mask: Tensor  # int32 [R]
    response_places: Tensor  # int64 [R], places of these response tokens in the batch's flat response columns
    # int64 [T], row after row: the place of each token in the batch's flat tokens; None where experts do not matter
    token_places: IntArray | None = None
    routed_experts: Tensor | None = None  # int64 [P, layers, top_k], the experts to take; -1 = the router's own choice

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, flat: Tensor) -> Tensor:
        """This micro batch's part of a response column of the whole batch: [R of the batch] -> [R]."""
        return flat[self.response_places.to(flat.device)].to(self.tokens.device)


def pack(
    batch: TrainBatch,
    rows: Sequence[int] | IntArray,
    *,
    device: torch.device | str = "cpu",
    share_prompts: bool = False,
    experts: npt.NDArray[np.int16] | None = None,
) -> PackedBatch:
    """Lay out the given rows of `batch` for one forward pass.

    `experts` [T of the batch, layers, top_k] prescribes the experts of each token, -1 leaves them to the router.
    """
    rows = np.asarray(rows, dtype=np.int64)
    total_lengths, response_lengths = batch.total_lengths[rows], batch.response_lengths[rows]
    cu_seqlens = offsets_of(total_lengths)
    one_row = np.arange(int(total_lengths.max(initial=0)), dtype=np.int64)
    position_ids = sliced(one_row, np.zeros_like(total_lengths), total_lengths)
    tokens = gathered(batch.tokens, batch.token_offsets, rows)
    response_starts = cu_seqlens[1:] - response_lengths
    token_places = None if experts is None else places_of(batch.token_offsets, rows)
    taken = None if experts is None else experts[token_places]
    row_places, kept = _places(tokens, cu_seqlens, total_lengths - response_lengths, share_prompts, taken)
    offsets = batch.response_offsets

    def put(array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return PackedBatch(
        rows=rows,
        tokens=put(tokens if kept is None else tokens[kept]),
        position_ids=put(position_ids if kept is None else position_ids[kept]),
        cu_seqlens=put(cu_seqlens.astype(np.int32)),
        row_places=put(row_places),
        max_seqlen=int(total_lengths.max(initial=0)),
        total_lengths=total_lengths.tolist(),
        response_lengths=response_lengths.tolist(),
        predicting=put(sliced(row_places, response_starts - 1, cu_seqlens[1:] - 1)),
        targets=put(sliced(tokens, response_starts, cu_seqlens[1:])),
        sample_ids=put(np.repeat(np.arange(len(rows), dtype=np.int64), response_lengths)),
        loss_mask=put(gathered(batch.loss_masks, offsets, rows)),
        response_places=put(places_of(offsets, rows)),
        token_places=token_places,
        routed_experts=None if taken is None else put((taken if kept is None else taken[kept]).astype(np.int64)),
    )


def one_token(device: torch.device | str) -> PackedBatch:
    """The smallest micro batch there is: one row of one token, which no loss ever sees."""
    zero, none = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return PackedBatch(
        rows=np.empty(0, dtype=np.int64),
        tokens=zero,
        position_ids=zero,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        row_places=zero,
        max_seqlen=1,
        total_lengths=[1],
        response_lengths=[0],
        predicting=none,
        targets=none,
        sample_ids=none,
        loss_mask=none.int(),
        response_places=none,
    )


def _places(
    tokens: IntArray,
    cu_seqlens: IntArray,
    prompt_lengths: IntArray,
    share_prompts: bool,
    experts: npt.NDArray[np.int16] | None,
) -> tuple[IntArray, IntArray | None]:
    """The packed place of each token [T], and which tokens are packed [P], ascending; None for all of them."""
    own = np.arange(len(tokens), dtype=np.int64)
    if not share_prompts:
        return own, None
    source, keep = own.copy(), np.ones(len(tokens), dtype=np.bool_)
    first_with: dict[bytes, int] = {}
    for start, length in zip(cu_seqlens[:-1].tolist(), prompt_lengths.tolist()):
        prompt = slice(start, start + length)
        key = tokens[prompt].tobytes() + (b"" if experts is None else experts[prompt].tobytes())
        first = first_with.setdefault(key, start)
        if first != start:
            source[prompt] = np.arange(first, first + length)
            keep[prompt] = False
    place = np.cumsum(keep) - 1
    return place[source], own[keep]
