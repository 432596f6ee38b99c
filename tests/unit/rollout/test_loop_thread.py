from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from miles.rollout import loop_thread
from miles.rollout.loop_thread import AsyncLoopThread, get_async_loop, run


async def where() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_run_returns_the_result_from_the_loop_s_thread() -> None:
    assert run(where()) == "miles-loop"
    assert get_async_loop() is get_async_loop()
    assert get_async_loop().thread.daemon


def test_exceptions_arrive_as_they_are() -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        run(fail())


def test_several_threads_share_the_loop() -> None:
    async def meet(barrier: list[int]) -> int:
        barrier.append(1)
        while len(barrier) < 2:
            await asyncio.sleep(0.001)
        return len(barrier)

    barrier: list[int] = []
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(run(meet(barrier)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert got == [2, 2]


def test_run_inside_the_loop_is_an_error_not_a_deadlock() -> None:
    async def outer() -> str:
        return run(where())

    with pytest.raises(RuntimeError, match=r"run\(where\) was called from the event loop .* write `await`"):
        run(outer())


def test_an_interrupt_cancels_the_coroutine_and_lets_it_clean_up() -> None:
    cleaned: list[str] = []
    started = threading.Event()

    async def long() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append("done")

    def interrupt() -> None:
        started.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(long())
    assert cleaned == ["done"]
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_the_loop_survives_what_would_end_a_program(error: BaseException) -> None:
    own = AsyncLoopThread()

    async def leave() -> None:
        raise error

    with pytest.raises(type(error)):
        own.run(leave())
    assert own.run(where()) == "miles-loop"


def test_a_fork_s_child_gets_a_loop_of_its_own() -> None:
    run(where())
    child = os.fork()
    if child == 0:
        os._exit(0 if run(where()) == "miles-loop" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop_thread.get_async_loop().alive
