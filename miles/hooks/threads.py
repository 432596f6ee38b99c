"""Threads for synchronous plug-ins of awaited plug points.

Unlike `concurrent.futures`, the threads are daemons: a plug-in that never returns cannot keep the run from ending.

    event loop ── job ──► queue ──► thread: fn(*args)
        ▲                                │
        └────── call_soon_threadsafe ────┘   sets the future that the caller awaits
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Enough to overlap rewards that wait (subprocesses, HTTP), few enough not to crowd out the engine on a small machine.
MAX_THREADS = min(32, (os.cpu_count() or 1) + 4)


@dataclass
class _Job:
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    started: bool = False


class Threads:
    """A bounded pool. A thread whose caller has given up (timeout, cancellation) does not count against the bound."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._limit = max_threads
        self._idle = 0
        self._threads = 0

    async def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)` in a thread, in a copy of the caller's context."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        job = _Job(lambda: context.run(fn, *args, **kwargs), loop, loop.create_future())
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            elif self._threads < self._limit:
                self._start()
            self._jobs.put(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._lock:
                if job.started:
                    self._start()  # in place of the one that may never come back; one ends when that one does
            raise

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name=f"miles-plugin-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            with self._lock:
                job.started = not job.future.cancelled()
            if job.started:
                _finish(job, *_outcome(job.call))
            with self._lock:
                if self._threads > self._limit:
                    self._threads -= 1
                    return
                if self._jobs.empty():
                    self._idle += 1


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except StopIteration as error:  # a future cannot carry it
        stopped = RuntimeError("plug-in raised StopIteration")
        stopped.__cause__ = error
        return None, stopped.with_traceback(error.__traceback__)
    except BaseException as error:  # handed to whoever awaits, KeyboardInterrupt included
        return None, error


def _finish(job: _Job, value: Any, error: BaseException | None) -> None:
    def settle() -> None:
        if job.future.cancelled():
            return
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(value)

    try:
        job.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return
