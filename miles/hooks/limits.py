"""Ending a call that takes too long, in whichever thread it runs.

`Interrupted` is raised *inside* the plug-in's own code, between two of its bytecodes (CPython's
`PyThreadState_SetAsyncExc`), so it unwinds through the user's `with` and `finally` and its traceback names the line
that did not come to an end. Code that is inside a C function is interrupted when that function returns.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """Raised in plug-in code that has passed its time limit. No `Exception`: plug-ins catch those and go on."""


class TookTooLong(Exception):
    """A call passed the time limit of its Hook. Its traceback leads to where the plug-in was at that moment."""


def interrupt(thread_id: int) -> None:
    """Raise Interrupted in that thread at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(Interrupted))


def limited(
    owner: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, float]:
    """The value of one inline call, which the watchdog may interrupt, and its seconds. Raises TookTooLong.

    The watchdog finds it on the stack of its thread and reads `owner`, `args`, `kwargs`, `begin` and `done`: watching
    costs a call nothing.
    """
    begin = perf_counter()
    done = None
    try:
        value = call(*args, **kwargs)
        done = perf_counter()  # from here on it is not interrupted any more; what was on its way arrives in this line
    except Interrupted as error:
        raise TookTooLong from error
    return value, done - begin


LIMITED_CODE = limited.__code__


@contextmanager
def frames_at_rest() -> Iterator[None]:
    """For reading frames of other threads, and of what is reached from them.

    Up to CPython 3.11 making the object of a frame may start a garbage collection. A finalizer in it may let the other
    thread go on, which then leaves the very frame. (CPython 3.11.5 has this for `sys._current_frames` alone, gh-106883;
    3.12 collects between bytecodes only.)
    """
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards. They stay at rest until the iteration ends."""
    with frames_at_rest():
        while frame is not None:
            yield frame
            frame = frame.f_back


def stack_of(thread_id: int) -> TracebackType | None:
    """Where that thread is at this moment, as a traceback; None where it has ended."""
    stack: TracebackType | None = None
    for frame in frames_of(sys._current_frames().get(thread_id)):
        stack = TracebackType(stack, frame, frame.f_lasti, frame.f_lineno or 0)
    return stack
