"""Discounted sums along responses, from the end to the beginning, in chunks instead of token by token.

    y_t = x_t + decay * y_{t+1}        y after the last token is 0

Generalized advantage estimation (decay = gamma * lambda) and discounted returns (decay = gamma) are both this sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Tokens per step of the scan: a [CHUNK, CHUNK] matrix of powers replaces as many sequential steps.
CHUNK = 128


def discounted_sums(values: Tensor, response_lengths: Sequence[int], decay: float, *, chunk: int = CHUNK) -> Tensor:
    """`values` [R] flat, sample after sample, to the discounted sums [R] of the same dtype; exact for every decay in
    [0, 1]. The cost is one matrix product per `chunk` tokens of the longest response."""
    lengths = torch.tensor(list(response_lengths), dtype=torch.int64, device=values.device)
    if len(values) == 0:
        return values.clone()
    longest = int(lengths.max())
    places = padded_places(lengths, longest)
    padded = values.new_zeros(len(lengths) * longest)
    padded[places] = values
    rows = padded.view(len(lengths), longest)
    steps = torch.arange(chunk, device=values.device)
    exponents = (steps[:, None] - steps[None, :]).clamp(min=0)
    # powers[s, t] = decay^(s-t) for s >= t: what x_s contributes to y_t inside a chunk.
    powers = torch.tensor(decay, dtype=values.dtype, device=values.device).pow(exponents).tril()
    carry = values.new_zeros(len(lengths), 1)
    for start in reversed(range(0, longest, chunk)):
        part = rows[:, start : start + chunk]
        width = part.shape[1]
        tail = torch.tensor(decay, dtype=values.dtype, device=values.device).pow(width - steps[:width])
        part.copy_(part @ powers[:width, :width] + carry * tail)
        carry = part[:, :1].clone()
    return padded[places]


def padded_places(lengths: Tensor, longest: int) -> Tensor:
    """int64 [R]: where each flat token lies in rows padded to `longest`."""
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    return ids * longest + torch.arange(len(ids), device=lengths.device) - starts[ids]


def following(values: Tensor, response_lengths: Sequence[int]) -> Tensor:
    """[R] -> [R]: the value at the next token of the same sample, 0 after its last."""
    shifted = torch.cat([values[1:], values.new_zeros(1)]) if len(values) else values.clone()
    ends = torch.tensor(list(response_lengths), dtype=torch.int64, device=values.device).cumsum(0)[
        torch.tensor([n > 0 for n in response_lengths], dtype=torch.bool, device=values.device)
    ]
    shifted[ends - 1] = 0
    return shifted
