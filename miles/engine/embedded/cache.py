"""Keys and values of all requests in dense slots, and the two ways to attend to them.

Running requests occupy slots 0..n-1 without gaps, so that a decode step attends to plain views. A request that leaves
changes places with the last one. A free slot keeps what it held until somebody needs the slot: a later prompt that
begins with the same tokens takes the common prefix from there instead of computing it (`find_prefix`).

    keys and values: [layers, slots, length, 2 * K, D]   (K key heads, then K value heads); in memory the positions of
                                                         one head lie side by side, because attention reads them so
    experts:         [slots, length, layers, top_k]      int32, which experts each token took; empty for a dense model

Slots and length grow geometrically, inside a budget of `max_total_tokens` = slots * length. Which request sits where is
the scheduler's business (`engine.py`); this file knows slots and token ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.engine.embedded.model import Attend, DecoderShape, Record

MIN_SHARED_PREFIX = 8
"""Shorter common prefixes are cheaper to compute than to look up."""

LENGTH_STEP = 32
"""Slots are a multiple of this many tokens long."""

CANDIDATES = 8
"""Slots that are compared with a prompt when many share its first tokens."""


class KVCache:
    """Dense slots; `contents[slot]` are tokens whose keys and values the slot holds, for others to share.

    A running request sits in its slot with more positions than `contents` tells (what it has generated since).
    `epoch` counts flushes: keys and values from before the last one must not be offered to others.

    Example: with two running requests and a finished one, `contents == [[5, 9, 2], [5, 9, 2], [8, 1]]`, n = 2.
    """

    PLANES = 2
    """Numbers kept of each token and dimension of a key head: the key's and the value's."""

    def __init__(
        self, shape: DecoderShape, dtype: torch.dtype, device: torch.device, *, max_slots: int, max_total_tokens: int
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.max_slots, self.max_total_tokens = max_slots, max_total_tokens
        self.contents: list[list[int]] = []
        self.epoch = 0
        self._allocate(0, 0)

    @property
    def num_slots(self) -> int:
        return len(self.contents)

    # ---- room ----------------------------------------------------------------------------------------------------

    def fits(self, slots: int, length: int) -> bool:
        """Whether `slots` requests of up to `length` tokens stay inside the budget."""
        return slots <= self.max_slots and slots * length <= self.max_total_tokens

    def reserve(self, slots: int, length: int) -> bool:
        """Have at least this many slots of at least this length; True where that moved the memory.

        Contents of slots below `slots` survive; slots above may be given up for length.
        """
        if slots <= self.num_slots and length <= self.length:
            return False
        new_length, new_slots = self.length, self.num_slots
        if length > self.length:
            wanted = max(-(-length // LENGTH_STEP) * LENGTH_STEP, 2 * self.length)
            new_length = max(length, min(wanted, self.shape.context_length, self.max_total_tokens // max(slots, 1)))
        if slots > self.num_slots:
            new_slots = max(slots, min(2 * self.num_slots, self.max_slots))
        new_slots = max(slots, min(new_slots, self.max_total_tokens // new_length))
        old, old_experts = self.kv, self.experts
        kept, contents = min(self.num_slots, new_slots), self.contents
        old_length = min(self.length, new_length)
        self._allocate(new_slots, new_length)
        self.kv[:, :kept, :old_length] = old[:, :kept, :old_length]
        self.experts[:kept, :old_length] = old_experts[:kept, :old_length]
        self.contents[:kept] = contents[:kept]
        return True

    def _allocate(self, slots: int, length: int) -> None:
        shape = self.shape
        # Zeros, not garbage: masked positions are multiplied by 0, and 0 * nan is nan.
        self._heads = torch.zeros(
            (shape.num_layers, slots, self.PLANES * shape.num_kv_heads, length, shape.head_dim),
            dtype=self.dtype,
            device=self.device,
        )
        self.kv = self._heads.transpose(2, 3)
        self.experts = torch.zeros(
            (slots, length, shape.num_layers, shape.top_k), dtype=torch.int32, device=self.device
        )
        self.length = length
        self.contents = [[] for _ in range(slots)]

    def free(self) -> None:
        """Give all memory back. No request may be running; `reserve` allocates anew."""
        self._allocate(0, 0)
        self.epoch += 1

    # ---- contents ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Forget the contents of all slots. Running requests go on: their own positions stay in place."""
        self.contents = [[] for _ in self.contents]
        self.epoch += 1

    def swap(self, a: Sequence[int], b: Sequence[int], used: int) -> None:
        """Exchange the first `used` positions of slots pairwise; `a` and `b` have no slot in common."""
        if not a:
            return
        ia, ib = (torch.tensor(slots, device=self.device) for slots in (a, b))
        held = self.kv[:, ia, :used]
        self.kv[:, ia, :used] = self.kv[:, ib, :used]
        self.kv[:, ib, :used] = held
        held = self.experts[ia, :used]
        self.experts[ia, :used] = self.experts[ib, :used]
        self.experts[ib, :used] = held
        for x, y in zip(a, b):
            self.contents[x], self.contents[y] = self.contents[y], self.contents[x]

    def copy_prefixes(self, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy the first `lengths[i]` positions of slot `sources[i]` to slot `targets[i]`, as if all at once."""
        if not sources:
            return
        used = max(lengths)
        from_, to = (torch.tensor(slots, device=self.device) for slots in (sources, targets))
        self.kv[:, to, :used] = self.kv[:, from_, :used]
        self.experts[to, :used] = self.experts[from_, :used]
        copied = [self.contents[source][:length] for source, length in zip(sources, lengths)]
        for target, tokens in zip(targets, copied):
            self.contents[target] = tokens

    def prefix_lookup(self) -> dict[tuple[int, ...], list[int]]:
        """First tokens -> slots that hold them, the latest slots last. Valid until contents change."""
        lookup: dict[tuple[int, ...], list[int]] = {}
        for slot, tokens in enumerate(self.contents):
            if len(tokens) >= MIN_SHARED_PREFIX:
                lookup.setdefault(tuple(tokens[:MIN_SHARED_PREFIX]), []).append(slot)
        return lookup

    def find_prefix(
        self, lookup: dict[tuple[int, ...], list[int]], tokens: list[int], limit: int
    ) -> tuple[int, int] | None:
        """(slot, length) of the longest stored prefix of `tokens[:limit]`, or None."""
        if limit < MIN_SHARED_PREFIX:
            return None
        slots = lookup.get(tuple(tokens[:MIN_SHARED_PREFIX]), [])
        best = max(((common_prefix(self.contents[s], tokens, limit), s) for s in slots[-CANDIDATES:]), default=None)
        return None if best is None else (best[1], best[0])

    # ---- experts -------------------------------------------------------------------------------------------------

    def recorder(self, rows_N: Tensor) -> Record:
        """Writes the experts of the tokens at `rows_N` = slot * length + position, layer by layer."""
        flat = self.experts.flatten(0, 1)

        def record(layer: int, chosen: Tensor) -> None:
            flat[rows_N, layer] = chosen.to(torch.int32)

        return record

    def experts_of(self, slot: int, length: int) -> Tensor:
        """int32 [length, layers, top_k], a copy; zeros in the layers that have no experts."""
        return self.experts[slot, :length].clone()

    # ---- attention -----------------------------------------------------------------------------------------------

    def _writer(self, rows_N: Tensor) -> Callable[[int, Tensor], None]:
        """Puts [N, PLANES * K, D] of a layer to the tokens at `rows_N` = slot * length + position."""
        heads = self.PLANES * self.shape.num_kv_heads
        first = rows_N.div(self.length, rounding_mode="floor") * ((heads - 1) * self.length) + rows_N
        rows = (first.unsqueeze(1) + torch.arange(heads, device=self.device) * self.length).flatten()
        flat = self._heads.view(self.shape.num_layers, -1, self.shape.head_dim)

        def write(layer: int, kv: Tensor) -> None:
            flat[layer].index_copy_(0, rows, kv.reshape(-1, self.shape.head_dim))

        return write

    def decode_attention(self, rows_N: Tensor, mask: Tensor, num: int, longest: int) -> Attend:
        """One new token in each of the slots 0..num-1; `rows_N` = slot * length + position of that token.

        mask: additive [num, 1, 1, longest].
        """
        h, k, d = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        write = self._writer(rows_N)
        seen = self._heads[:, :num, :, :longest]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            write(layer, qkv.narrow(1, h, 2 * k))
            keys, values = seen[layer].split(k, 1)
            # Query heads of one key head take the place of query positions: no copy of keys and values per head.
            query = qkv.narrow(1, 0, h).view(num, k, h // k, d)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).reshape(num, h, d)

        return attend

    def prefill_attention(
        self, slots: Sequence[int], offsets: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Attend]:
        """`width` tokens (right-padded) into each of `slots`, from position `offsets[i]` on.

        Returns positions and rows (slot * length + position), int64 [P * width] each, and the attention. Padding lands
        behind the tokens of its slot, where the request's own later tokens overwrite it before anything reads it (slots
        have room for one more token).
        """
        h, k, d, num = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim, len(slots)
        slots_P, positions, rows = self._places(slots, offsets, width)
        write = self._writer(rows)
        reach = min(max(offsets) + width, self.length)
        mask = None
        if max(offsets) > 0:
            mask = torch.arange(reach, device=self.device) <= positions[:, None, :, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv = qkv.narrow(1, h, 2 * k)
            write(layer, kv)
            past = kv.view(num, width, 2 * k, d) if mask is None else self.kv[layer, slots_P, :reach]
            keys, values = past.transpose(1, 2).split(k, 1)
            query = qkv.narrow(1, 0, h).view(num, width, h, d).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=h != k
            )
            return out.transpose(1, 2).reshape(num * width, h, d)

        return positions.flatten(), rows, attend

    def _places(self, slots: Sequence[int], offsets: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots int64 [P], positions [P, width], rows [P * width]."""
        start = torch.tensor(offsets, device=self.device).unsqueeze(1)
        slots_P = torch.tensor(slots, device=self.device)
        positions = (start + torch.arange(width, device=self.device)).clamp_(max=self.length - 1)
        return slots_P, positions, (slots_P.unsqueeze(1) * self.length + positions).flatten()


def common_prefix(a: list[int], b: list[int], limit: int) -> int:
    """How many leading tokens (at most `limit`) two lists share."""
    low, high = 0, min(len(a), len(b), limit)
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
