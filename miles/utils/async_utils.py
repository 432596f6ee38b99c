"""Published path of `miles.rollout.loop_thread`."""

from miles.rollout.loop_thread import AsyncLoopThread, get_async_loop, run

__all__ = ["AsyncLoopThread", "get_async_loop", "run"]
