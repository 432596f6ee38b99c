"""Which awaited calls of plug-ins go on in an event loop: since when, and at which line. Nothing is ended here.

    task ── coroutine ── coroutine ── ... ── Hook.call_async ── Hook._limited ── the plug-in ── what it awaits
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any

from miles.hooks.call import Hook, RewardHook
from miles.hooks.limits import stack_of
from miles.hooks.source import Place, is_built_in, is_machinery, own_place
from miles.hooks.threads import Threads

_DOORS = tuple(f.__code__ for f in (Hook.call_async, RewardHook._scored, RewardHook.call_batch_async))
_THREAD_CODE = Threads.run.__code__


@dataclass(frozen=True)
class WaitingCall:
    """A call that has not returned `seconds` after it began, and the user's line where it is."""

    hook: Hook
    place: Place
    seconds: float


def waiting_calls(loop: asyncio.AbstractEventLoop) -> Iterator[WaitingCall]:
    """The calls of users' plug-ins that wait for something else than the run itself. Call it in the loop's thread."""
    now = perf_counter()
    for task in asyncio.all_tasks(loop):
        frames = list(_frames(task.get_coro()))
        doors = [i for i, frame in enumerate(frames) if frame.f_code in _DOORS]
        if not doors:
            continue
        known, inside = frames[doors[-1]].f_locals, frames[doors[-1] + 1 :]
        place = _place(known["self"], inside)
        if place is not None and "begin" in known:
            yield WaitingCall(known["self"], place, now - known["begin"])


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """From the outermost inwards, through everything that is awaited in the same task."""
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _place(hook: Hook, inside: list[FrameType]) -> Place | None:
    """Where a call is; None where it is our own code that makes it wait, or where no thread has taken it yet."""
    if hook.is_built_in or any(_is_our_work(frame.f_code.co_filename) for frame in inside):
        return None
    thread = next((frame for frame in inside if frame.f_code is _THREAD_CODE), None)
    if thread is not None:
        job = thread.f_locals.get("job")
        stack = None if job is None or job.thread_id is None else stack_of(job.thread_id)
    else:
        stack = _traceback(inside)
    return own_place(stack, hook.source.file, only_users=True)


def _is_our_work(file: str) -> bool:
    return is_built_in(file) and not is_machinery(file)


def _traceback(frames: list[FrameType]) -> TracebackType | None:
    stack: TracebackType | None = None
    for frame in reversed(frames):
        stack = TracebackType(stack, frame, frame.f_lasti, frame.f_lineno or 0)
    return stack
