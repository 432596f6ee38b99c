"""Published path of `miles.rollout.loop_thread`."""

from typing import Any

from miles.rollout import loop_thread
from miles.rollout.loop_thread import AsyncLoopThread, get_async_loop, run

__all__ = ["AsyncLoopThread", "get_async_loop", "run"]


def __getattr__(name: str) -> Any:
    if name == "async_loop":  # None until the loop is first used
        return loop_thread._shared
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
