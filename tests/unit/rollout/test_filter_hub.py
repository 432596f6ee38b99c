from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from miles.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from miles.rollout.filter_hub.base_types import DynamicFilterOutput, MetricGatherer, call_dynamic_filter
from miles.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std
from miles.types import Sample

ARGS = Namespace(reward_key=None)


@pytest.mark.parametrize(
    ("rewards", "keep", "reason"),
    [
        ([1.0, 0.0], True, None),
        ([0.0, 0.0, 0.0], False, "zero_std_0.0"),
        ([1, 1], False, "zero_std_1"),
        ([0.1, 0.1, 0.1], False, "zero_std_0.1"),
        ([1.0, 1.0 + 1e-12], False, "zero_std_1.0"),
        ([float("nan"), 1.0], False, "zero_std_nan"),
        ([1.0], True, None),
    ],
)
def test_groups_without_spread_are_dropped(rewards: list[float], keep: bool, reason: str | None) -> None:
    group = [Sample(reward=r) for r in rewards]
    assert check_reward_nonzero_std(ARGS, group) == DynamicFilterOutput(keep, reason)


def test_rewards_may_be_dicts_and_members_lists() -> None:
    args = Namespace(reward_key="acc")
    group: list[Any] = [[Sample(reward={"acc": 1.0})], [Sample(reward={"acc": 0.0}), Sample(reward={"acc": 1.0})]]
    assert check_reward_nonzero_std(args, group).keep


def test_calling_a_filter() -> None:
    verdict = DynamicFilterOutput(False, "short")
    assert call_dynamic_filter(None, ARGS, []) == DynamicFilterOutput(True)
    assert call_dynamic_filter(lambda args, group: False, ARGS, []) == DynamicFilterOutput(False)
    assert call_dynamic_filter(lambda args, group: verdict, ARGS, []) is verdict


def test_drops_are_counted_by_reason() -> None:
    gatherer = MetricGatherer()
    for reason in ["a", None, "a", "b", ""]:
        gatherer.on_dynamic_filter_drop(reason)
    assert gatherer.collect() == {"rollout/dynamic_filter/drop_a": 2, "rollout/dynamic_filter/drop_b": 1}


async def _asynchronous(args: Namespace, *, evaluation: bool) -> list[str]:
    return ["from a coroutine"]


@pytest.mark.parametrize(
    ("fn", "evaluation", "expected"),
    [
        (lambda args, evaluation: [[1]], False, RolloutFnTrainOutput(samples=[[1]])),
        (lambda args, evaluation: {"a": 1}, True, RolloutFnEvalOutput(data={"a": 1})),
        (lambda args, evaluation: RolloutFnTrainOutput([], {"m": 1}), False, RolloutFnTrainOutput([], {"m": 1})),
        (_asynchronous, False, RolloutFnTrainOutput(samples=["from a coroutine"])),
    ],
)
def test_what_a_rollout_function_returns_is_wrapped(fn: Any, evaluation: bool, expected: Any) -> None:
    assert call_rollout_fn(fn, ARGS, evaluation=evaluation) == expected
