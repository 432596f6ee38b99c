"""The handles of a run's parts: one call after the other, errors to whoever waits, no thread that outlives the run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from miles.run.roles import EngineThread, RoleThread, RolloutRole, TrainRole


@pytest.fixture
def thread() -> Iterator[RoleThread]:
    role = RoleThread("test-role")
    yield role
    role.close()


def test_calls_run_in_order_in_one_thread_of_that_name(thread: RoleThread) -> None:
    seen: list[tuple[int, str]] = []

    def call(i: int, *, pause_s: float) -> int:
        time.sleep(pause_s)
        seen.append((i, threading.current_thread().name))
        return i * i

    async def go() -> list[int]:
        # The first takes longest: an order by completion would be another one.
        return await asyncio.gather(*(thread.call(call, i, pause_s=0.03 * (3 - i)) for i in range(4)))

    assert asyncio.run(go()) == [0, 1, 4, 9]
    assert seen == [(i, "test-role") for i in range(4)]


def test_errors_reach_the_caller_and_the_thread_goes_on(thread: RoleThread) -> None:
    def fail() -> None:
        raise KeyError("mine")

    async def go() -> str:
        with pytest.raises(KeyError, match="mine"):
            await thread.call(fail)
        return await thread.call(str, 7)

    assert asyncio.run(go()) == "7"


def test_a_caller_that_gives_up(thread: RoleThread) -> None:
    """The call in progress goes on to its end; one that had not begun is left out."""
    begun, may_end, ran = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        may_end.wait(10)
        ran.append("slow")

    async def go() -> None:
        first = asyncio.create_task(thread.call(slow))
        second = asyncio.create_task(thread.call(ran.append, "second"))
        await asyncio.to_thread(begun.wait, 10)
        first.cancel()
        second.cancel()
        assert all(
            isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(first, second, return_exceptions=True)
        )
        may_end.set()
        await thread.call(ran.append, "third")

    asyncio.run(go())
    assert ran == ["slow", "third"]


def test_closing_does_not_wait(thread: RoleThread) -> None:
    may_end = threading.Event()

    async def go() -> None:
        call = asyncio.create_task(thread.call(may_end.wait, 10))
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        thread.close()
        assert time.perf_counter() - begin < 1
        assert not call.done()
        may_end.set()
        assert await call is True

    asyncio.run(go())
    worker = next((t for t in threading.enumerate() if t.name == "test-role"), None)
    assert worker is None or worker.daemon


class FakeEngine:
    """`submit` as the embedded engine has it: in its own thread, one command after the other."""

    def __init__(self) -> None:
        self.commands = RoleThread("engine")
        self.loop_thread = threading.current_thread()

    def submit(self, command: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self.commands._calls.put((done, command))
        return done


def test_training_runs_in_the_engine_s_thread() -> None:
    engine, names = FakeEngine(), []

    class Actor:
        def train_shards(self, rollout_id: int, shards: list[str], global_batch_size: int) -> tuple[int, str, int]:
            names.append(threading.current_thread().name)
            return rollout_id, shards[1], global_batch_size

        def update_weights(self) -> int:
            names.append(threading.current_thread().name)
            return 3

    role = TrainRole(Actor(), EngineThread(engine))  # type: ignore[arg-type]
    report = SimpleNamespace(shards=["for rank 0", "for rank 1"], global_batch_size=8)

    async def go() -> tuple[Any, int]:
        return await role.train(5, report), await role.update_weights()  # type: ignore[arg-type]

    assert asyncio.run(go()) == ((5, "for rank 1", 8), 3)
    assert names == ["engine", "engine"]
    role.close()
    engine.commands.close()


def test_rollout_role_hands_over_to_its_manager() -> None:
    calls: list[tuple[Any, ...]] = []

    class Manager:
        def __getattr__(self, name: str) -> Any:
            return lambda *given: calls.append((name, *given, threading.current_thread().name))

    role = RolloutRole(Manager())  # type: ignore[arg-type]

    async def go() -> None:
        await role.load(-1)
        await role.evaluate(0)
        await role.generate(0)
        await role.save(0)

    asyncio.run(go())
    role.close()
    assert calls == [
        ("load", -1, "rollout"), ("eval", 0, "rollout"), ("generate", 0, "rollout"), ("save", 0, "rollout"),
    ]  # fmt: skip
