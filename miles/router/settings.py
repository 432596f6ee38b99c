"""What the router reads from `args`, with the defaults of attributes that a bare Namespace lacks."""

from __future__ import annotations

import resource
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """One field per limit. Times in seconds, sizes in bytes.

    Example: `RouterSettings.of(args).max_connections == 512 * 8`
    """

    max_connections: int  # to all workers together; requests beyond it wait
    timeout_s: float | None = None  # of a whole request
    health_interval_s: float = 30.0
    failure_threshold: int = 3
    max_body: int = 1024 * MIB
    max_waiting: int = 16384
    worker_wait_s: float = 30.0
    """How long a request waits while every worker is held; then it is answered with 503."""

    @classmethod
    def of(cls, args: Namespace) -> RouterSettings:
        """`args` is the run's, or has a few of its attributes; what is missing or None has a default."""
        given: dict[str, Any] = {
            "timeout_s": _get(args, "miles_router_timeout") or None,
            "health_interval_s": _get(args, "rollout_health_check_interval"),
            "failure_threshold": _get(args, "miles_router_health_check_failure_threshold"),
            "max_body": _get(args, "miles_router_max_body_bytes"),
            "max_waiting": _get(args, "miles_router_max_waiting"),
            "worker_wait_s": _get(args, "miles_router_worker_wait"),
        }
        return cls(max_connections=_connections(args), **{name: v for name, v in given.items() if v is not None})


def _get(args: Namespace, name: str) -> Any:
    """`args` is the user's Namespace, in which any attribute may be missing."""
    return getattr(args, name, None)


def _connections(args: Namespace) -> int:
    """--miles-router-max-connections, else what the engines take together, else what the open files allow."""
    given = _get(args, "miles_router_max_connections")
    if isinstance(given, int):
        return given
    concurrency, gpus = _get(args, "sglang_server_concurrency"), _get(args, "rollout_num_gpus")
    if isinstance(concurrency, int) and isinstance(gpus, int):
        per_engine = _get(args, "rollout_num_gpus_per_engine")
        return max(concurrency, concurrency * gpus // (per_engine if isinstance(per_engine, int) else 1))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, (files - 256) // 2) if files != resource.RLIM_INFINITY else 65536
