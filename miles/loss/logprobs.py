"""Log-probabilities and entropies of given tokens, from hidden states or from logits.

`linear_log_probs` fuses the projection to the vocabulary with the softmax, a chunk of tokens at a time: no [T, V]
tensor outlives a chunk, forward or backward. `log_probs_from_logits` is the plain version for logits that exist anyway.

The softmax runs in float32 (float64 for float64 inputs), whatever the dtype of the projection. A vocabulary that is cut
over tensor-parallel ranks is the part of `miles.loss.vocab_parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the [chunk, V] temporaries: 16 MiB each in float32, which stays inside the caches of a server CPU.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TokenLogProbs:
    """`log_probs` [T] of the target tokens, and the `entropy` [T] of the distributions they came from if asked for."""

    log_probs: Tensor
    entropy: Tensor | None


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogProbs:
    """log softmax(hidden @ weight.T / temperature) at `targets`, and the entropy of the same distributions.

    `hidden` [T, D] and `weight` [V, D] of one dtype, `targets` int64 [T]. Differentiable in hidden and weight. Where
    everything fits one chunk, the probabilities are kept for the backward pass; otherwise each chunk's logits are
    computed again there. `chunk_tokens` (`--log-probs-chunk-size`) sets the size of a chunk; None fits
    `CHUNK_ELEMENTS`.
    """
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_ELEMENTS // weight.shape[0], 1)
    log_probs, entropy = LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, with_entropy, chunk_tokens
    )
    return TokenLogProbs(log_probs, entropy)


def log_probs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> TokenLogProbs:
    """The same from `logits` [T, V]; -inf logits (tokens that cannot occur) are allowed."""
    wide = torch.promote_types(torch.float32, logits.dtype)
    log_p = torch.log_softmax(logits.to(wide) / temperature, dim=-1)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not with_entropy:
        return TokenLogProbs(log_probs, None)
    # 0 * log 0 is 0, and its gradient too.
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return TokenLogProbs(log_probs, -(log_p.exp() * finite).sum(-1))


class LinearLogProbs(torch.autograd.Function):
    """With z = h W^T / temperature, p = softmax(z), l = log p_y and H = -sum p log p:

    dl/dz = onehot(y) - p        dH/dz = -p (log p + H)

    All chunks work in the same one or two buffers [chunk, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        num_tokens = hidden.shape[0]
        log_probs = torch.empty(num_tokens, dtype=wide, device=hidden.device)
        entropy = torch.empty_like(log_probs) if with_entropy else None
        normalizers = torch.empty_like(log_probs)
        keep = 0 < num_tokens <= chunk_tokens
        buffers = Buffers(min(num_tokens, chunk_tokens), weight, wide, two=with_entropy or keep)
        for part in chunks(num_tokens, chunk_tokens):
            z, exponentials = scaled_logits(hidden[part], weight, temperature, buffers)
            log_probs[part] = z.gather(-1, targets[part, None]).squeeze(-1)
            top = z.amax(-1, keepdim=True)
            torch.exp(z.sub_(top), out=exponentials)
            total = exponentials.sum(-1, keepdim=True)
            normalizers[part] = (top + total.log()).squeeze(-1)
            if entropy is not None:
                mean = torch.linalg.vecdot(exponentials, z)[:, None] / total
                entropy[part] = (total.log() - mean).squeeze(-1)
            if keep:
                z.sub_(total.log())
        log_probs -= normalizers
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropy, buffers.first if keep else None, None)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        # `here` bool [T] or None: whether the row of the target is in this `weight`; None where all of them are.
        hidden, weight, targets, normalizers, entropy, kept, here = ctx.saved_tensors
        wide = normalizers.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        if grad_log_probs is None and grad_entropy is None:
            return grad_hidden, none_or_cast(grad_weight, weight.dtype), None, None, None, None
        size = min(hidden.shape[0], ctx.chunk_tokens)
        buffers = Buffers(size, weight, wide, two=grad_entropy is not None or kept is not None, first=kept)
        for part in chunks(hidden.shape[0], ctx.chunk_tokens):
            if kept is not None:
                log_p, grad_z = kept, buffers.second
            else:
                log_p, grad_z = scaled_logits(hidden[part], weight, ctx.temperature, buffers)
                log_p.sub_(normalizers[part, None])
            torch.exp(log_p, out=grad_z)  # p
            if grad_entropy is None:
                assert grad_log_probs is not None
                grad_z.mul_(-grad_log_probs[part, None])
            else:
                pull = torch.add(log_p, entropy[part, None], out=None if kept is not None else log_p)
                pull.mul_(grad_entropy[part, None])
                grad_z.mul_(pull if grad_log_probs is None else pull.add_(grad_log_probs[part, None])).neg_()
            if grad_log_probs is not None and len(weight):
                at_target = grad_log_probs[part, None]
                if here is not None:
                    at_target = at_target.masked_fill(~here[part, None], 0.0)
                grad_z.scatter_add_(-1, targets[part, None], at_target)
            if ctx.temperature != 1.0:
                grad_z.div_(ctx.temperature)
            grad_logits = grad_z.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                accumulate_product(grad_weight, grad_logits, hidden[part])
        return grad_hidden, none_or_cast(grad_weight, weight.dtype), None, None, None, None


class Buffers:
    """One or two [chunk, V] in the dtype of the softmax, and one in that of the projection where it is another."""

    def __init__(
        self, size: int, weight: Tensor, wide: torch.dtype, *, two: bool, first: Tensor | None = None
    ) -> None:
        def make(dtype: torch.dtype) -> Tensor:
            return torch.empty(size, weight.shape[0], dtype=dtype, device=weight.device)

        self.first = make(wide) if first is None else first
        self.second = make(wide) if two else self.first
        self.projected = self.first if weight.dtype == wide else make(weight.dtype)


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """h W^T / temperature in the first buffer, and the second; the last chunk may need only a part of both."""
    size = hidden.shape[0]
    z = buffers.first[:size]
    projected = torch.mm(hidden, weight.T, out=buffers.projected[:size])
    if projected.dtype != z.dtype:
        z.copy_(projected)
    if temperature != 1.0:
        z.div_(temperature)
    return z, buffers.second[:size]


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a.T @ b; the sum over chunks is kept in the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]


def none_or_cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
