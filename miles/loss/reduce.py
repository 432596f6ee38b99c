"""From one value per response token to one scalar per micro batch.

The convention of every loss here: a loss is a SUM over samples (of a mean over the sample's trained tokens), so that
micro batches and ranks simply add up; `dispatch` divides by the number of samples of the optimizer step. With
`--calculate-per-token-loss` it is a sum over tokens, divided by the number of trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Reducer = Callable[[Tensor], Tensor]
"""Flat per-token values [R] -> scalar, as a sum over samples."""


def segment_sum(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """[R] -> [n]: the sum of each sample's tokens; 0 for a sample without tokens. Differentiable."""
    return values.new_zeros(num_samples).index_add(0, sample_ids, values)


def ids_of(response_lengths: Sequence[int], device: torch.device) -> Tensor:
    """int64 [R]: which sample each response token belongs to."""
    lengths = torch.tensor(response_lengths, dtype=torch.int64, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)


def token_weights(loss_mask: Tensor, sample_ids: Tensor, num_samples: int, *, per_token: bool) -> Tensor:
    """float64 [R]: what each token counts, m_t / max(sum of the sample's m, 1), or m_t where `per_token`."""
    mask = loss_mask.double()
    if per_token:
        return mask
    totals = segment_sum(mask, sample_ids, num_samples).clamp(min=1)
    return mask / totals[sample_ids]


class SumOfSampleMean:
    """sum over samples i of (sum over t of x_t m_t) / max(sum over t of m_t, 1); with `per_token`, of x_t m_t alone.

    Called with flat values [R] over the response tokens of all samples. A masked token takes no part whatever its
    value: NaN and infinity there do not reach the result.
    """

    def __init__(self, loss_mask: Tensor, sample_ids: Tensor, num_samples: int, *, per_token: bool = False) -> None:
        self.weights = token_weights(loss_mask, sample_ids, num_samples, per_token=per_token)
        self.masked = loss_mask == 0
        self.per_token = per_token

    def __call__(self, values: Tensor) -> Tensor:
        return (values.masked_fill(self.masked, 0.0) * self.weights.to(values.dtype)).sum()


class SumOverConstant:
    """sum over samples i of (sum over t of x_t m_t) / `length`: Dr.GRPO (arXiv:2503.20783), where a token of a long
    response counts as much as one of a short response."""

    def __init__(self, loss_mask: Tensor, length: float) -> None:
        self.loss_mask, self.length = loss_mask, length

    def __call__(self, values: Tensor) -> Tensor:
        return (values.masked_fill(self.loss_mask == 0, 0.0) * self.loss_mask.to(values.dtype)).sum() / self.length


def get_sum_of_sample_mean(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    parallel_state: Any,
    calculate_per_token_loss: bool = False,
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> Reducer:
    """The published factory, for samples that are whole in one process (`cp_size` 1).

    The callable takes the concatenation of the samples' response tokens, which is the same in both layouts, so
    `total_lengths`, `qkv_format` and `max_seq_lens` matter only under context parallelism.
    """
    if parallel_state.cp_size != 1:
        raise ValueError(f"samples cut over {parallel_state.cp_size} context-parallel ranks need the backend's reducer")
    check_masks(response_lengths, loss_masks)
    if not loss_masks:
        return SumOfSampleMean(torch.empty(0), torch.empty(0, dtype=torch.int64), 0, per_token=calculate_per_token_loss)
    flat = torch.cat(list(loss_masks))
    ids = ids_of(response_lengths, flat.device)
    return SumOfSampleMean(flat, ids, len(loss_masks), per_token=calculate_per_token_loss)


def check_masks(response_lengths: Sequence[int], loss_masks: Sequence[Tensor]) -> None:
    lengths = [int(mask.shape[0]) for mask in loss_masks]
    if lengths != list(response_lengths):
        raise ValueError(f"loss masks of lengths {lengths} do not fit responses of lengths {list(response_lengths)}")
