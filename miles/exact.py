"""Sums that do not depend on their order: the arithmetic of `--true-on-policy-mode`.

A matrix product gives other last bits when the same row stands in another batch: kernels split and reorder sums by
shape. Here every sum is *exact*, and an exact sum has one value. Operands are rounded to a grid first, each row to one
of its own, coarse enough that all products and all partial sums of float64 are whole multiples of one number below
2^53 of them: no addition rounds, whatever kernel, batch, tile or number of threads adds. What is rounded away is of the
size of float32's own rounding (23 bits at 128 terms, 21 at 2048).

Between the sums stand only operations that IEEE 754 defines to the bit (+ - * / sqrt, comparison, rounding), each as
one elementwise call. exp is made of those; log, of a few numbers per row, is the C library's, one by one.

The embedded engine (`engine/embedded/exact.py`) and the trainer (`trainer/fsdp/exact.py`) both compute with these
functions, and therefore agree to the last bit. The idea of exact accumulation on a common grid is that of Ozaki, Ogita,
Oishi and Rump (Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EXPONENT = 0x7FF0000000000000  # the exponent bits of a float64
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453
_TAYLOR = [1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]

LOWEST_EXPONENT = -64.0
"""exp below is 0 on every grid here."""

EXP_BITS = 35
"""Weights of a softmax are multiples of 2^-35: exact sums of up to 2^18 of them."""

WEIGHT_BITS, COARSE_BITS, FINE_BITS = 26, 7, 33
"""Attention: weights in [0, 1] are multiples of 2^-26, values a multiple of 2^-7 below 2^19 plus one of 2^-33."""

SCORES = 1 << 21
"""Scores of queries to keys that exist at the same time."""

TABLE_BLOCK = 512
"""Rotary angles are computed in blocks of this many positions, always whole ones."""


def grid_bits(terms: int) -> int:
    """Bits of each factor for which a sum of `terms` products is exact: 2 bits + log2(terms) <= 53."""
    return (53 - math.ceil(math.log2(max(terms, 1)))) // 2


def on_grid(x: Tensor) -> Tensor:
    """float64 [..., K]: each row rounded to 2^(1 - bits) of its largest element's power of two, for sums over K."""
    wide = x.double()
    top = wide.abs().amax(-1, keepdim=True)
    # Added to a number whose last bit is the grid's step, x loses what is finer.
    power = top.view(torch.int64).bitwise_and(_EXPONENT).view(torch.float64)
    anchor = power * (1.5 * 2.0 ** (53 - grid_bits(x.shape[-1])))
    return (wide + anchor).sub_(anchor)


def rounded(x: Tensor, bits: int) -> Tensor:
    """float64 `x` rounded to multiples of 2^-bits, in place."""
    return x.mul_(2.0**bits).round_().mul_(2.0**-bits)


# ---- a layer -------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight_grid: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight.T (+ bias) -> [..., M] in x's dtype, from `weight_grid = on_grid(weight)` [M, K]."""
    out = on_grid(x) @ weight_grid.transpose(-1, -2)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps), float64 [..., 1]."""
    square = on_grid(x).square_().sum(-1, keepdim=True)
    return square.div_(float(x.shape[-1])).add_(eps).sqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return (x.double() / rms_scale(x, eps)).to(x.dtype) * weight


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    wide = x.double()
    small = exp(wide.abs().neg_())
    numerator = torch.where(wide >= 0, 1.0, small)
    return (wide * numerator).div_(small.add_(1.0)).to(x.dtype)


def rotary_table(inv_freq: Tensor, scale: float, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [at least `count`, D], of positions times inverse frequencies float32 [D/2]."""
    cos, sin = [], []
    for start in range(0, count, TABLE_BLOCK):
        positions = torch.arange(start, start + TABLE_BLOCK, dtype=torch.float32)
        angles = (positions[:, None] * inv_freq).double()
        cos.append((angles.cos() * scale).float())
        sin.append((angles.sin() * scale).float())
    return torch.cat(cos).repeat(1, 2), torch.cat(sin).repeat(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., D] by tables that broadcast to it."""
    first, second = x.chunk(2, -1)
    return (x * cos) + (torch.cat((-second, first), -1) * sin)


# ---- softmax -------------------------------------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    """exp of float64 `x` <= 0 within 3e-12, by operations with one possible result: 2^k (taylor(r / 16))^16."""
    x = x.clamp(min=LOWEST_EXPONENT)
    k = (x * _LOG2_E).round_()
    r = x.sub_(k * _LN_2).mul_(2.0**-4)
    out = r * _TAYLOR[0]
    for c in _TAYLOR[1:-1]:
        out.add_(c).mul_(r)
    out.add_(_TAYLOR[-1])
    for _ in range(4):
        out.mul_(out)
    return out.mul_(k.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64))


def exp_weights(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of float64 [..., K]: exp(scores - max) on the grid, their sum [..., 1] and the maximum [..., 1]."""
    top = scores.amax(-1, keepdim=True)
    weights = rounded(exp(scores - top), EXP_BITS)
    return weights, weights.sum(-1, keepdim=True), top


def softmax(scores: Tensor) -> Tensor:
    """float64 [..., K]."""
    weights, total, _ = exp_weights(scores.double())
    return weights.div_(total)


def log_normalizers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp over the last dimension, less the maximum, and the maximum: float64 [..., 1] each."""
    _, total, top = exp_weights(logits.double())
    logs = [math.log(value) if value > 0 else value for value in total.flatten().tolist()]
    return torch.tensor(logs, dtype=torch.float64, device=logits.device).view(total.shape), top


def log_softmax(logits: Tensor) -> Tensor:
    """float32 [..., V]."""
    log_total, top = log_normalizers(logits)
    return (logits.double() - top).sub_(log_total).float()


# ---- attention -----------------------------------------------------------------------------------------------------


def split_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """A coarse and a fine part, float64 each, whose sum is `values`; exact up to 2^19."""
    wide = values.double()
    anchor = 1.5 * 2.0 ** (52 - COARSE_BITS)
    coarse = (wide + anchor).sub_(anchor)
    anchor = 1.5 * 2.0 ** (52 - FINE_BITS)
    return coarse, (wide - coarse).add_(anchor).sub_(anchor)


def attend(query: Tensor, key: Tensor, coarse: Tensor, fine: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention float64 [..., Q, D] of queries [..., Q, D] to keys and values [..., K, D], all on their grids.

    `mask` is added to the scores: 0 or -inf, [..., Q, K]. As many queries at a time as `SCORES` allows: no row of the
    result depends on which others are computed with it.
    """
    rows = math.prod(query.shape[:-2]) * key.shape[-2]
    parts = []
    for q, m in zip(*(t.split(max(SCORES // rows, 1), -2) for t in (query, mask))):
        scores = (q @ key.transpose(-1, -2)).mul_(scale).add_(m)
        weights = rounded(softmax(scores), WEIGHT_BITS)
        parts.append((weights @ coarse).add_(weights @ fine))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


# ---- experts -------------------------------------------------------------------------------------------------------


def route(probs: Tensor, top_k: int) -> Tensor:
    """Experts int64 [N, top_k] of float32 probabilities [N, E]; equal ones in the order of their numbers."""
    return probs.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def normalized(weights: Tensor) -> Tensor:
    """Rows [N, k] divided by their sums, added from left to right."""
    total = weights[:, :1]
    for column in weights[:, 1:].unbind(1):
        total = total + column.unsqueeze(1)
    return weights / total


def weighted_sum(parts: Tensor, weights: Tensor) -> Tensor:
    """[N, k, C], [N, k] -> [N, C], added from left to right."""
    out = parts[:, 0] * weights[:, :1]
    for k in range(1, weights.shape[1]):
        out = out + parts[:, k] * weights[:, k : k + 1]
    return out
