"""What the door into plug-in code costs: microseconds per call, beside the bare function.

    python benchmarks/hooks_door.py

The goal is below 10 microseconds for a synchronous plug-in. Prints one line per kind of call; the best of ROUNDS.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from miles.hooks import bind, function_registry
from miles.types import Sample

CALLS = 5_000
# The default of --hook-timeout-s.
TIMEOUT_S = 1800.0
ROUNDS = 9


def log(rollout_id: int, args: Namespace, data: Any, extra: Any) -> bool:
    return False


def keep(args: Namespace, samples: list[Sample]) -> bool:
    return True


async def reward(args: Namespace, sample: Sample) -> float:
    return 1.0


def reward_in_thread(args: Namespace, sample: Sample) -> float:
    return 1.0


def best_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append(time.perf_counter() - begin)
    return min(rounds) / CALLS * 1e6


async def best_async_us(call: Callable[[], Awaitable[Any]]) -> float:
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            await call()
        rounds.append(time.perf_counter() - begin)
    return min(rounds) / CALLS * 1e6


def main() -> None:
    args, sample = Namespace(reward_key=None), Sample()
    named = {"b:log": log, "b:keep": keep, "b:reward": reward, "b:thread": reward_in_thread}
    with ExitStack() as stack:
        for name, fn in named.items():
            stack.enter_context(function_registry.temporary(name, fn))
        hooks = bind(
            Namespace(
                custom_eval_rollout_log_function_path="b:log",
                dynamic_sampling_filter_path="b:keep",
                custom_rm_path="b:reward",
            ),
            timeout_s=TIMEOUT_S,
        )
        thread_hook = hooks.bind_path("custom_rm", "b:thread")
    log_hook, filter_hook, reward_hook = (
        hooks.custom_eval_rollout_log_function,
        hooks.dynamic_sampling_filter,
        hooks.custom_rm,
    )
    assert log_hook is not None and filter_hook is not None and reward_hook is not None
    group = [sample] * 8
    rows = [
        ("log function", best_us(lambda: log_hook(0, args, None, None)), best_us(lambda: log(0, args, None, None))),
        ("dynamic filter", best_us(lambda: filter_hook(args, group)), best_us(lambda: keep(args, group))),
        (
            "async reward",
            asyncio.run(best_async_us(lambda: reward_hook.call_async(args, sample))),
            asyncio.run(best_async_us(lambda: reward(args, sample))),
        ),
        (
            "reward in a thread",
            asyncio.run(best_async_us(lambda: thread_hook.call_async(args, sample))),
            best_us(lambda: reward_in_thread(args, sample)),
        ),
    ]
    for name, through, bare in rows:
        print(f"{name:<20} {through:7.2f} us through the door, {bare:5.2f} us bare, {through - bare:7.2f} us added")


if __name__ == "__main__":
    main()
