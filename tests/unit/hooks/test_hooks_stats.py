"""Counts and durations of plug-in calls, and what the error budget makes of them."""

from __future__ import annotations

import asyncio
import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest

from miles.errors import ErrorBudgetExceeded, HookError
from miles.hooks import Hooks, bind, function_registry
from miles.hooks.guard import HOPELESS_CALLS, MIN_FAILURES
from miles.hooks.stats import Counts
from miles.types import Failure, Sample

ARGS = Namespace(reward_key=None)


def hooks_of(point: str, target: Callable[..., Any], **settings: Any) -> Hooks:
    with function_registry.temporary("test:it", target):
        return bind(Namespace(**{f"{point}_path": "test:it"}), **settings)


@pytest.mark.parametrize("seconds", [1e-7, 3e-5, 0.02, 1.0, 900.0])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_percentiles_are_good_to_5_percent(seconds: float, share: float) -> None:
    numbers = [seconds * random.Random(i).lognormvariate(0, 1) for i in range(2000)]
    counts = Counts()
    for number in numbers:
        counts.add(number)
    exact = sorted(numbers)[round(share * len(numbers)) - 1]
    assert counts.percentile(share) == pytest.approx(exact, rel=0.05)
    assert len(counts.buckets) < 120 and counts.max_s == max(numbers)


def test_counts_without_calls_and_of_no_time() -> None:
    counts = Counts()
    assert counts.percentile(0.5) == 0.0
    counts.add(0.0)
    assert counts.percentile(0.95) == 0.0 and counts.calls == 1


def test_two_counts_together() -> None:
    one, other = Counts(), Counts()
    one.add(0.5, calls=3)
    other.add(2.0)
    other.failures = 1
    one.merge(other)
    assert (one.calls, one.failures, one.total_s, one.max_s) == (4, 1, 2.5, 2.0)
    assert one.percentile(0.5) == pytest.approx(0.5, rel=0.05) and one.percentile(1.0) == pytest.approx(2, rel=0.05)


def test_metrics_of_a_rollout_and_of_the_run() -> None:
    hooks = hooks_of("custom_rollout_log_function", lambda rollout_id, args, samples, extra, seconds: True)
    hook = hooks.custom_rollout_log_function
    assert hook is not None and hooks.stats() == {} and hooks.rollout_stats() == {}
    for calls in (3, 2):
        hooks.begin_rollout()
        for _ in range(calls):
            hook(0, ARGS, [], None, 0.1)
    prefix = "hooks/custom_rollout_log_function/"
    names = {prefix + name for name in ("calls", "failures", "p50_s", "p95_s", "max_s", "total_s")}
    assert set(hooks.stats()) == set(hooks.rollout_stats()) == names
    assert hooks.rollout_stats()[prefix + "calls"] == 2 and hooks.stats()[prefix + "calls"] == 5
    stats = hooks.stats()
    seconds = [stats[prefix + name] for name in ("p50_s", "p95_s", "max_s", "total_s")]
    assert seconds[0] > 0 and seconds == sorted(seconds)


# ---- retries and the budget ------------------------------------------------------------------------------------------


class AlwaysRaises:
    def __init__(self) -> None:
        self.attempts = 0

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        self.attempts += 1
        raise ValueError("never")


def test_a_reward_that_always_raises_is_not_retried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles.hooks.call.RETRY_DELAY_S", 0.0)
    reward = AlwaysRaises()
    hook = hooks_of("custom_rm", reward, policies={"custom-rm": "retry:3"}).custom_rm
    assert hook is not None
    with pytest.raises(HookError, match="ValueError: never"):
        asyncio.run(hook.call_async(ARGS, Sample()))
    assert reward.attempts == 4 and (hook.stats.calls, hook.stats.failures) == (1, 1)


@pytest.mark.parametrize(
    ("policy", "budget", "limit", "says"),
    [
        ("drop", 0.05, MIN_FAILURES, "5 of 5 calls of --custom-rm-path have failed in this rollout, more than"),
        ("retry:1,mask", 0.5, MIN_FAILURES, "5 of 5 calls of --custom-rm-path have failed in this rollout, more than"),
        ("drop", 1.0, HOPELESS_CALLS, "64 of 64 calls of --custom-rm-path .* and not one has succeeded"),
    ],
)
def test_a_reward_that_always_raises_ends_the_run(
    policy: str, budget: float, limit: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any policy and any budget."""
    monkeypatch.setattr("miles.hooks.call.RETRY_DELAY_S", 0.0)
    hook = hooks_of("custom_rm", AlwaysRaises(), policies={"custom-rm": policy}, error_budget=budget).custom_rm
    assert hook is not None
    for _ in range(limit - 1):
        assert isinstance(asyncio.run(hook.call_async(ARGS, Sample())), Failure)
    with pytest.raises(ErrorBudgetExceeded, match=says):
        asyncio.run(hook.call_async(ARGS, Sample()))


@pytest.mark.parametrize(("policy", "dropped"), [("drop", True), ("mask", False)])
def test_a_failure_says_what_becomes_of_its_sample(policy: str, dropped: bool) -> None:
    hook = hooks_of("custom_rm", AlwaysRaises(), policies={"custom-rm": policy}).custom_rm
    assert hook is not None
    assert asyncio.run(hook.call_async(ARGS, Sample())).dropped is dropped
