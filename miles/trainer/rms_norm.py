"""RMS normalisation for training: one autograd node in place of the seven that a module of primitives makes.

    n = x / sqrt(mean(x^2) + eps)          y = n * w
    dL/dw = sum g n                        dL/dx = (g w - n mean(g w n)) / sqrt(mean(x^2) + eps)

It keeps n and one number per row instead of every intermediate, and computes in float32, or in float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x [..., D], weight [D] -> [..., D] in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = wide * scale
        ctx.save_for_backward(normal, scale, weight)
        ctx.dtype = x.dtype
        return (normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normal, scale, weight = ctx.saved_tensors
        grad = grad.to(normal.dtype)
        grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        projection = torch.linalg.vecdot(grad, normal).div_(normal.shape[-1]).unsqueeze_(-1)
        return torch.addcmul(grad, normal, projection, value=-1).mul_(scale).to(ctx.dtype), grad_weight, None
