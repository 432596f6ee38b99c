"""One event loop in a daemon thread of its own: where rollouts, rewards and HTTP run.

    caller's thread       consumes  a coroutine;  waits for its result;  unblocked by the task's end
    thread "miles-loop"   runs every coroutine handed in;  never waits for a caller

`run` is how synchronous code (a rollout function of the published form, the driver) reaches that loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# How long an interrupted caller waits for its coroutine to clean up.
CANCEL_GRACE_S = 5.0


class AsyncLoopThread:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="miles-loop", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
                return
            except (KeyboardInterrupt, SystemExit):
                # asyncio stores these in the task that raised them and then stops the loop. Go on, so that
                # whoever waits for the task receives them.
                continue

    @property
    def thread_id(self) -> int:
        assert self.thread.ident is not None  # it is started
        return self.thread.ident

    @property
    def alive(self) -> bool:
        """False in the child of a fork, which inherits the object but not the thread."""
        return self.thread.is_alive()

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run `coro` on the loop and block until it is done; its exception is raised here.

        Called from the loop itself this would wait for ever, so it raises RuntimeError instead. An interrupt
        (KeyboardInterrupt) of the waiting thread cancels the coroutine and gives it a few seconds to clean up.
        """
        if threading.current_thread() is self.thread:
            name = getattr(coro, "__qualname__", repr(coro))
            coro.close()
            raise RuntimeError(
                f"run({name}) was called from the event loop that would have to run it, and would wait for ever. "
                "Inside a coroutine, write `await` instead of `run`."
            )
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        running: list[asyncio.Task[T]] = []

        def cancel() -> None:
            if running:
                running[0].cancel()
            else:  # interrupted before it was handed over
                coro.close()
                done.cancel()

        try:
            self.loop.call_soon_threadsafe(self._start, coro, done, running)
            return done.result()
        except BaseException:
            if not done.done():
                self.loop.call_soon_threadsafe(cancel)
                concurrent.futures.wait([done], timeout=CANCEL_GRACE_S)
            raise

    def _start(
        self, coro: Coroutine[Any, Any, T], done: concurrent.futures.Future[T], running: list[asyncio.Task[T]]
    ) -> None:
        task = self.loop.create_task(coro, name=f"run {getattr(coro, '__qualname__', '')}")
        running.append(task)

        def report(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                done.set_exception(concurrent.futures.CancelledError())
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        task.add_done_callback(report)


_lock = threading.Lock()
_shared: AsyncLoopThread | None = None


def get_async_loop() -> AsyncLoopThread:
    """The loop thread of this process, started on first use."""
    global _shared
    with _lock:
        if _shared is None or not _shared.alive:
            _shared = AsyncLoopThread()
        return _shared


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` on the shared loop and block for its result; see `AsyncLoopThread.run`."""
    return get_async_loop().run(coro)
