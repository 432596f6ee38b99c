"""Graders of untrusted text: limited in time, replaced when they hang or die, gone with their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.rollout.rm_hub import pool as pool_module
from miles.rollout.rm_hub.pool import GraderError, GraderPool

ROOT = Path(__file__).resolve().parents[3]

SAME = [["x+1", "1+x"]]
# A tower of powers that the guards do not see, in pure integers: nothing but ending the process stops it.
ENDLESS = [["x+1", "(((((((((9^9)^9)^9)^9)^9)^9)^9)^9)^9)^9x"]]


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    made = GraderPool(max_workers=2, limit_s=1.0)
    asyncio.run(made.grade("sympy", SAME))  # the import of sympy is not what the tests measure
    yield made
    made.close()
    assert made.pids == []


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_verdicts(pool: GraderPool) -> None:
    async def verdicts() -> list[object]:
        return await asyncio.gather(
            pool.grade("sympy", SAME), pool.grade("sympy", [["x", "y"]]), pool.grade("sympy", SAME + [["2", "3"]])
        )

    assert asyncio.run(verdicts()) == [True, False, False]
    assert 1 <= len(pool.pids) <= 2


def test_an_endless_grade_is_an_error_and_its_process_is_replaced(pool: GraderPool) -> None:
    async def both() -> tuple[BaseException | object, object]:
        endless = asyncio.ensure_future(pool.grade("sympy", ENDLESS))
        await asyncio.sleep(0.2)
        begin = time.perf_counter()
        beside = await pool.grade("sympy", SAME)  # the other worker goes on
        assert time.perf_counter() - begin < 0.9
        return (await asyncio.gather(endless, return_exceptions=True))[0], beside

    asyncio.run(pool.grade("sympy", SAME))
    before = set(pool.pids)
    error, beside = asyncio.run(both())
    assert isinstance(error, GraderError) and beside is True
    assert str(error) == "the sympy grader gave no verdict within 1 s; its process was killed"
    (ended,) = before - set(pool.pids) or {0}
    assert ended == 0 or gone(ended)
    assert asyncio.run(pool.grade("sympy", SAME)) is True


def test_a_worker_that_was_killed_is_replaced_without_a_failed_score(pool: GraderPool) -> None:
    asyncio.run(pool.grade("sympy", SAME))
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert asyncio.run(pool.grade("sympy", SAME)) is True


def test_a_worker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no libpython here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    made = GraderPool(max_workers=1)
    with pytest.raises(GraderError, match=r"ended twice in a row, lastly with status 1: .*no libpython here"):
        asyncio.run(made.grade("sympy", SAME))
    assert made.pids == []


def test_a_grader_that_raises_is_told_and_its_worker_stays(pool: GraderPool) -> None:
    asyncio.run(pool.grade("sympy", SAME))
    before = pool.pids
    with pytest.raises(GraderError, match=r"TypeError: .*all_equal_under_sympy"):
        asyncio.run(pool.grade("sympy"))
    assert pool.pids == before


def test_the_event_loop_goes_on_while_grades_run(pool: GraderPool) -> None:
    async def ticks_beside_grades() -> int:
        ticks, grades = 0, asyncio.gather(*(pool.grade("sympy", [["(x+y)^9", "(y+x)^9"]]) for _ in range(40)))
        while not grades.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert all(await grades)
        return ticks

    assert asyncio.run(ticks_beside_grades()) > 10


def test_a_caller_that_gives_up_leaves_the_pool_whole(pool: GraderPool) -> None:
    async def give_up() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.grade("sympy", ENDLESS), 0.05)
        assert await asyncio.gather(*(pool.grade("sympy", SAME) for _ in range(8))) == [True] * 8

    asyncio.run(give_up())
    assert len(pool.pids) <= 2


def test_a_long_answer_passes_both_ways(pool: GraderPool) -> None:
    big = "z" * 3_000_000
    assert asyncio.run(pool.grade("sympy", [[big, "1"]])) is False
    assert asyncio.run(pool.grade("sympy", [["\ud800\n\0", "1"]])) is False


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*"0123456789xy+-*/^()!.,=[] ", "sqrt(", "pi", "e", "\\"]), max_size=20).map("".join))
def test_any_expression_has_a_verdict_or_an_error(pool: GraderPool, expression: str) -> None:
    try:
        assert asyncio.run(pool.grade("sympy", [[expression, "x"]])) in (True, False)
    except GraderError as error:
        assert "no verdict within 1 s" in str(error) or "MemoryError" in str(error)


PARENT = """
import asyncio, sys, time
from miles.rollout.rm_hub.pool import GraderPool
pool = GraderPool(max_workers=2, limit_s={limit_s})
async def main():
    await asyncio.gather(*(pool.grade("sympy", [["x+1", "1+x"]]) for _ in range(2)))
    busy = asyncio.ensure_future(pool.grade("sympy", {endless}))
    await asyncio.sleep(0.3)
    print(*pool.pids, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_workers_end_with_a_parent_that_was_killed() -> None:
    code = PARENT.format(limit_s=1.0, endless=ENDLESS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    idle_and_busy = [gone(pid) for pid in pids]
    assert idle_and_busy == [True, True]


def test_a_forked_child_has_a_pool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = pool_module.shared()
    monkeypatch.setattr(pool_module, "_pool", mine)
    pool_module._forget_after_fork()
    assert pool_module.shared() is not mine
    pool_module.shared().close()
