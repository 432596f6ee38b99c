"""A limit on how many coroutines do something at once, whatever event loops they run on.

`asyncio.Semaphore` belongs to the first event loop in which someone waits. Rollout plug-ins bring worker threads with
loops of their own while evaluations run on the shared one; all of them count against one limit here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from types import TracebackType

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Semaphore:
    """As `asyncio.Semaphore`: `async with semaphore:`, first come first served.

        acquire   takes a place, or waits in its own loop;  unblocked by a release in any loop or thread
        release   hands the place to the longest waiter whose loop is still open
    """

    def __init__(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"expected at least one place, got {value}")
        self._free = value
        self._waiters: deque[Waiter] = deque()
        self._lock = threading.Lock()

    def locked(self) -> bool:
        """Whether `acquire` would have to wait."""
        return self._free == 0

    async def acquire(self) -> bool:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            loop = asyncio.get_running_loop()
            waiter: Waiter = (loop, loop.create_future())
            self._waiters.append(waiter)
        try:
            await waiter[1]
        except BaseException:
            with self._lock:
                waiting = waiter in self._waiters
                if waiting:
                    self._waiters.remove(waiter)
            if not waiting:  # the place was handed over already
                self.release()
            raise
        return True

    def release(self) -> None:
        with self._lock:
            while self._waiters:
                loop, granted = self._waiters.popleft()
                try:
                    loop.call_soon_threadsafe(_grant, granted)
                except RuntimeError:  # a loop that was closed with its waiters in it
                    continue
                return
            self._free += 1

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _grant(granted: asyncio.Future[None]) -> None:
    if not granted.done():
        granted.set_result(None)
