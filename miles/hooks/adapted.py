"""What an adapter makes of a plug-in, and the one rule about threads: a synchronous function of an awaited plug point
runs in one."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from miles.hooks.adapt import is_async
from miles.hooks.threads import Threads
from miles.types import RolloutFnConstructorInput

Fn = Callable[..., Any]
AsyncFn = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Adapted:
    """A plug-in in canonical shape.

    `call` is the canonical call (of a rollout function: what is called with the object that `build` makes).
    `batch` scores several samples at once, for reward functions that can; without it they are scored one by one.
    """

    call: Fn
    batch: AsyncFn | None = None
    build: Callable[[RolloutFnConstructorInput], Any] | None = None


def awaitable(fn: Fn, threads: Threads | None) -> AsyncFn:
    """`fn` as a coroutine function. A synchronous one runs in a thread; what it returns is awaited where it can be."""
    if is_async(fn):
        return fn

    async def call(*args: Any, **kwargs: Any) -> Any:
        value = fn(*args, **kwargs) if threads is None else await threads.run(fn, *args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    return call
