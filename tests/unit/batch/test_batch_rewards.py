"""Reward post-processing against a loop over groups, written from the formula."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.batch import default_rewards, plugin_rewards
from miles.batch.rewards import normalize
from miles.errors import UsageError
from miles.types import Failure, Sample

FAILURE = Failure(flag="--custom-rm-path", path="m.f", kind="exception", message="boom", location="m.py:1")


def scored(reward: Any, group: int | None = 0, index: int = 24) -> Sample:
    return Sample(index=index, group_index=group, reward=reward)


def failed(group: int | None = 0) -> Sample:
    result = scored(None, group)
    result.failure = FAILURE  # type: ignore[attr-defined]
    return result


def run(samples: list[Sample], **changes: Any) -> tuple[list[Any], list[float]]:
    settings: dict[str, Any] = {
        "reward_key": None,
        "estimator": "grpo",
        "normalization": True,
        "std_normalization": True,
        "n_samples_per_prompt": 2,
    }
    raw, rewards = default_rewards(samples, **(settings | changes))
    assert rewards.dtype == np.float32
    return raw, rewards.tolist()


def reference(rewards: list[float | None], groups: list[Any], scale: bool) -> list[float]:
    members: dict[Any, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups):
        if reward is not None:
            members[group].append(reward)
    result = []
    for reward, group in zip(rewards, groups):
        others = members[group]
        if reward is None or len(others) < 2 or min(others) == max(others):
            result.append(0.0)
            continue
        centred = reward - statistics.fmean(others)
        result.append(centred / (statistics.stdev(others) + 1e-6) if scale else centred)
    return result


numbers = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.1]), st.floats(-100, 100))


@given(st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=20), st.booleans())
def test_groups_against_the_loop(entries: list[tuple[float | None, int]], scale: bool) -> None:
    """Unequal groups in any order, with failed samples, groups of one and groups that failed altogether."""
    samples = [failed(group) if reward is None else scored(reward, group) for reward, group in entries]
    _, got = run(samples, std_normalization=scale, n_samples_per_prompt=4)
    expected = reference([r for r, _ in entries], [g for _, g in entries], scale)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 11), st.floats(-1e6, 1e6))
def test_a_failed_sample_changes_nobody_else(rewards: list[float], at: int, leftover: float) -> None:
    """Whatever stands in the reward of a failed sample, the others' results are those of a batch without it."""
    at = min(at, len(rewards))
    broken = failed()
    broken.reward = leftover
    samples = [scored(r) for r in rewards]
    raw, got = run(samples[:at] + [broken] + samples[at:], n_samples_per_prompt=8)
    _, alone = run(samples, n_samples_per_prompt=8)
    assert got[:at] + got[at + 1 :] == alone
    assert got[at] == 0.0 and raw[at] is None


@pytest.mark.parametrize("scale", [False, True])
def test_normalize_ignores_the_number_of_a_failed_sample(scale: bool) -> None:
    groups, failed_rows = np.array([0, 0, 0]), np.array([False, True, False])
    results = [
        normalize(np.array([1.0, leftover, 3.0]), groups, failed_rows, scale=scale, lone_is_raw=False).tolist()
        for leftover in (0.0, 1e6)
    ]
    assert results[0] == results[1] and results[0][1] == 0.0 and results[0][0] < 0 < results[0][2]


@pytest.mark.parametrize(
    ("estimator", "changes", "expected"),
    [
        ("grpo", {}, [-math.sqrt(0.5), math.sqrt(0.5)]),
        ("gspo", {}, [-math.sqrt(0.5), math.sqrt(0.5)]),
        ("grpo", {"std_normalization": False}, [-1.0, 1.0]),
        ("reinforce_plus_plus_baseline", {}, [-1.0, 1.0]),
        ("grpo", {"normalization": False}, [0.0, 2.0]),
        ("ppo", {}, [0.0, 2.0]),
        ("reinforce_plus_plus", {}, [0.0, 2.0]),
    ],
)
def test_estimators(estimator: str, changes: dict[str, Any], expected: list[float]) -> None:
    raw, got = run([scored(0.0), scored(2.0)], estimator=estimator, **changes)
    assert raw == [0.0, 2.0]
    assert got == pytest.approx(expected, abs=1e-5)


def test_equal_rewards_give_exactly_zero() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in binary: the mean alone would leave a remainder over 1e-6."""
    assert run([scored(0.1)] * 3)[1] == [0.0] * 3


def test_one_sample_per_prompt_keeps_its_reward() -> None:
    assert run([scored(1.0, 0), scored(0.5, 1)], n_samples_per_prompt=1)[1] == [1.0, 0.5]


def test_a_group_that_shrank_to_one_gives_zero() -> None:
    assert run([scored(1.0, 0), scored(0.5, 1), scored(0.0, 1)], std_normalization=False)[1] == [0.0, 0.25, -0.25]
    assert run([scored(1.0, 0), failed(0)], n_samples_per_prompt=1)[1] == [0.0, 0.0]


def test_samples_without_a_group_go_by_position() -> None:
    samples = [scored(0.0, None), scored(9.0, 7), scored(2.0, None), scored(5.0, 7), scored(1.0, None)]
    assert run(samples, std_normalization=False)[1] == [-1.0, 2.0, 1.0, -2.0, 0.0]


def test_failed_samples_hold_their_position() -> None:
    samples = [failed(None), scored(3.0, None), scored(1.0, None), scored(2.0, None)]
    assert run(samples, std_normalization=False)[1] == [0.0, 0.0, -0.5, 0.5]


def test_reward_key() -> None:
    raw, got = run([scored({"acc": 1}), scored({"acc": 0})], reward_key="acc", normalization=False)
    assert raw == [1, 0] and got == [1.0, 0.0]


@pytest.mark.parametrize(
    ("reward", "changes", "message"),
    [
        (None, {}, "reward of sample 24 is NoneType None. Expected a finite number"),
        (float("nan"), {}, "reward of sample 24 is float nan"),
        (float("inf"), {"normalization": False}, "reward of sample 24 is float inf"),
        ("1", {}, "reward of sample 24 is str '1'"),
        ({"acc": 1}, {}, "--reward-key"),
        ({"acc": 1}, {"reward_key": "score"}, "--reward-key score: the reward of sample 24"),
        (1.0, {"reward_key": "score"}, "--reward-key score: the reward of sample 24"),
        (torch.zeros(2), {"estimator": "ppo"}, "reward of sample 24"),
    ],
)
def test_bad_rewards_are_named(reward: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run([scored(1.0, index=0), scored(reward)] if "reward_key" not in changes else [scored(reward)], **changes)


# ---- a plug-in's post-processing ---------------------------------------------------------------------------------


def test_the_plugin_sees_no_failed_sample() -> None:
    seen: list[Sample] = []

    def post_process(samples: list[Sample]) -> tuple[list[Any], list[Any]]:
        seen.extend(samples)
        return [s.reward for s in samples], [10 * s.reward for s in samples]

    samples = [scored(1.0), failed(), scored(2.0)]
    raw, rewards = plugin_rewards(samples, post_process)
    assert seen == [samples[0], samples[2]]
    assert raw == [1.0, None, 2.0]
    assert list(rewards) == [10.0, 0.0, 20.0]


def test_the_plugin_may_return_tensors() -> None:
    tensors = [torch.zeros(3), torch.ones(2)]
    raw, rewards = plugin_rewards([scored(1.0), scored(1.0)], lambda samples: (tensors, tensors))
    assert raw[1] is tensors[1] and isinstance(rewards, list) and rewards[0] is tensors[0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"expected a pair \(raw_rewards, rewards\), got NoneType"),
        ([1.0, 2.0, 3.0], "expected a pair"),
        (([1.0], [1.0, 2.0]), r"raw_rewards: expected one entry per sample \(2\), got 1"),
        (([1.0, 2.0], [1.0]), r"rewards: expected one entry per sample \(2\), got 1"),
        (([1.0, 2.0], [1.0, float("nan")]), "the reward of sample 24 is nan"),
    ],
)
def test_bad_results_of_the_plugin(result: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plugin_rewards([scored(1.0, index=1), scored(2.0)], lambda samples: result)
