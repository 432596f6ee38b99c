"""The feed-forward layers of the embedded engine: dense, and a mixture of experts.

Both add to the residual stream. A mixture also says which experts each token took: routing replay trains with the same
ones (`miles/trainer/routing.py`). Formulas are those of Hugging Face's Qwen3 and Qwen3-MoE.

Shapes: N tokens, C hidden size, F inner size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """A projection by reference. `transposed` is a view of the checkpoint's `[out, in]` weight."""

    weight: Tensor  # [out, in]
    transposed: Tensor  # [in, out]
    bias: Tensor | None  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x @ weight.T (+ bias), the sum inside the matrix product."""
        out = torch.addmm(residual, x, self.transposed)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True)
class DenseMlp:
    """down(silu(gate(y)) * up(y))."""

    gate_up: Linear  # [2F, C]
    down: Linear  # [C, F]

    def added_to(self, residual: Tensor, y: Tensor) -> Tensor:
        gate, up = self.gate_up(y).chunk(2, 1)
        return self.down.added_to(residual, F.silu(gate).mul_(up))


@dataclass(frozen=True)
class SparseMlp:
    """Each token through `top_k` of E experts, weighted by the router's probabilities."""

    router: Tensor  # [E, C]
    gate_up: Tensor  # [E, 2F, C]
    down: Tensor  # [E, C, F]
    top_k: int
    normalize: bool

    def added_to(self, residual: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """residual + the experts' weighted sum, and the experts int64 [N, top_k], the most probable first."""
        probs = torch.softmax(F.linear(y, self.router), -1, dtype=torch.float32)
        weights, chosen = probs.topk(self.top_k, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # the choices of all tokens, expert after expert
        tokens = order // self.top_k
        counts = torch.bincount(chosen.flatten(), minlength=len(self.router)).tolist()
        parts = [
            F.linear(_gated(F.linear(rows, self.gate_up[e])), self.down[e])
            for e, rows in enumerate(y.index_select(0, tokens).split(counts))
            if len(rows)
        ]
        weighted = torch.cat(parts).mul_(weights.to(y.dtype).flatten()[order].unsqueeze(1))
        return residual.index_add(0, tokens, weighted), chosen


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, 1)
    return F.silu(gate).mul_(up)
