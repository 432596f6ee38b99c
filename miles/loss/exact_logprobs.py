"""`miles.loss.logprobs.linear_log_probs` in `--true-on-policy-mode`: the same values bit for bit as the engine's.

The forward pass is that of `miles/exact.py`; the gradient is the ordinary one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles import exact
from miles.loss.logprobs import CHUNK_ELEMENTS, LinearLogProbs, TokenLogProbs, chunks


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogProbs:
    """log softmax(hidden @ weight.T / temperature) at `targets` [T], float32; see `miles.loss.logprobs`."""
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_ELEMENTS // weight.shape[0], 1)
    log_probs, entropy = _ExactLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, with_entropy, chunk_tokens
    )
    return TokenLogProbs(log_probs, entropy)


class _ExactLogProbs(LinearLogProbs):
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
        grid = exact.on_grid(weight)
        # A tensor: division by a Python number may become a product with its rounded inverse.
        divisor = torch.tensor(temperature, device=hidden.device)
        log_probs = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(log_probs) if with_entropy else None
        normalizers = torch.empty_like(log_probs)
        for part in chunks(len(hidden), chunk_tokens):
            z = exact.linear(hidden[part], grid)
            z = z / divisor if temperature != 1.0 else z
            log_total, top = exact.log_normalizers(z)
            log_p = (z.double() - top).sub_(log_total)
            log_probs[part] = log_p.gather(-1, targets[part, None]).squeeze(-1).float()
            normalizers[part] = (top + log_total).squeeze(-1).float()
            if entropy is not None:
                entropy[part] = -(log_p.exp() * log_p).sum(-1).float()
        ctx.temperature, ctx.chunk_tokens, ctx.wide = temperature, chunk_tokens, torch.float32
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropy, None, None)
        return log_probs, entropy
