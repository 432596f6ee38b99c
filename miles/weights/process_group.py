"""Process groups with members of their own, beside the default group: a trainer and the engines that it sends to.

`torch.distributed.init_process_group` can only be called once in a process; an engine is in as many groups as trainers
send to it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _new_process_group_helper, _world, rendezvous

DEFAULT_TIMEOUT = timedelta(minutes=30)


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
    """As `torch.distributed.init_process_group`, as often as one likes. `init_method` (a URL) or `store`.

    `timeout` bounds the wait for the other members, and each collective.
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
