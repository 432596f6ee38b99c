"""Published import path of helpers over `torch.distributed`. The core has ranks of its own and needs none of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from miles.errors import UsageError
from miles.loss.whiten import whiten
from miles.weights.process_group import init_process_group

__all__ = ["GLOO_GROUP", "distributed_masked_whiten", "get_gloo_group", "init_gloo_group", "init_process_group"]

GLOO_GROUP: dist.ProcessGroup | None = None


def init_gloo_group() -> dist.ProcessGroup:
    """A group of all processes for objects and CPU tensors, made once. Needs an initialised torch.distributed."""
    global GLOO_GROUP
    if GLOO_GROUP is None:
        GLOO_GROUP = dist.new_group(backend="gloo")
    return GLOO_GROUP


def get_gloo_group() -> dist.ProcessGroup:
    """The group that `init_gloo_group` made; RuntimeError before that."""
    if GLOO_GROUP is None:
        raise RuntimeError("no Gloo group in this process: call init_gloo_group() first")
    return GLOO_GROUP


def distributed_masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    process_group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """(values - mean) / sqrt(variance + epsilon), over the unmasked values of all processes of the group.

    The variance is the unbiased one. `shift_mean=False` adds the mean back. ValueError where everything is masked.
    """

    def over_ranks(sums: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(sums, group=process_group)
        return sums

    try:
        return whiten(values, mask, over_ranks, shift_mean=shift_mean, epsilon=epsilon)
    except UsageError as error:
        raise ValueError("distributed_masked_whiten: no value is unmasked on any process") from error
