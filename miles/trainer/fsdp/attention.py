"""Attention over packed rows for Hugging Face models: no token attends to another sample, and padding costs nothing.

The model runs on `[1, T]` packed tokens, so its linear layers see no padding. Only inside attention are the rows laid
out as `[n, S]`, padded at the end to the longest; with causal attention real tokens never look at that padding, so no
mask is needed and PyTorch's fused kernel applies. Rows of one micro batch have similar lengths (`miles.batch.micro`).

Registered under the name `miles_packed` in transformers' table of attention functions; the layout travels through the
model's keyword arguments as `packing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "miles_packed"


@dataclass(frozen=True)
class Packing:
    """Where packed tokens stand in the padded layout.

    Example, rows of 2 and 3 tokens: `to_padded = [0, 1, 0, 2, 3, 4]`, `to_packed = [0, 1, 3, 4, 5]`, rows=2, width=3
    (the third entry of `to_padded` is padding and may point anywhere).
    """

    to_padded: Tensor  # int64 [rows * width], packed position of each padded place
    to_packed: Tensor  # int64 [T], padded place of each packed position
    rows: int
    width: int

    @staticmethod
    def of(cu_seqlens: Tensor) -> Packing:
        """From the cumulative lengths int32 [rows + 1] that start with 0."""
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        rows, width = len(lengths), int(lengths.max())
        columns = torch.arange(width, device=cu_seqlens.device)
        real = columns < lengths[:, None]
        to_padded = torch.where(real, starts[:, None] + columns, 0).flatten()
        return Packing(to_padded, real.flatten().nonzero().squeeze(1), rows, width)


class _Pad(torch.autograd.Function):
    """[T, C] -> [rows * width, C]. Places of padding hold some real row; their gradient is exactly zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_padded: Tensor, to_packed: Tensor) -> Tensor:
        ctx.save_for_backward(to_packed)
        return x.index_select(0, to_padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (to_packed,) = ctx.saved_tensors
        return grad.index_select(0, to_packed), None, None


class _Unpad(torch.autograd.Function):
    """[rows * width, C] -> [T, C]."""

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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key and value [1, H_kv, T, d] -> ([1, T, H, d], None)."""
    heads = query.shape[1]

    def padded(x: Tensor) -> Tensor:
        _, h, _, d = x.shape
        flat = x.transpose(1, 2).reshape(-1, h * d)
        laid_out = _Pad.apply(flat, packing.to_padded, packing.to_packed)
        return laid_out.view(packing.rows, packing.width, h, d).transpose(1, 2)

    window = None
    if sliding_window is not None and sliding_window < packing.width:
        window = torch.ones(packing.width, packing.width, dtype=torch.bool, device=query.device)
        window = window.tril().triu(1 - sliding_window)
    out = F.scaled_dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        attn_mask=window,
        is_causal=window is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )
    flat = out.transpose(1, 2).reshape(packing.rows * packing.width, -1)
    return _Unpad.apply(flat, packing.to_packed).view(1, -1, heads, query.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
