"""Rows that context parallelism has cut over ranks: what each rank owns, and columns on their way between the ranks.

The layout is Megatron's and TransformerEngine's for packed rows (thd): each row is padded to a multiple of 2 * size and
cut into as many chunks; rank r owns the chunks r and 2 * size - 1 - r, so that all ranks have equal work under causal
attention. Its tokens are, row after row, these two chunks. A row of 10 tokens on 2 ranks, chunks of 3::

    tokens      0 1 2 | 3 4 5 | 6 7 8 | 9 . .
    rank          0       1       1       0

The state at t - 1 scores the response token t: the token belongs to the rank that has the state. With 4 response tokens
(6 to 9) above, rank 1 owns the states 5 to 8, and thus the tokens 6 to 9; rank 0 owns none.

Two kinds of gradient cross the ranks, and which one is right depends on who computes the loss:

    every rank computes the whole loss     `gather_response`, `cut_response`, `sum_of_parts`: all ranks have the same
    (built-in losses)                      gradient of whole columns; each takes its own part and nothing is summed
    every rank computes its part of it     `gather_response_of_parts`: what all parts pull at a token is summed
    (custom losses)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from miles.loss.logprobs import TokenLogProbs
from miles.loss.parallel_state import ParallelState

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContextShare:
    """What rank `rank` of `size` owns of n rows with R response tokens in all.

    Example, rank 0 of 2 with rows of 10 and 5 tokens, of which 4 and 4 are the response::

        chunk_sizes = [3, 2]    local_lengths = [6, 4]    num_response = 8
        own = [4, 5]            of the flat response tokens, the first two of the second row are this rank's ...
        places = [6, 7]         ... whose states are at these places of its 10 packed tokens
        own_lengths = [0, 2]
    """

    rank: int
    size: int
    total_lengths: IntArray  # int64 [n]
    chunk_sizes: IntArray  # int64 [n]; of one rank, the whole rows
    own: Tensor  # int64 [R_local], ascending: places in the flat response tokens
    places: Tensor  # int64 [R_local]: the predicting states' places in this rank's packed tokens
    own_lengths: list[int]  # [n], sums to R_local
    num_response: int

    @property
    def local_lengths(self) -> IntArray:
        """int64 [n]: tokens of each row on this rank, padding included."""
        return self.chunk_sizes * (1 if self.size == 1 else 2)

    @property
    def num_places(self) -> int:
        """This rank's packed tokens, padding included."""
        return int(self.local_lengths.sum())

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [num_places]: the position of each local token in its row; padding counts on."""
        return torch.from_numpy(self._positions()[1]).to(self.own.device)

    @cached_property
    def token_places(self) -> Tensor:
        """int64 [num_places]: where each local token stands among the tokens of all rows, -1 for padding."""
        rows, positions = self._positions()
        starts = offsets_of(self.total_lengths)[:-1]
        places = np.where(positions < self.total_lengths[rows], starts[rows] + positions, -1)
        return torch.from_numpy(places).to(self.own.device)

    def cu_seqlens(self) -> Tensor:
        """int32 [n + 1]: cumulative padded lengths of whole rows (local ones times `size`)."""
        offsets = offsets_of(self.local_lengths) * self.size
        return torch.from_numpy(offsets.astype(np.int32)).to(self.own.device)

    def local_tokens(self, flat: Tensor, fill: float = 0) -> Tensor:
        """This rank's part of a value per token of all rows, [T, ...] -> [num_places, ...]; padding gets `fill`."""
        missing = self.token_places < 0
        if not len(flat):
            return flat.new_full((len(missing), *flat.shape[1:]), fill)
        local = flat.index_select(0, self.token_places.clamp(min=0))
        return local.masked_fill_(missing.view(-1, *[1] * (flat.dim() - 1)), fill)

    def pieces(self, column: Tensor) -> list[Tensor]:
        """A response column of all ranks [R] as this rank's part of each sample, as plug-ins receive it."""
        return list(torch.split(column.index_select(0, self.own), self.own_lengths))

    def _positions(self) -> tuple[IntArray, IntArray]:
        """(row, position in the row) of each local token, int64 [num_places] each."""
        lengths = self.local_lengths
        rows = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        inside = np.arange(len(rows), dtype=np.int64) - offsets_of(lengths)[rows]
        chunk = self.chunk_sizes[rows]
        second = inside >= chunk
        first_of_chunk = np.where(second, (2 * self.size - 1 - self.rank) * chunk, self.rank * chunk)
        return rows, first_of_chunk + inside - np.where(second, chunk, 0)


def share_of(
    total_lengths: Sequence[int] | IntArray,
    response_lengths: Sequence[int] | IntArray,
    *,
    rank: int,
    size: int,
    device: torch.device | str = "cpu",
    padded_lengths: Sequence[int] | None = None,
) -> ContextShare:
    """What one rank owns. `padded_lengths` are those of the rows of a padded batch (bshd), one after another; in a
    packed one a row takes as many places as it has tokens. ValueError for a response token that no state predicts."""
    totals, responses = (np.asarray(x, dtype=np.int64) for x in (total_lengths, response_lengths))
    unpredicted = (responses > 0) & (responses >= totals)
    if unpredicted.any():
        row = int(unpredicted.argmax())
        raise ValueError(
            f"row {row}: a response of {responses[row]} tokens in a row of {totals[row]}: its first token has no token "
            "before it that could predict it. Expected a prompt of at least one token."
        )
    padded = totals if padded_lengths is None else np.asarray(padded_lengths, dtype=np.int64)
    chunk_sizes = padded if size == 1 else -(-padded // (2 * size))
    local_starts = offsets_of(chunk_sizes * (1 if size == 1 else 2))
    rows = np.repeat(np.arange(len(totals), dtype=np.int64), responses)
    states = np.arange(len(rows), dtype=np.int64) - offsets_of(responses)[rows] + (totals - responses - 1)[rows]
    chunk, inside = np.divmod(states, chunk_sizes[rows])
    second = chunk >= size
    own = np.flatnonzero(np.where(second, 2 * size - 1 - chunk, chunk) == rank)
    places = (local_starts[rows] + np.where(second, chunk_sizes[rows], 0) + inside)[own]
    return ContextShare(
        rank=rank,
        size=size,
        total_lengths=totals,
        chunk_sizes=chunk_sizes,
        own=torch.from_numpy(own).to(device),
        places=torch.from_numpy(places).to(device),
        own_lengths=np.bincount(rows[own], minlength=len(totals)).tolist(),
        num_response=len(rows),
    )


def local_share(
    parallel_state: ParallelState,
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    device: torch.device | str,
) -> ContextShare:
    """That of this process, for packed rows."""
    rank, size = parallel_state.cp_rank, parallel_state.cp_size
    return share_of(total_lengths, response_lengths, rank=rank, size=size, device=device)


def offsets_of(lengths: IntArray) -> IntArray:
    """Cumulative lengths with a leading 0: int64 [n] -> int64 [n + 1]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


# ---- between the ranks; every rank of the group calls these in the same order ----------------------------------------


def group_of(parallel_state: ParallelState) -> dist.ProcessGroup | None:
    """The context-parallel group; None where samples are whole. ValueError for a size without a group."""
    if parallel_state.cp_size == 1:
        return None
    if parallel_state.cp_group is None:
        raise ValueError(f"ParallelState: cp_size {parallel_state.cp_size} without a cp_group")
    return parallel_state.cp_group


def gather_response(local: Tensor, share: ContextShare, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's part [R_local] as the whole column [R], on every rank. Backward gives each rank its own part of its
    own gradient: right where every rank computes the whole loss from it."""
    return _gathered(local, share.own, share.num_response, group, sum_gradients=False)


def gather_response_of_parts(local: Tensor, own: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's part as the whole column [size], with this rank's at the places `own`. Backward gives each rank its
    own part of the SUM of all ranks' gradients: right where every rank computes its own part of the loss from it. Every
    rank must take part in the backward pass."""
    return _gathered(local, own, size, group, sum_gradients=True)


def gathered_log_probs(local: TokenLogProbs, share: ContextShare, group: dist.ProcessGroup | None) -> TokenLogProbs:
    """`gather_response` of log-probs and entropies."""
    entropy = None if local.entropy is None else gather_response(local.entropy, share, group)
    return TokenLogProbs(gather_response(local.log_probs, share, group), entropy)


def cut_response(column: Tensor, share: ContextShare, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part [R_local] of a column [R] that all ranks have. Backward gathers the parts' gradients, so that
    every rank has that of the whole column: the inverse of `gather_response`."""
    if group is None:
        return column
    cut: Tensor = _Cut.apply(column, share.own, group)  # type: ignore[no-untyped-call]
    return cut


def sum_of_parts(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's part of a value. Backward gives each rank the gradient of its own part."""
    if group is None:
        return value
    total: Tensor = _SumOfParts.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def tied(value: Tensor, to: Tensor) -> Tensor:
    """`value`; in the backward pass it also reaches `to`, with zeros. A rank whose plug-in ignored `to` (it owns no
    token, say) would otherwise leave the others waiting in the collective behind it."""
    if not (to.requires_grad and torch.is_grad_enabled()):
        return value
    result: Tensor = _Tie.apply(value, to)  # type: ignore[no-untyped-call]
    return result


def _gathered(local: Tensor, own: Tensor, size: int, group: dist.ProcessGroup | None, *, sum_gradients: bool) -> Tensor:
    if group is None:
        return local
    whole: Tensor = _Gather.apply(local, own, size, group, sum_gradients)  # type: ignore[no-untyped-call]
    return whole


def _whole(local: Tensor, own: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of their parts among zeros: adding 0 changes no value."""
    whole = local.new_zeros(size, *local.shape[1:])
    whole[own] = local
    dist.all_reduce(whole, group=group)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Tensor, own: Tensor, size: int, group: dist.ProcessGroup, sum_gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(own)
        ctx.group, ctx.sum_gradients = group, sum_gradients
        return _whole(local, own, size, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (own,) = ctx.saved_tensors
        if ctx.sum_gradients:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=ctx.group)
        return gradient.index_select(0, own), None, None, None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, column: Tensor, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        ctx.size, ctx.group = len(column), group
        return column.index_select(0, own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (own,) = ctx.saved_tensors
        return _whole(gradient, own, ctx.size, ctx.group), None, None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, to: Tensor) -> Tensor:
        ctx.like = (to.shape, to.dtype, to.device)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)
