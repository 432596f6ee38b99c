"""Plug-ins that do not come back: told, interrupted, and where nothing helps, the end of the run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from miles.errors import HookError
from miles.hooks import Hooks, bind, function_registry
from miles.hooks.frozen import message
from miles.hooks.limits import frames_of
from miles.hooks.threads import THREAD_NAME
from miles.hooks.watchdog import Watchdog
from miles.types import Failure, Sample
from miles.utils.http_utils import post

ARGS = Namespace(reward_key=None)
LIMIT_S = 0.2


@pytest.fixture
def loop() -> Iterator[tuple[asyncio.AbstractEventLoop, int]]:
    """An event loop in a thread of its own."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    assert thread.ident is not None
    yield made, thread.ident
    made.call_soon_threadsafe(made.stop)
    thread.join(5)
    assert not thread.is_alive()
    made.close()


def hooks_of(point: str, target: Callable[..., Any], **settings: Any) -> Hooks:
    with function_registry.temporary("test:it", target):
        return bind(Namespace(**{f"{point}_path": "test:it"}), **{"timeout_s": LIMIT_S, **settings})


class Watched:
    """The calls of one reward on the loop, under a watchdog."""

    def __init__(self, reward: Any, loop: tuple[asyncio.AbstractEventLoop, int], **settings: Any) -> None:
        self.hooks, self.loop = hooks_of("custom_rm", reward, **settings), loop
        self.stuck: list[str] = []

    def __call__(self, *indices: int) -> list[Future[Any]]:
        assert self.hooks.custom_rm is not None
        calls = [self.hooks.custom_rm.call_async(ARGS, Sample(index=i)) for i in indices]
        return [asyncio.run_coroutine_threadsafe(call, self.loop[0]) for call in calls]

    def dog(self) -> Watchdog:
        return Watchdog(self.hooks, [self.loop], on_stuck=self.stuck.append)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(text))


async def loops(args: Namespace, sample: Sample) -> float:
    while sample is not None:
        sample.tokens = []  # loops
    return 1.0


async def loops_in_its_task(args: Namespace, sample: Sample) -> float:
    await asyncio.create_task(loops(args, sample))
    return 1.0


def loops_in_a_thread(args: Namespace, sample: Sample) -> float:
    while sample is not None:
        sample.tokens = []  # in a thread
    return 1.0


@pytest.mark.parametrize(
    ("reward", "line"),
    [(loops, "# loops"), (loops_in_its_task, "# loops"), (loops_in_a_thread, "# in a thread")],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_an_endless_loop_is_interrupted(reward: Any, line: str, loop: tuple[asyncio.AbstractEventLoop, int]) -> None:
    watched = Watched(reward, loop)
    with watched.dog():
        begin = time.perf_counter()
        (call,) = watched(4)
        with pytest.raises(HookError) as caught:
            call.result(10)
        assert time.perf_counter() - begin < 5
        # The loop goes on: the same again.
        assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "works"), loop[0]).result(5) == "works"
    card = str(caught.value)
    places = {line_of(line) - 1, line_of(line)}
    assert any(f"test_hooks_watchdog.py:{place}\n" in card for place in places), card
    assert "took longer than 0.2 s (--hook-timeout-s)" in card and not watched.stuck
    time.sleep(0.1)
    assert not _threads_in("loops_in_a_thread"), "the thread has ended as well"


def _threads_in(function: str) -> list[threading.Thread]:
    """Threads of plug-ins that are in `function`."""
    found = []
    for thread in threading.enumerate():
        frames = frames_of(sys._current_frames().get(thread.ident or 0))
        if thread.name.startswith(THREAD_NAME) and any(f.f_code.co_name == function for f in frames):
            found.append(thread)
    return found


def test_others_that_wait_for_their_turn_do_not_take_as_long(loop: tuple[asyncio.AbstractEventLoop, int]) -> None:
    watched = Watched(loops, loop, timeout_s=0.4)
    with watched.dog():
        begin = time.perf_counter()
        for call in watched(*range(30)):
            with pytest.raises(HookError, match="sample    0,"):
                call.result(20)
        assert time.perf_counter() - begin < 6, "0.4 s for each would be 12 s"


def test_under_a_tolerant_policy_the_run_goes_on(loop: tuple[asyncio.AbstractEventLoop, int]) -> None:
    async def one_loops(args: Namespace, sample: Sample) -> float:
        while sample.index == 1:
            sample.tokens = []
        return 1.0

    watched = Watched(one_loops, loop, policies={"custom-rm": "drop"})
    with watched.dog():
        good, bad, other = (call.result(10) for call in watched(0, 1, 2))
    assert good == other == 1.0
    assert isinstance(bad, Failure) and bad.kind == "timeout" and bad.dropped


def test_a_synchronous_plug_point_is_interrupted_in_its_thread() -> None:
    def endless(args: Namespace, samples: list[Sample]) -> bool:
        while True:
            samples.clear()

    hooks = hooks_of("dynamic_sampling_filter", endless)
    assert hooks.dynamic_sampling_filter is not None
    with Watchdog(hooks, [], on_stuck=print), pytest.raises(HookError, match="took longer than"):
        hooks.dynamic_sampling_filter(ARGS, [])


def test_the_reducer_that_a_reducer_function_makes_is_limited_too() -> None:
    def make(total_lengths: Any, response_lengths: Any, loss_masks: Any, per_token: bool = False) -> Any:
        def reduce(values: list[int]) -> Any:
            while True:
                values.clear()

        return reduce

    hooks = hooks_of("custom_pg_loss_reducer_function", make)
    hook = hooks.custom_pg_loss_reducer_function
    assert hook is not None
    with Watchdog(hooks, [], on_stuck=print), pytest.raises(HookError, match="took longer than"):
        hook([1], [1], [], False)([1, 2])


def test_making_a_data_source_may_take_any_time_but_its_methods_may_not() -> None:
    class Source:
        def __init__(self, args: Namespace) -> None:
            until = time.perf_counter() + 3 * LIMIT_S
            while time.perf_counter() < until:
                pass

        def get_samples(self, num_samples: int) -> list[Any]:
            while True:
                pass

        def add_samples(self, samples: list[Any]) -> None: ...
        def save(self, rollout_id: int) -> None: ...
        def load(self, rollout_id: int | None = None) -> None: ...

    hooks = hooks_of("data_source", Source)
    assert hooks.data_source is not None
    with Watchdog(hooks, [], on_stuck=print):
        source = hooks.data_source(ARGS)
        with pytest.raises(HookError, match="took longer than"):
            hooks.data_source.enter(source.get_samples, 4)


def test_what_cannot_be_interrupted_ends_the_run(
    loop: tuple[asyncio.AbstractEventLoop, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.hooks.watchdog.GRACE_S", 0.3)
    stop = threading.Event()

    async def in_c(args: Namespace, sample: Sample) -> float:
        stop.wait(30)  # in C
        return 1.0

    watched = Watched(in_c, loop)
    with watched.dog():
        (call,) = watched(4)
        until = time.perf_counter() + 10
        while not watched.stuck and time.perf_counter() < until:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(HookError):
            call.result(10)
    card = watched.stuck[0]
    assert f"test_hooks_watchdog.py:{line_of('# in C')}\n" in card
    assert "stuck     it cannot be interrupted" in card and "sample    4" in card


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_blocking_the_loop_is_told_once_per_place(
    loop: tuple[asyncio.AbstractEventLoop, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("miles.hooks.watchdog.WARN_AFTER_S", 0.2)
    monkeypatch.setattr("miles.hooks.watchdog.TICK_S", 0.02)

    async def blocks(args: Namespace, sample: Sample) -> float:
        time.sleep(0.6)  # blocks
        return 1.0

    async def waits(args: Namespace, sample: Sample) -> float:
        await asyncio.sleep(0.6)
        return 1.0

    with caplog.at_level(logging.WARNING, logger="miles.hooks"):
        for reward in (blocks, waits):
            watched = Watched(reward, loop, timeout_s=60)
            with watched.dog():
                assert [call.result(10) for call in watched(0, 1)] == [1.0, 1.0]
    (told,) = [m for m in caplog.messages if "has blocked the event loop" in m]
    assert told.startswith("custom-rm ") and f"test_hooks_watchdog.py:{line_of('# blocks')} has blocked" in told
    assert "nothing else is generated or scored meanwhile" in told and "write `def`" in told


async def waits_long(args: Namespace, sample: Sample) -> float:
    await asyncio.sleep(0.9)  # awaits long
    return 1.0


def sleeps_long(args: Namespace, sample: Sample) -> float:
    time.sleep(0.9)  # sleeps long
    return 1.0


@pytest.mark.parametrize(
    ("reward", "line"), [(waits_long, "# awaits long"), (sleeps_long, "# sleeps long")], ids=["async", "thread"]
)
def test_a_call_that_does_not_return_is_told_once_per_place(
    reward: Any,
    line: str,
    loop: tuple[asyncio.AbstractEventLoop, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = patient_for(0.3, monkeypatch, caplog)
    watched = Watched(reward, loop, timeout_s=1800)
    with watched.dog():
        assert [call.result(10) for call in watched(0, 1)] == [1.0, 1.0]
    (text,) = told()
    assert text.startswith("custom-rm ") and f"test_hooks_watchdog.py:{line_of(line)} has not returned for" in text
    assert text.endswith(f"{line} (--hook-timeout-s ends it after 1800 s)")


def test_an_inline_call_that_does_not_return_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(args: Namespace, samples: list[Sample]) -> bool:
        time.sleep(0.9)  # inline
        return True

    told = patient_for(0.3, monkeypatch, caplog)
    hooks = hooks_of("dynamic_sampling_filter", slow, timeout_s=1800)
    assert hooks.dynamic_sampling_filter is not None
    with Watchdog(hooks, [], on_stuck=print):
        hooks.dynamic_sampling_filter(ARGS, [Sample(index=0)])
    (text,) = told()
    assert f"test_hooks_watchdog.py:{line_of('# inline')} has not returned for" in text


def test_waiting_for_the_run_itself_is_not_told(
    loop: tuple[asyncio.AbstractEventLoop, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A generate function waits for the engine as long as the engine takes."""
    told = patient_for(0.2, monkeypatch, caplog)

    async def reward(args: Namespace, sample: Sample) -> float:
        with contextlib.suppress(Exception):
            await post("http://127.0.0.1:9", {}, max_retries=2)  # nobody answers there, and it tries again
        return 1.0

    watched = Watched(reward, loop, timeout_s=1800)
    with watched.dog():
        assert [call.result(20) for call in watched(0)] == [1.0]
    assert told() == []


def patient_for(
    seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """Makes the watchdog less patient; returns what reads the warnings about calls that have not returned."""
    monkeypatch.setattr("miles.hooks.watchdog.PATIENCE_S", seconds)
    monkeypatch.setattr("miles.hooks.watchdog.LOOK_AT_WAITING_S", 0.1)
    monkeypatch.setattr("miles.hooks.watchdog.TICK_S", 0.05)
    caplog.set_level(logging.WARNING, logger="miles.hooks")
    return lambda: [m for m in caplog.messages if "has not returned" in m]


def test_the_watchdog_is_quiet_and_cheap(
    loop: tuple[asyncio.AbstractEventLoop, int], caplog: pytest.LogCaptureFixture
) -> None:
    async def reward(args: Namespace, sample: Sample) -> float:
        return 1.0

    watched = Watched(reward, loop, timeout_s=1800)
    before = time.process_time()
    with watched.dog():
        time.sleep(1.0)
        assert [call.result(10) for call in watched(0, 1)] == [1.0, 1.0]
    assert time.process_time() - before < 0.1
    assert not watched.stuck and not caplog.messages
    assert not [t for t in threading.enumerate() if t.name == "miles-watchdog"]


DUMP = """Timeout (0:30:30)!
Thread 0x00007f711e7836c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/app/miles/hooks/watchdog.py", line 165 in _watch

Thread 0x00007f711ef846c0 (most recent call first):
  File "/usr/lib/python3.11/re/__init__.py", line 166 in match
  File "/home/me/rewards.py", line 9 in parse
  File "/home/me/rewards.py", line 31 in grade
  File "/app/miles/hooks/call.py", line 255 in _checked

Thread 0x00007f71208a0b80 (most recent call first):
  File "/home/me/train.py", line 16 in <module>
"""


def test_a_frozen_process_names_the_users_line() -> None:
    told = message(DUMP, 1830.0, ["/usr/lib/python3.11", "/app/miles"])
    first = told.strip().splitlines()[0]
    assert first.endswith("kept the Python interpreter for 1830 s, far more than --hook-timeout-s, at "
                          "/home/me/rewards.py:9 (in parse)")  # fmt: skip
    assert "/app/miles" not in told
    assert message(DUMP, 1830.0, ["/usr", "/app", "/home"]).endswith(DUMP), "without a line of the user's, all of them"
