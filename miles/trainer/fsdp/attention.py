"""`miles.trainer.packed_attention` for Hugging Face models.

Registered under the name `miles_packed` in transformers' table of attention functions; the layout travels through the
model's keyword arguments as `packing`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from miles.trainer.packed_attention import Kernel, Packing, attend

NAME = "miles_packed"


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
    kernel: Kernel | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, P, d], key and value [1, H_kv, P, d] -> ([1, P, H, d], None)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(q, k, v, packing, scaling=scaling, dropout=dropout, sliding_window=sliding_window, kernel=kernel)
    return out.view(1, -1, query.shape[1], query.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
