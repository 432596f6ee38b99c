"""One limit for coroutines of several event loops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from miles.rollout.semaphore import Semaphore


def test_three_loops_share_one_limit() -> None:
    semaphore, lock = Semaphore(2), threading.Lock()
    inside, most, done = 0, 0, 0

    async def use() -> None:
        nonlocal inside, most, done
        async with semaphore:
            with lock:
                inside += 1
                most = max(most, inside)
            await asyncio.sleep(0.002)
            with lock:
                inside -= 1
                done += 1

    async def many() -> None:
        await asyncio.gather(*(use() for _ in range(10)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (done, most, inside, semaphore.locked()) == (30, 2, 0, False)


def test_a_cancelled_waiter_gives_its_place_on() -> None:
    async def scene() -> list[str]:
        semaphore, told = Semaphore(1), []

        async def use(name: str) -> None:
            async with semaphore:
                told.append(name)

        await semaphore.acquire()
        tasks = [asyncio.create_task(use(name)) for name in "abc"]
        await asyncio.sleep(0)
        tasks[0].cancel()  # while it waits
        await asyncio.sleep(0)
        semaphore.release()
        tasks[1].cancel()  # when the place is on its way to it
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not semaphore.locked()
        return told

    assert asyncio.run(asyncio.wait_for(scene(), 5)) == ["c"]


def test_a_closed_loop_does_not_keep_a_place() -> None:
    semaphore = Semaphore(1)

    async def leave() -> None:
        await semaphore.acquire()
        task = asyncio.get_running_loop().create_task(semaphore.acquire())
        await asyncio.sleep(0)
        assert semaphore.locked() and not task.done()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    semaphore.release()
    assert asyncio.run(asyncio.wait_for(semaphore.acquire(), 5))


def test_no_place_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one place"):
        Semaphore(0)
