"""From one value per response token to one scalar per micro batch.

The convention of every loss here: a loss is a SUM over samples (of a mean over the sample's trained tokens), so that
micro batches and ranks simply add up; `dispatch` divides by the number of samples of the optimizer step. With
`--calculate-per-token-loss` it is a sum over tokens, divided by the number of trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miles.loss.context_parallel import share_of
from miles.loss.parallel_state import ParallelState

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


class SumOfSampleMeanPart:
    """One context-parallel rank's part of `SumOfSampleMean`: called with the values [R_local] of the tokens that this
    rank owns, `own` int64 [R_local] in the flat response tokens; denominators are those of whole samples."""

    def __init__(
        self, loss_mask: Tensor, sample_ids: Tensor, num_samples: int, own: Tensor, *, per_token: bool = False
    ) -> None:
        self.weights = token_weights(loss_mask, sample_ids, num_samples, per_token=per_token)[own]
        self.masked = loss_mask[own] == 0

    def __call__(self, values: Tensor) -> Tensor:
        return (values.masked_fill(self.masked, 0.0) * self.weights.to(values.dtype)).sum()


def get_sum_of_sample_mean(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    parallel_state: ParallelState,
    calculate_per_token_loss: bool = False,
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> Reducer:
    """The published factory. `loss_masks` are whole, one per sample.

    The callable takes the concatenation of the samples' response tokens; under context parallelism, of those that this
    rank owns, and returns its part of the sum. Which those are depends on `total_lengths`, and on `max_seq_lens` where
    `qkv_format` is bshd.
    """
    check_masks(response_lengths, loss_masks)
    per_token = calculate_per_token_loss
    if not loss_masks:
        return SumOfSampleMean(torch.empty(0), torch.empty(0, dtype=torch.int64), 0, per_token=per_token)
    flat = torch.cat(list(loss_masks))
    ids = ids_of(response_lengths, flat.device)
    if parallel_state.cp_size == 1:
        return SumOfSampleMean(flat, ids, len(loss_masks), per_token=per_token)
    share = share_of(
        total_lengths,
        response_lengths,
        rank=parallel_state.cp_rank,
        size=parallel_state.cp_size,
        device=flat.device,
        padded_lengths=None if qkv_format == "thd" else max_seq_lens,
    )
    return SumOfSampleMeanPart(flat, ids, len(loss_masks), share.own, per_token=per_token)


def check_masks(response_lengths: Sequence[int], loss_masks: Sequence[Tensor]) -> None:
    lengths = [int(mask.shape[0]) for mask in loss_masks]
    if lengths != list(response_lengths):
        raise ValueError(f"loss masks of lengths {lengths} do not fit responses of lengths {list(response_lengths)}")
