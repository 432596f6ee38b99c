"""The trainer in `--true-on-policy-mode`: a Hugging Face model whose forward pass computes by `miles/exact.py`.

Every module whose sums depend on their order gets a forward pass of exact sums: projections, norms, attention, SiLU,
routers and experts, and the rotary tables. What lies between them in the Hugging Face model (residual sums, gate times
up) is elementwise and the same in any order. Gradients are the ordinary ones, at the exact forward values: backward
passes need not agree with an engine.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from miles import exact
from miles.engine.embedded.model import DecoderShape
from miles.rope import rope_frequencies
from miles.trainer.fsdp.attention import packed_attention
from miles.trainer.fsdp.moe import Arithmetic, Routers
from miles.trainer.rms_norm import RMSNorm

NAME = "miles_exact"

SCORE_ELEMENTS = 1 << 23
"""Scores that exist at the same time in one attention: rows of a micro batch are taken a few at a time."""


def use_in(model: PreTrainedModel, routers: Routers | None) -> None:
    """Replace the forward passes. CheckpointError for an architecture that the embedded engine does not run either."""
    shape = DecoderShape.from_config(model.config)
    model.set_attn_implementation(NAME)
    head = model.get_output_embeddings()
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.forward = functools.partial(_linear, module)  # type: ignore[assignment]
        elif kind.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)  # type: ignore[assignment]
        elif kind.endswith("RotaryEmbedding"):
            table = exact.rotary_table(*rope_frequencies(model.config, shape.head_dim), shape.context_length)
            module.forward = functools.partial(_rotary, table)  # type: ignore[assignment]
        elif kind.endswith("MLP"):
            module.act_fn = _SiLUModule()
        elif kind.endswith("Experts"):
            module.forward = functools.partial(_experts, module)  # type: ignore[assignment]
    if routers is not None:
        routers.arithmetic = Arithmetic(
            linear=lambda x, weight: Linear.apply(x, weight, None),  # type: ignore[no-untyped-call]
            softmax=Softmax.apply,  # type: ignore[arg-type]
            top=exact.route,
            normalized=exact.normalized,
        )


def _linear(module: torch.nn.Linear, x: Tensor) -> Tensor:
    return Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return, no-untyped-call]


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


def _rotary(table: tuple[Tensor, Tensor], x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (t.to(x.device)[position_ids] for t in table)
    return cos, sin


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden [P, C], experts int64 [P, k] and their weights -> [P, C]."""
    places, parts = [], []
    for e in chosen.unique().tolist():
        token, place = (chosen == e).nonzero(as_tuple=True)
        gate, up = Linear.apply(hidden[token], module.gate_up_proj[e], None).chunk(2, -1)  # type: ignore[no-untyped-call]
        inner = SiLU.apply(gate) * up  # type: ignore[no-untyped-call]
        parts.append(Linear.apply(inner, module.down_proj[e], None))  # type: ignore[no-untyped-call]
        places.append(token * chosen.shape[1] + place)
    back = torch.cat(places).argsort()
    return exact.weighted_sum(torch.cat(parts)[back].view(*chosen.shape, -1), weights)


class Linear(torch.autograd.Function):
    """x [..., K], weight [M, K], bias [M] | None -> [..., M]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return exact.linear(x, exact.on_grid(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad @ weight, flat.T @ x.flatten(0, -2), flat.sum(0) if ctx.has_bias else None


class _RMSNorm(RMSNorm):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = exact.rms_scale(x, eps)
        normal = (x.double() / scale).to(x.dtype)
        ctx.save_for_backward(normal, scale.reciprocal_().to(x.dtype), weight)
        ctx.dtype = x.dtype
        return normal * weight


class SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return exact.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class _SiLUModule(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SiLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Softmax(torch.autograd.Function):
    """float32 [P, E] over the last dimension."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        probs = exact.softmax(logits).float()
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (probs,) = ctx.saved_tensors
        return probs * (grad - (grad * probs).sum(-1, keepdim=True))


class _Attention(torch.autograd.Function):
    """Causal attention, queries [n, H, S, d], keys and values [n, K, S, d] -> [n, H, S, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        n, heads, width, d = q.shape
        shared = heads // k.shape[1]
        mask = torch.full((width, width), -torch.inf, dtype=torch.float64, device=q.device).triu_(1).repeat(shared, 1)
        out = torch.empty_like(q)
        step = max(SCORE_ELEMENTS // (heads * width * width), 1)
        for part in (slice(i, i + step) for i in range(0, n, step)):
            query = exact.on_grid(q[part]).reshape(-1, k.shape[1], shared * width, d)
            coarse, fine = exact.split_values(v[part])
            wide = mask.expand(len(query), 1, -1, -1)
            out[part] = exact.attend(query, exact.on_grid(k[part]), coarse, fine, wide, scale).view(-1, heads, width, d)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=ctx.scale, enable_gqa=True)
        return *torch.autograd.grad(out, inputs, grad), None


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    return _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling)  # type: ignore[no-any-return, no-untyped-call]


ALL_ATTENTION_FUNCTIONS.register(NAME, functools.partial(packed_attention, kernel=_attention))
