"""Threads for synchronous plug-ins of awaited plug points.

Unlike `concurrent.futures`, the threads are daemons: a plug-in that never returns cannot keep the run from ending. A
call whose caller has given up (time limit, cancellation) is interrupted, and its thread is not used again.

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
from types import TracebackType
from typing import Any

from miles.hooks.limits import Interrupted, interrupt, stack_of

THREAD_NAME = "miles-plugin"
# Enough to overlap rewards that wait (subprocesses, HTTP), few enough not to crowd out the engine on a small machine.
MAX_THREADS = min(32, (os.cpu_count() or 1) + 4)


@dataclass
class _Job:
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    # The thread that has taken it; None before.
    thread_id: int | None = None
    done: bool = False
    given_up: bool = False


class Threads:
    """A bounded pool. A thread whose caller has given up is replaced and does not count against the bound."""

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
        except asyncio.CancelledError as error:
            raise error.with_traceback(self._give_up(job) or error.__traceback__) from None

    def _give_up(self, job: _Job) -> TracebackType | None:
        """Interrupt a job that is running and replace its thread; where the job was at that moment."""
        with self._lock:
            if job.thread_id is None or job.done:
                return None
            job.given_up = True
            self._threads -= 1
            self._start()
            stack = stack_of(job.thread_id)
            interrupt(job.thread_id)
            return stack

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name=f"{THREAD_NAME}-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        try:
            while self._one(self._jobs.get()):
                pass
        except Interrupted:  # was on its way when the job ended by itself
            return

    def _one(self, job: _Job) -> bool:
        """Run a job, unless nobody wants it any more; whether the thread may take another one."""
        with self._lock:
            job.thread_id = None if job.future.cancelled() else threading.get_ident()
        if job.thread_id is not None:
            value, error = _outcome(job.call)
            with self._lock:
                job.done = True
            if job.given_up:
                return False
            _finish(job, value, error)
        with self._lock:
            if self._jobs.empty():
                self._idle += 1
        return True


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except StopIteration as error:  # a future cannot carry it
        stopped = RuntimeError("plug-in raised StopIteration")
        stopped.__cause__ = error
        return None, stopped
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
