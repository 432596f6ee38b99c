"""One micro batch as a Megatron model reads it on this rank: token ids, positions, rows, and where its states are.

    packed (thd)   the rows one after another as [1, S]; S is padded to what sequence parallelism can cut
    padded (bshd)  one row each, [B, S], padded at the end to the longest
    zigzag         packed under context parallelism: each row is padded to 2 * cp chunks of equal length, of which
                   rank r holds the chunks r and 2 * cp - 1 - r, so that causal attention costs every rank the same

A model sees the rows through `packed_seq_params`, always a `Packed`: ours as one sequence with positions of its own, so
that rows can share a prompt; a model provider's as the published `PackedSeqParams` of the layout thd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from miles.batch.pack import PackedBatch
from miles.loss.context_parallel import ContextShare, share_of
from miles.trainer.packed_attention import Packing, attend, lay_out, take_out

Format = Literal["thd", "bshd"]


@dataclass
class Packed(PackedSeqParams):
    """What `layers.PackedAttention` reads of the rows, beside what Megatron's own code reads.

    With `qkv_format="packed"` Megatron sees a layout that it does not know, and so takes the packed tokens for one
    sequence, which is what they are to every layer but attention; `positions` are then those of the rotary angles.
    With "thd" it sees rows.
    """

    packing: Packing | None = None
    context: ContextRows | None = None
    positions: Tensor | None = None  # int64 [S of this rank]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, dropout: float) -> Tensor:
        """q [S, H, d], k and v [S, H_kv, d] of this rank's tokens -> [S, H * d]."""
        if self.context is not None:
            return self.context.attend(q, k, v, scaling=scaling, dropout=dropout)
        assert self.packing is not None
        return attend(q, k, v, self.packing, scaling=scaling, dropout=dropout)

    @staticmethod
    def of(given: PackedSeqParams, context: ProcessGroup | None) -> Packed:
        """Rows that somebody else describes: `given` with lengths that are multiples of 2 * cp, padding included."""
        starts = given.cu_seqlens_q_padded if given.cu_seqlens_q_padded is not None else given.cu_seqlens_q
        return _published(starts, context)


@dataclass(frozen=True)
class ContextRows:
    """Rows that are cut over the ranks of `group`: attention of this rank's queries to all keys and values."""

    group: ProcessGroup
    own: Packing  # rows of this rank's tokens, padding included
    whole: Packing  # rows of all tokens, padding included
    # int64 [tokens of all ranks]: where each token of the whole rows stands in the concatenation over ranks
    gathered_places: Tensor
    mask: Tensor  # bool [n, 1, own width, whole width]: which keys a query sees

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, dropout: float) -> Tensor:
        """q [S, H, d], k and v [S, H_kv, d] of this rank's tokens -> [S, H * d]."""
        k, v = (self._of_all_ranks(x) for x in (k, v))
        out = F.scaled_dot_product_attention(
            lay_out(q, self.own),
            lay_out(k, self.whole),
            lay_out(v, self.whole),
            attn_mask=self.mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=True,
        )
        return take_out(out, self.own)

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """[S, h, d] -> [S of all ranks, h, d] in the order of the rows; gradients are summed over the ranks' uses."""
        everything = gather_from_sequence_parallel_region(x.contiguous(), group=self.group)
        return everything.index_select(0, self.gathered_places)


@dataclass(frozen=True)
class Inputs:
    """S places per row of the input on this rank, R response tokens in the micro batch.

    Example, rows [12, 9, 4, 5] and [12, 8, 6] packed with sequence parallelism over two ranks::

        tokens = [[12, 9, 4, 5, 12, 8, 6, 0]]    packed.positions = [0, 1, 2, 3, 0, 1, 2, 0]
        places = [0, 1, 2, 3, 4, 5, 6, -1]    share = None    states = [1, 2, 5]
    """

    tokens: Tensor  # int64 [B, S]
    packed: Packed | None  # None for padded rows
    published: Packed | None  # the same for models that are not ours; None also where rows share a prompt
    places: Tensor  # int64 [S * B], the packed place of each state's token; -1 at padding. States are [S, B, D]
    states: Tensor  # int64 [R of this rank], rows of the flattened states that predict its response tokens
    share: ContextShare | None  # which of the R these are; None for all of them


def arrange(
    micro: PackedBatch, *, layout: Format = "thd", multiple_of: int = 1, context: ProcessGroup | None = None
) -> Inputs:
    """Lay out `micro`, whose prompts are shared by rows only in the layout thd without context parallelism. S becomes a
    multiple of `multiple_of`; `context` is the group of context-parallel ranks, None for a group of one."""
    if layout == "bshd":
        return _padded(micro, multiple_of)
    return _zigzag(micro, multiple_of, context) if context is not None else _packed(micro, multiple_of)


def _packed(micro: PackedBatch, multiple_of: int) -> Inputs:
    size = len(micro.tokens)
    room = -size % multiple_of
    device = micro.tokens.device
    padding = torch.arange(size, size + room, device=device)
    starts = micro.cu_seqlens if not room else torch.cat([micro.cu_seqlens, micro.cu_seqlens[-1:] + room])
    packing = Packing.of(starts.int(), torch.cat([micro.row_places, padding]))
    own: dict[str, Any] = {"packing": packing, "max_seqlen_q": packing.width, "max_seqlen_kv": packing.width}
    is_shared = len(micro.row_places) > size
    return Inputs(
        tokens=F.pad(micro.tokens, (0, room))[None],
        packed=Packed(qkv_format="packed", positions=F.pad(micro.position_ids, (0, room)), **own),
        published=None if is_shared else _thd(starts.int(), **own),
        places=F.pad(torch.arange(size, device=device), (0, room), value=-1),
        states=micro.predicting,
        share=None,
    )


def _padded(micro: PackedBatch, multiple_of: int) -> Inputs:
    lengths = torch.tensor(micro.total_lengths, device=micro.tokens.device)
    rows, width = len(lengths), int(lengths.max())
    width += -width % multiple_of
    columns = torch.arange(width, device=lengths.device)
    starts = micro.cu_seqlens[:-1].long()
    places = torch.where(columns < lengths[:, None], starts[:, None] + columns, -1)  # [B, S]
    tokens = torch.where(places >= 0, micro.tokens[places.clamp(min=0)], 0)
    row_of = torch.repeat_interleave(torch.arange(rows, device=lengths.device), lengths)
    return Inputs(
        tokens=tokens,
        packed=None,
        published=None,
        places=places.T.reshape(-1),
        states=micro.position_ids[micro.predicting] * rows + row_of[micro.predicting],
        share=None,
    )


def _zigzag(micro: PackedBatch, multiple_of: int, group: ProcessGroup) -> Inputs:
    device = micro.tokens.device
    share = share_of(
        micro.total_lengths, micro.response_lengths, rank=group.rank(), size=group.size(), device=device
    )
    room = -share.num_places % math.lcm(multiple_of, 2)  # two chunks of padding
    starts = share.cu_seqlens()
    published = _published(F.pad(starts, (0, int(room > 0)), value=int(starts[-1]) + room * group.size()), group)
    return Inputs(
        tokens=F.pad(share.local_tokens(micro.tokens), (0, room))[None],
        packed=replace(published, qkv_format="packed", positions=F.pad(share.position_ids, (0, room))),
        published=published,
        places=F.pad(share.token_places, (0, room), value=-1),
        states=share.places,
        share=share,
    )


def _context_rows(starts: Tensor, group: ProcessGroup) -> ContextRows:
    """Rows of these cumulative lengths, each a multiple of 2 * size, cut in zigzag."""
    rank, size = group.rank(), group.size()
    lengths = starts.long().diff()
    chunks = lengths // (2 * size)
    own, whole = _rows(2 * chunks), _rows(lengths)
    row_of, offset = _enumerate(lengths)
    chunk = chunks[row_of]
    number = offset // chunk
    mirrored = number >= size  # the second chunk of its owner
    owner = torch.where(mirrored, 2 * size - 1 - number, number)
    within = offset % chunk + chunk * mirrored
    gathered = owner * int(own.cu_seqlens[-1]) + own.cu_seqlens.long()[row_of] + within
    queries = torch.zeros(own.rows * own.width, dtype=torch.int64, device=starts.device)
    is_own = owner == rank
    queries[own.to_packed[(gathered - rank * int(own.cu_seqlens[-1]))[is_own]]] = offset[is_own]
    keys = torch.arange(whole.width, device=starts.device)
    mask = (queries.view(own.rows, own.width, 1) >= keys).unsqueeze(1)
    return ContextRows(group, own, whole, gathered, mask)


def _rows(lengths: Tensor) -> Packing:
    starts = F.pad(lengths, (1, 0)).cumsum(0)
    return Packing.of(starts.int(), torch.arange(int(starts[-1]), device=lengths.device))


def _enumerate(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of these lengths one after another: the row of each place, and its offset in the row."""
    row_of = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = F.pad(lengths, (1, 0)).cumsum(0)
    return row_of, torch.arange(len(row_of), device=lengths.device) - starts[row_of]


def _published(starts: Tensor, context: ProcessGroup | None) -> Packed:
    """Of rows without shared prompts, from their cumulative lengths."""
    if context is not None and context.size() > 1:
        rows = _context_rows(starts, context)
        return _thd(starts, context=rows, max_seqlen_q=rows.whole.width, max_seqlen_kv=rows.whole.width)
    packing = _rows(starts.long().diff())
    return _thd(starts, packing=packing, max_seqlen_q=packing.width, max_seqlen_kv=packing.width)


def _thd(starts: Tensor, **own: Any) -> Packed:
    return Packed(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, **own)
