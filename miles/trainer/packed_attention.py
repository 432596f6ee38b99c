"""Attention over packed rows: no token attends to another sample, and padding costs nothing.

A model runs on packed tokens, so its linear layers see no padding, and a prompt that several rows share only once
(`miles.batch.pack`). Only inside attention are the rows laid out as `[n, S]`, padded at the end to the longest; with
causal attention real tokens never look at that padding, so no mask is needed and PyTorch's fused kernel applies. Rows
of one micro batch have similar lengths (`miles.batch.micro`). On a GPU, in half precision, rows are not padded at all:
PyTorch's flash attention takes them one after another.

Both backends attend with this; how their models call it is `fsdp.attention` and `megatron.attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # what PyTorch 2.10 brought
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

Kernel = Callable[[Tensor, Tensor, Tensor, float, float | None, int | None], Tensor]
"""(queries [n, H, S, d], keys, values [n, H_kv, S, d], dropout, scaling, sliding window) -> [n, H, S, d], causal."""

# Rows up to this length: on a CPU the weights [S, S] of a row stay in the cache, and the fused kernel's bookkeeping
# costs more than it saves (a quarter of its time at 40 tokens).
SHORT_ROWS = 64


@dataclass(frozen=True)
class Packing:
    """Where packed tokens stand in the padded layout.

    Example, rows [a b c] and [a b d] that share the prompt [a b], packed as [a b c d]: `to_padded = [0, 1, 2, 0, 1,
    3]`, `to_packed = [0, 1, 2, 5]`, `again = [3, 4]` (the second row's copy of the prompt), rows=2, width=3.
    """

    to_padded: Tensor  # int64 [rows * width], packed place at each padded place; anything at padding
    to_packed: Tensor  # int64 [P], the padded place whose query is computed for each packed place
    again: Tensor  # int64, padded places that hold a token which stands in an earlier row
    rows: int
    width: int
    cu_seqlens: Tensor  # int32 [rows + 1], cumulative lengths of the rows
    row_places: Tensor  # int64 [T], row after row: the packed place of each token
    first: Tensor  # int64 [P], for each packed place where its token first stands in `row_places`

    @staticmethod
    def of(cu_seqlens: Tensor, row_places: Tensor) -> Packing:
        """From the rows' cumulative lengths int32 [rows + 1] and the packed places of their tokens int64 [T]."""
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        rows, width = len(lengths), int(lengths.max())
        columns = torch.arange(width, device=cu_seqlens.device)
        real = (columns < lengths[:, None]).flatten()
        padded_places = real.nonzero().squeeze(1)
        to_padded = torch.zeros(rows * width, dtype=torch.int64, device=cu_seqlens.device)
        to_padded[padded_places] = row_places
        num_packed = int(row_places.max()) + 1
        # A place is first met where it raises the running maximum: packed places are numbered in order of appearance.
        first = torch.ones_like(row_places, dtype=torch.bool)
        first[1:] = row_places[1:] > row_places.cummax(0).values[:-1]
        to_packed = padded_places[first]
        assert len(to_packed) == num_packed
        return Packing(
            *(to_padded, to_packed, padded_places[~first], rows, width),
            cu_seqlens=cu_seqlens,
            row_places=row_places,
            first=first.nonzero().squeeze(1),
        )


class _Pad(torch.autograd.Function):
    """[P, C] -> [rows * width, C]. Places of padding hold some real token; their gradient is exactly zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.to_padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        packing: Packing = ctx.packing
        packed = grad.index_select(0, packing.to_packed)
        if len(packing.again):
            packed.index_add_(0, packing.to_padded[packing.again], grad.index_select(0, packing.again))
        return packed, None


class _Unpad(torch.autograd.Function):
    """[rows * width, C] -> [P, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_packed: Tensor) -> Tensor:
        ctx.save_for_backward(to_packed)
        ctx.places = x.shape[0]
        return x.index_select(0, to_packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (to_packed,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.places, grad.shape[1])
        return padded.index_copy_(0, to_packed, grad), None


def lay_out(x: Tensor, packing: Packing) -> Tensor:
    """Packed [P, h, d] -> rows [n, h, S, d]."""
    _, h, d = x.shape
    laid_out = _Pad.apply(x.reshape(-1, h * d), packing)
    return laid_out.view(packing.rows, packing.width, h, d).transpose(1, 2)  # type: ignore[no-any-return]


def take_out(out: Tensor, packing: Packing) -> Tensor:
    """Rows [n, h, S, d] -> packed [P, h * d]."""
    flat = out.transpose(1, 2).reshape(packing.rows * packing.width, -1)
    return _Unpad.apply(flat, packing.to_packed)  # type: ignore[no-any-return]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """query [P, H, d], key and value [P, H_kv, d] -> [P, H * d].

    `kernel` computes the padded rows in place of those below.
    """
    if kernel is None and _fits_flash(query, dropout, sliding_window):
        return _flash_attention(query, key, value, packing, scaling)

    q, k, v = (lay_out(x, packing) for x in (query, key, value))
    if kernel is not None:
        out = kernel(q, k, v, dropout, scaling, sliding_window)
    elif packing.width <= SHORT_ROWS and q.device.type == "cpu" and dropout == 0.0 and sliding_window is None:
        out = _short_attention(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling)
    else:
        out = _fused_attention(q, k, v, dropout, scaling, sliding_window)
    return take_out(out, packing)


def _fits_flash(query: Tensor, dropout: float, sliding_window: int | None) -> bool:
    """Whether PyTorch's flash attention on rows of unequal length takes these."""
    return (
        varlen_attn is not None
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and dropout == 0.0
        and sliding_window is None
    )


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """The rows one after another [T, H, d]; a prompt that rows share is laid out again for each of them."""
    options = _varlen_options(scaling)
    repeats = 1 if "enable_gqa" in options else query.shape[1] // key.shape[1]

    def rows(x: Tensor, repeats: int = 1) -> Tensor:
        laid_out = x.index_select(0, packing.row_places) if len(packing.again) else x
        return laid_out.repeat_interleave(repeats, dim=1) if repeats > 1 else laid_out

    starts, width = packing.cu_seqlens, packing.width
    out = varlen_attn(rows(query), rows(key, repeats), rows(value, repeats), starts, starts, width, width, **options)
    flat = out.reshape(out.shape[0], -1)
    return flat.index_select(0, packing.first) if len(packing.again) else flat


def _varlen_options(scaling: float | None) -> dict[str, Any]:
    """Causal, with shared key heads: PyTorch 2.10 spells the first `is_causal` and lacks the second."""
    given = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in given else {"window_size": (-1, 0)}
    if "enable_gqa" in given:
        options["enable_gqa"] = True
    if scaling is not None:
        options["scale"] = scaling
    return options


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Causal attention [n, H, S, d] with PyTorch's kernel, which never holds the [S, S] weights."""
    width, window = q.shape[2], None
    if sliding_window is not None and sliding_window < width:
        window = torch.ones(width, width, dtype=torch.bool, device=q.device)
        window = window.tril().triu(1 - sliding_window)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=window,
        is_causal=window is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )


def _short_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """The same by batched matrix products: query heads [n, H, S, d] that share a key head are one product."""
    n, heads, width, d = q.shape
    shared = heads // k.shape[1]
    causal = torch.full((width, width), float("-inf"), dtype=q.dtype).triu(1).repeat(shared, 1)
    query = q.reshape(n * k.shape[1], shared * width, d)
    weights = torch.baddbmm(causal, query, k.reshape(-1, width, d).transpose(1, 2), alpha=scaling).softmax(-1)
    return torch.bmm(weights, v.reshape(-1, width, d)).view(n, heads, width, d)

