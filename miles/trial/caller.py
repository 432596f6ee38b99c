"""Calls of plug-ins with a clock: what takes too long is interrupted where it stands, and the line is known.

    Python code, sleeping, waiting      SIGALRM raises TookTooLong in the main thread
    a coroutine that only awaits        cancelled by asyncio, at its own `await`
    code that catches everything        the process says so and ends with status 2
    C code that holds the interpreter   the process ends with status 1, after its stack has been printed

Awaitables are finished in one event loop for all calls, as in a run: clients and locks of a plug-in stay usable.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import inspect
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from types import FrameType
from typing import Any

from miles.hooks.limits import stack_of
from miles.hooks.source import own_place
from miles.hooks.threads import Threads

# Seconds after the limit at which asyncio has had its chance, at which a call counts as stuck, and at which not even
# another thread has come to say so.
FOR_CANCELLING_S, FOR_RETURNING_S, FOR_ANSWERING_S = 0.2, 5.0, 7.0
# Seconds between two interruptions of code that catches everything, and how many there are.
AGAIN_S, MAX_INTERRUPTIONS = 0.5, 8


class TookTooLong(BaseException):
    """Raised inside of a call by the clock. No Exception: a plug-in that catches those must not catch this."""


class InPlace(Threads):
    """Runs synchronous functions where they are called, so that a debugger and the clock reach them."""

    async def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)


class Caller:
    """Makes calls and measures them. `limit_s` None lets them take as long as they like (`--pdb`).

    Example: `call(hook.raw, args, sample)` returns what the plug-in returned; `call.seconds[-1]` is how long it took.
    """

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s = limit_s
        # Whose calls these are, for the sentence that ends the process.
        self.about = "a plug-in"
        # Calls that took too long; what they started may still be going on.
        self.num_stopped = 0
        self.seconds: list[float] = []
        self._runner: asyncio.Runner | None = None

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with time_limit(self.limit_s, self._give_up):
                begin = perf_counter()
                try:
                    value = fn(*args, **kwargs)
                    return self._finished(value) if inspect.isawaitable(value) else value
                finally:
                    self.seconds.append(perf_counter() - begin)
        except TookTooLong:
            self._runner = None  # its loop may hold tasks that do not end
            self.num_stopped += 1
            raise

    def _give_up(self) -> None:
        """End the process: nothing else stops what has taken the main thread."""
        place = own_place(stack_of(threading.main_thread().ident or 0), None, only_users=True)
        where = "" if place is None else f" Still at {place}: {place.text}"
        sys.stdout.flush()
        print(
            f"miles: {self.about}: no result after {self.limit_s:g} s, and it cannot be interrupted: it catches "
            f"everything, or is inside of C code. Nothing after it was tried.{where}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    def _finished(self, value: Awaitable[Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(_within(value, self.limit_s))

    def close(self) -> None:
        """End what plug-ins have left in the event loop."""
        if self._runner is not None:
            with contextlib.suppress(TookTooLong), time_limit(1.0):
                self._runner.close()
            self._runner = None

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _within(value: Awaitable[Any], limit_s: float | None) -> Any:
    scope = asyncio.timeout(limit_s)
    try:
        async with scope:
            return await value
    except TimeoutError as error:
        if scope.expired():
            raise TookTooLong from error
        raise


@contextlib.contextmanager
def time_limit(limit_s: float | None, give_up: Callable[[], None] | None = None) -> Iterator[None]:
    """Raise TookTooLong inside the block after `limit_s` seconds; None, or another thread than the main one: never.

    `give_up` is called in another thread where that does not help.
    """
    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    interruptions = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interruptions
        interruptions += 1
        if interruptions <= MAX_INTERRUPTIONS:
            raise TookTooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    with _last_resort(limit_s, give_up):
        signal.setitimer(signal.ITIMER_REAL, limit_s + FOR_CANCELLING_S, AGAIN_S)
        try:
            yield
        finally:
            interruptions = MAX_INTERRUPTIONS
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _last_resort(limit_s: float, give_up: Callable[[], None] | None) -> Iterator[None]:
    """For a block that SIGALRM does not end: `give_up`; where no thread gets to run, the stack and exit status 1."""
    if give_up is None or sys.__stderr__ is None:
        yield
        return
    timer = threading.Timer(limit_s + FOR_RETURNING_S, give_up)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(limit_s + FOR_ANSWERING_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
