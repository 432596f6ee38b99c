"""Published import path of helpers over `torch.distributed`. The core has ranks of its own and needs none of them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _new_process_group_helper, _world, rendezvous

from miles.errors import UsageError
from miles.loss.whiten import whiten

__all__ = ["GLOO_GROUP", "distributed_masked_whiten", "get_gloo_group", "init_gloo_group", "init_process_group"]

GLOO_GROUP: dist.ProcessGroup | None = None
DEFAULT_TIMEOUT = timedelta(minutes=30)


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


def init_process_group(
    backend: str | None = None,
    init_method: str | None = None,
    timeout: timedelta | None = None,
    world_size: int = -1,
    rank: int = -1,
    store: Store | None = None,
    group_name: str | None = None,
    pg_options: Any | None = None,
) -> dist.ProcessGroup:
    """A process group with members of its own, beside the default group: trainer and engines share one, for instance.

    As `torch.distributed.init_process_group`, which a process can only call once. `init_method` (a URL) or `store`.
    """
    if (store is None) == (init_method is None):
        raise ValueError("init_process_group: give either init_method or store")
    timeout = timeout or DEFAULT_TIMEOUT
    if store is None:
        store, rank, world_size = next(iter(rendezvous(init_method, rank, world_size, timeout=timeout)))
        store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend or "undefined"),
        PrefixStore(group_name or "miles", store),
        group_name=group_name or "miles",
        backend_options=pg_options,
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


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
