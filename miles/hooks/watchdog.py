"""The thread that looks after plug-in code that does not come back: it warns, then interrupts, then ends the run.

    every quarter of a second
        event loops     a beat is sent to each; one that has not arrived says that something blocks the loop
        threads         the stack of each, for a call of the door (`limits.limited`, `Hook._limited`) that goes on

    blocks the loop for WARN_AFTER_S      a warning with file and line, once per place
    does not return for PATIENCE_S        a warning with file and line, once per place, whatever it waits for
    longer than --hook-timeout-s          Interrupted is raised in it; the door makes the card
    a grace period longer                 it is inside of C code or catches everything: the card, and `on_stuck`
    nothing of this process gets on       C code that keeps the interpreter, a regular expression that explodes for
                                          example: `frozen` ends the process

Calls cost nothing more for being watched: what is known of them is read from their frames. What awaits is not watched
but limited by its own `asyncio.timeout`, and what runs in a plug-in thread by the one that awaits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from miles.hooks.bind import Hooks
from miles.hooks.call import Hook
from miles.hooks.frozen import FrozenAlarm
from miles.hooks.limits import LIMITED_CODE, TookTooLong, frames_of, interrupt, stack_of
from miles.hooks.source import Place, own_place
from miles.hooks.threads import THREAD_NAME
from miles.hooks.waiting import waiting_calls

logger = logging.getLogger("miles.hooks")

TICK_S = 0.25
WARN_AFTER_S = 1.0
# A call that waits this long is told of: it may never return, and its time limit may be half an hour away.
PATIENCE_S = 10.0
# How often calls that await are looked through.
LOOK_AT_WAITING_S = 2.5
# From the interrupt to the end of the run; shorter for short limits.
GRACE_S = 10.0
# From the time limit to the end of a process in which not even this thread gets on.
FROZEN_GRACE_S = 30.0

_AWAITED_CODE = Hook._limited.__code__
# The frame in which an event loop runs a step of a task, or a callback.
_HANDLE_CODE = asyncio.Handle._run.__code__


@dataclass(frozen=True)
class Call:
    """A plug-in call that a stack shows. `begin` is None for an awaited one, which may have waited rightly."""

    hook: Hook
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    begin: float | None


def innermost_call(frame: FrameType | None) -> Call | None:
    """The last call of the door on a stack that has not returned yet."""
    for f in frames_of(frame):
        if f.f_code is LIMITED_CODE:
            known = f.f_locals
            if known.get("done") is None and "begin" in known:
                return Call(known["owner"], known["args"], known["kwargs"], known["begin"])
        elif f.f_code is _AWAITED_CODE:
            known = f.f_locals
            return Call(known["self"], known["args"], known["kwargs"], None)
    return None


def _task_of(frame: FrameType | None) -> int:
    """Which task (or callback) an event loop runs: the identity of its outermost frame; 0 for none."""
    inner = 0
    for f in frames_of(frame):
        if f.f_code is _HANDLE_CODE:
            return inner
        inner = id(f)
    return 0


@dataclass
class _Pulse:
    """Whether an event loop gets on: it answers each beat before the next one is due."""

    loop: asyncio.AbstractEventLoop
    thread_id: int
    waiting: bool = False
    # Since the last beat arrived; and of that, since the task is running that runs now.
    blocked_s: float = 0.0
    task_s: float = 0.0
    # The file whose code was interrupted since; its other tasks that wait for their turn need not take as long.
    interrupted_file: str | None = None
    _task: int = 0

    def check(self, seconds: float, frame: FrameType | None) -> None:
        """`seconds` after the last check; `frame` is where the thread of the loop is."""
        task = _task_of(frame)
        self.task_s = self.task_s + seconds if self.waiting and task == self._task else 0.0
        self._task = task
        if self.waiting:
            self.blocked_s += seconds
            return
        self.blocked_s, self.waiting = 0.0, True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._beat)

    def _beat(self) -> None:
        self.waiting, self.interrupted_file = False, None


@dataclass
class Watchdog:
    """Watches the plug-ins of one run while it is entered.

    `on_stuck` receives the card of a call that nothing can end, and ends the process.
    """

    hooks: Hooks
    loops: Sequence[tuple[asyncio.AbstractEventLoop, int]]
    on_stuck: Callable[[str], None]
    _stopped: threading.Event = field(default_factory=threading.Event)
    _told: set[str] = field(default_factory=set)
    _looked_at_waiting: float = 0.0
    # Thread -> when it was interrupted last.
    _interrupted: dict[int, float] = field(default_factory=dict)
    # (when, seconds) in which this thread did not run: the process was suspended, or C code kept the interpreter.
    _lost: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.timeout_s = self.hooks.timeout_s
        self._tick_s = TICK_S if self.timeout_s is None else min(TICK_S, max(self.timeout_s / 4, 0.01))
        self._pulses = {thread_id: _Pulse(loop, thread_id) for loop, thread_id in self.loops}
        self._alarm = None if self.timeout_s is None else FrozenAlarm(self.timeout_s + FROZEN_GRACE_S)
        self._thread = threading.Thread(target=self._watch, name="miles-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._alarm is not None:
            self._alarm.__enter__()
        on_main = threading.current_thread() is threading.main_thread()
        self._catches_suspension = on_main and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL
        if self._catches_suspension:
            signal.signal(signal.SIGTSTP, self._suspended)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self._alarm is not None:
            self._alarm.__exit__()
        if self._catches_suspension:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _suspended(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the time until `fg` is not the time of any call."""
        if self._alarm is not None:
            self._alarm.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._postpone()

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last, last_cpu, postponed = time.perf_counter(), time.process_time(), 0.0
        while not self._stopped.wait(self._tick_s):
            now, cpu = time.perf_counter(), time.process_time()
            if now - postponed > FROZEN_GRACE_S / 10:
                postponed = now
                self._postpone()
            self._look(now, now - last, cpu - last_cpu)
            last, last_cpu = now, cpu

    def _postpone(self) -> None:
        if self._alarm is not None:
            self._alarm.postpone()

    def _look(self, now: float, seconds: float, cpu_s: float) -> None:
        lost = seconds - 2 * self._tick_s
        if lost > WARN_AFTER_S:
            self._lost.append((now, lost))
            if cpu_s > lost / 2:
                self._warn_of_hold(lost)
        own, frames = threading.get_ident(), sys._current_frames()
        for pulse in self._pulses.values():
            pulse.check(min(seconds, 2 * self._tick_s), frames.get(pulse.thread_id))
        for thread_id, frame in frames.items():
            if thread_id != own:
                self._judge(thread_id, frame, now)
        if now - self._looked_at_waiting > LOOK_AT_WAITING_S:
            self._looked_at_waiting = now
            for pulse in self._pulses.values():
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    pulse.loop.call_soon_threadsafe(self._look_at_waiting, pulse.loop)

    def _look_at_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        for call in waiting_calls(loop):
            self._warn_of_wait(call.hook, call.place, call.seconds)

    def _judge(self, thread_id: int, frame: FrameType, now: float) -> None:
        call, pulse = innermost_call(frame), self._pulses.get(thread_id)
        if pulse is not None:
            seconds = pulse.task_s
            if pulse.blocked_s > WARN_AFTER_S:
                self._warn_of_block(thread_id, call, pulse.blocked_s)
        elif call is not None and call.begin is not None:
            begin = call.begin
            seconds = now - begin - sum(lost for when, lost in self._lost if when > begin)
            if seconds > PATIENCE_S and not call.hook.is_built_in:
                self._warn_of_wait(call.hook, self._place(stack_of(thread_id), call.hook), seconds)
        else:
            return
        limit = self.timeout_s if call is None else call.hook.timeout_s
        own = pulse is None and call is not None and call.hook.is_built_in
        if pulse is not None and pulse.interrupted_file is not None and self._again(thread_id, call, pulse):
            limit = 2 * self._tick_s
        if limit is not None and seconds > limit and not own:
            self._end(thread_id, call, now, seconds - limit, min(GRACE_S, max(1.0, limit)))

    def _end(self, thread_id: int, call: Call | None, now: float, over_s: float, grace_s: float) -> None:
        stack = stack_of(thread_id)
        if call is None and self._place(stack, None) is None:
            return  # code of our own keeps the loop busy
        if over_s > grace_s:
            self.on_stuck(self._stuck_text(call, stack))
        elif now - self._interrupted.get(thread_id, -grace_s) > min(grace_s / 3, WARN_AFTER_S):
            self._interrupted[thread_id] = now
            interrupt(thread_id)
            place = self._place(stack, None if call is None else call.hook)
            if thread_id in self._pulses and place is not None:
                self._pulses[thread_id].interrupted_file = place.file

    def _again(self, thread_id: int, call: Call | None, pulse: _Pulse) -> bool:
        """Whether the code that was interrupted a moment ago blocks the loop in another task."""
        place = self._place(stack_of(thread_id), None if call is None else call.hook)
        return place is not None and place.file == pulse.interrupted_file

    # ---- what is told --------------------------------------------------------------------------------------------

    def _place(self, stack: TracebackType | None, hook: Hook | None) -> Place | None:
        """The user's innermost line; of an installed plug-in its own."""
        file = None if hook is None or hook.is_built_in else hook.source.file
        return own_place(stack, file, only_users=True)

    def _name(self, place: Place | None, call: Call | None) -> str:
        """`custom-rm rewards.py:31`; the plug-in of a task that it has started itself is known by its file."""
        hook = call.hook if call is not None else None
        if hook is None and place is not None:
            hook = next((h for h in self.hooks if h.source.file == place.file), None)
        return " ".join(str(part) for part in (None if hook is None else hook.point.key, place) if part is not None)

    def _warn_of_block(self, thread_id: int, call: Call | None, seconds: float) -> None:
        place = self._place(stack_of(thread_id), None if call is None else call.hook)
        if place is None or not self._first(f"block {place}"):
            return
        inline = call is not None and not call.hook.point.awaited
        remedy = (
            "It is called inline: keep it short."
            if inline
            else "Await what it waits for, or write `def` instead of `async def`: it then runs in a thread."
        )
        logger.warning(
            "%s has blocked the event loop for %.1f s: nothing else is generated or scored meanwhile. %s",
            self._name(place, call), seconds, remedy,
        )  # fmt: skip

    def _warn_of_wait(self, hook: Hook, place: Place | None, seconds: float) -> None:
        if place is None or seconds <= PATIENCE_S or not self._first(f"wait {place}"):
            return
        end = "does not end it" if hook.timeout_s is None else f"ends it after {hook.timeout_s:g} s"
        logger.warning(
            "%s %s has not returned for %.0f s: %s (--hook-timeout-s %s)",
            hook.point.key, place, seconds, place.text, end,
        )  # fmt: skip

    def _warn_of_hold(self, seconds: float) -> None:
        """This thread did not get on, but the process did: C code has kept the interpreter, and is where it was."""
        pool = {t.ident for t in threading.enumerate() if t.name.startswith(THREAD_NAME)}
        for thread_id, frame in sys._current_frames().items():
            call = innermost_call(frame)
            if call is None and thread_id not in pool and thread_id not in self._pulses:
                continue
            place = self._place(stack_of(thread_id), None if call is None else call.hook)
            if place is not None and self._first(f"hold {place}"):
                logger.warning(
                    "nothing at all ran for %.1f s while %s was at work. C code that keeps the interpreter, such as a "
                    "regular expression, belongs into a process of its own.",
                    seconds, self._name(place, call),
                )  # fmt: skip

    def _first(self, what: str) -> bool:
        if what in self._told:
            return False
        self._told.add(what)
        return True

    def _stuck_text(self, call: Call | None, stack: TracebackType | None) -> str:
        if call is None:
            place = self._place(stack, None)
            return f"{self._name(place, None)} blocks the event loop, does not end and cannot be interrupted."
        error = TookTooLong().with_traceback(stack)
        return self.hooks.guard.stuck(call.hook.failed(error, call.args, call.kwargs))
