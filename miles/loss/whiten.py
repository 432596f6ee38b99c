"""Whitening of advantages: zero mean and unit variance over the trained tokens of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.errors import UsageError

EPSILON = 1e-8

SumOverRanks = Callable[[Tensor], Tensor]
"""A tensor to its sum over all data- and context-parallel ranks; the identity in one process."""


def whiten(
    values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks, *, shift_mean: bool = True, epsilon: float = EPSILON
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) for `values` [R], with the statistics of the tokens whose `mask` is not 0.

    The variance is Bessel-corrected and computed in a second pass, in float64. Masked tokens are transformed like the
    others: they reach no loss. Without `shift_mean` the mean is put back. Raises UsageError where no rank has a trained
    token; a single one, whose variance is not defined, counts as variance 0.
    """
    trained = mask != 0
    wide = torch.where(trained, values, 0.0).double()
    count, total = sum_over_ranks(torch.stack([trained.sum().double(), wide.sum()])).unbind()
    if count == 0:
        raise UsageError(
            "--normalize-advantages: no response token of this step is trained (every loss mask is 0), so there is "
            "nothing to whiten. Look at what sets loss_mask and remove_sample."
        )
    mean = total / count
    squares = sum_over_ranks(torch.where(trained, wide - mean, 0.0).square().sum()[None])[0]
    variance = squares / (count - 1) if count > 1 else squares
    whitened = (values.double() - mean) * torch.rsqrt(variance + epsilon)
    return (whitened if shift_mean else whitened + mean).to(values.dtype)
