"""Metric values against tables made by hand, pass@k against brute force."""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.observe.metrics import (
    eval_metrics,
    mean_reward,
    multi_turn_metrics,
    pass_at_k,
    pass_rates,
    perf_metrics,
    rollout_metrics,
    timer_metrics,
    zero_std_metrics,
)
from miles.types import Failure, Sample
from miles.utils.metric_utils import (
    compression_ratio,
    compute_pass_rate,
    compute_rollout_step,
    compute_statistics,
    dict_add_prefix,
    has_repetition,
)


def scored(group: int | None, reward: Any, length: int = 4, **fields: Any) -> Sample:
    return Sample(group_index=group, reward=reward, response_length=length, status=Sample.Status.COMPLETED, **fields)


def failed(group: int | None) -> Sample:
    sample = Sample(group_index=group, response_length=4, status=Sample.Status.FAILED)
    sample.failure = Failure("--custom-rm-path", "my.grade", "nan", "NaN", "my.py:3")  # type: ignore[attr-defined]
    return sample


# ---- helpers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {}),
        ([3], {"mean": 3.0, "median": 3.0, "max": 3, "min": 3}),
        ([6, 1, 2], {"mean": 3.0, "median": 2.0, "max": 6, "min": 1}),
        ([4.0, 1.0, 2.0, 9.0], {"mean": 4.0, "median": 3.0, "max": 9.0, "min": 1.0}),
    ],
)
def test_statistics(values: list[float], expected: dict[str, float]) -> None:
    assert compute_statistics(values) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_statistics_agree_with_numpy(values: list[float]) -> None:
    got = compute_statistics(values)
    assert got["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert got["median"] == pytest.approx(np.median(values), abs=1e-6)


def test_prefix() -> None:
    assert dict_add_prefix({"a": 1, "b/c": 2}, "x/") == {"x/a": 1, "x/b/c": 2}


@pytest.mark.parametrize("algorithm", ["zlib", "gzip", "bz2", "lzma"])
def test_compression(algorithm: Any) -> None:
    ratio, saved = compression_ratio("ab" * 5000, algorithm=algorithm)
    assert ratio > 50 and saved == pytest.approx(100 * (1 - 1 / ratio))
    assert compression_ratio(b"", algorithm=algorithm) == (1.0, 0.0)


def test_compression_refuses_an_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="expected one of zlib, gzip, bz2, lzma, got 'rar'"):
        compression_ratio("x", algorithm="rar")  # type: ignore[arg-type]


def test_repetition_looks_at_the_end_of_long_texts() -> None:
    random = "".join(map(chr, np.random.default_rng(0).integers(33, 126, 20_000)))
    assert not has_repetition("ab" * 5000), "10 000 characters are not more than 10 000"
    assert has_repetition("ab" * 5001)
    assert has_repetition(random + "ab" * 5000)
    assert not has_repetition("ab" * 5000 + random)
    assert not has_repetition(random)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    subsets = list(combinations([1] * correct + [0] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.2, got 3"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("rewards", "size", "expected"),
    [
        ([1, 0, 0, 1], 1, {"pass@1": 0.5}),
        ([1, 0, 0, 0], 2, {"pass@1": 0.25, "pass@2": 0.5}),
        ([1, 0, 0, 0, 0, 0, 0, 0], 4, {"pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5}),
        ([1.0, 0.99, 0.5], 3, {"pass@1": 1 / 3, "pass@2": 2 / 3}),
        # A failed score leaves its group: one of two valid, and one group too small for pass@2.
        ([1, None, 0, 0], 2, {"pass@1": 0.5, "pass@2": 0.0}),
        ([None, None], 2, {}),
    ],
)
def test_pass_rate(rewards: list[Any], size: int, expected: dict[str, float]) -> None:
    assert compute_pass_rate(rewards, size) == pytest.approx(expected)


@pytest.mark.parametrize(("rewards", "size", "groups"), [([1, 0, 1], 2, None), ([1, 0], 2, 3)])
def test_pass_rate_asserts_whole_groups(rewards: list[int], size: int, groups: int | None) -> None:
    with pytest.raises(AssertionError, match="rewards are not"):
        compute_pass_rate(rewards, size, groups)


@pytest.mark.parametrize(("always_train_step", "expected"), [(False, 3), (True, 6)])
def test_rollout_step(always_train_step: bool, expected: int) -> None:
    args = Namespace(
        wandb_always_use_train_step=always_train_step, rollout_batch_size=16, n_samples_per_prompt=8,
        global_batch_size=64,
    )  # fmt: skip
    assert compute_rollout_step(args, 3) == expected


# ---- rewards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([scored(0, 1.0), scored(0, 1.0), scored(1, 0.0), scored(1, 1.0)], {"zero_std/count_1.0": 1}),
        ([scored(0, 0.0), scored(1, 0.0), scored(2, 0.96)], {"zero_std/count_0.0": 2, "zero_std/count_1.0": 1}),
        ([scored(0, 1), scored(0, 1)], {"zero_std/count_1": 1}),
        ([scored(0, torch.tensor(0.5)), scored(0, np.float32(0.5))], {"zero_std/count_0.5": 1}),
        ([scored(0, {"s": 1.0}), scored(0, {"s": 1.0})], {}),
        ([scored(0, 1.0), scored(0, None)], {}),
        ([scored(None, 1.0), scored(None, 1.0)], {}),
        ([scored(0, float("nan")), scored(0, float("nan"))], {}),
        # Failed scores: the rest of the group decides, unless only one is left.
        ([scored(0, 1.0), scored(0, 1.0), failed(0)], {"zero_std/count_1.0": 1}),
        ([scored(0, 1.0), failed(0)], {}),
        ([failed(0), failed(0)], {}),
    ],
)
def test_zero_std(samples: list[Sample], expected: dict[str, int]) -> None:
    assert zero_std_metrics(samples) == expected


def test_zero_std_by_reward_key() -> None:
    assert zero_std_metrics([scored(0, {"s": 1.0}), scored(0, {"s": 1.0})], "s") == {"zero_std/count_1.0": 1}


def test_mean_reward_leaves_failures_out() -> None:
    assert mean_reward([scored(0, 1.0), scored(0, 0.5), failed(0)]) == 0.75
    assert mean_reward([scored(0, {"s": 1}), scored(0, {"s": 0}), scored(0, {"other": 9})], "s") == 0.5
    assert mean_reward([failed(0), scored(0, {"s": 1})]) is None


# ---- a rollout -------------------------------------------------------------------------------------------------


def test_rollout_metrics() -> None:
    samples = [
        scored(0, {"s": 1.0, "category": "ok"}, 10),
        scored(0, {"s": 1.0, "category": "format"}, 20, loss_mask=[1] * 4 + [0] * 16),
        scored(1, {"s": 0.0, "category": "ok"}, 6, response="ab" * 6000),
        scored(1, {"s": 0.0}, 8),
        failed(2),
    ]
    samples[2].status = Sample.Status.TRUNCATED
    samples[3].status = "truncated"  # type: ignore[assignment]
    got = rollout_metrics(samples, reward_key="s", category_key="category", extra={"rollout/mine": 7})
    assert got == pytest.approx(
        {
            "rollout/response_len/mean": 32 / 5,
            "rollout/response_len/median": 6.0,
            "rollout/response_len/max": 10,
            "rollout/response_len/min": 4,
            "rollout/zero_std/count_1.0": 1,
            "rollout/zero_std/count_0.0": 1,
            "rollout/error_cat/ok": 0.5,
            "rollout/error_cat/format": 0.25,
            "rollout/error_cat/None": 0.25,
            "rollout/repetition_frac": 0.2,
            "rollout/truncated_ratio": 0.4,
            "rollout/failed_scores": 1,
            "rollout/mine": 7,
        }
    )


def test_rollout_metrics_without_groups_or_samples() -> None:
    assert "rollout/zero_std/count_1.0" not in rollout_metrics([scored(0, 1.0)], with_zero_std=False)
    assert rollout_metrics([], extra={"rollout/dynamic_filter/drop_x": 3}) == {"rollout/dynamic_filter/drop_x": 3}


def test_perf_metrics() -> None:
    samples = [scored(0, 1, 30), scored(0, 1, 10, loss_mask=[1] * 5 + [0] * 5)]
    assert perf_metrics(samples, 2.0, 4) == pytest.approx(
        {
            "perf/rollout_time": 2.0,
            "perf/tokens_per_gpu_per_sec": 40 / 2 / 4,
            "perf/effective_tokens_per_gpu_per_sec": 35 / 2 / 4,
            "perf/longest_sample_tokens_per_sec": 15.0,
            "perf/longest_effective_sample_tokens_per_sec": 15.0,
        }
    )


def test_perf_metrics_with_time_outside_the_engine() -> None:
    samples = [
        scored(0, 1, 30, non_generation_time=1.0, loss_mask=[1] * 10 + [0] * 20),
        scored(0, 1, 30, non_generation_time=0.5),
        scored(0, 1, 6, non_generation_time=3.0),
    ]
    got = perf_metrics(samples, 2.0)
    assert got["perf/non_generation_time/mean"] == 1.5
    assert got["perf/non_generation_time/median"] == 1.0
    assert got["perf/longest_sample_non_generation_time"] == 0.75  # two samples of 30 tokens
    assert got["perf/longest_sample_tokens_per_sec_without_non_generation"] == pytest.approx(30 / 1.25)
    assert got["perf/longest_effective_sample_non_generation_time"] == 0.5
    assert got["perf/longest_effective_sample_tokens_per_sec_without_non_generation"] == pytest.approx(30 / 1.5)


@pytest.mark.parametrize(("samples", "seconds"), [([], 2.0), ([scored(0, 1)], 0.0)])
def test_perf_metrics_of_nothing(samples: list[Sample], seconds: float) -> None:
    assert perf_metrics(samples, seconds) == {"perf/rollout_time": seconds}


def test_a_sample_that_spent_the_whole_rollout_outside_divides_by_nothing() -> None:
    got = perf_metrics([scored(0, 1, 5, non_generation_time=2.0)], 2.0)
    assert "perf/longest_sample_tokens_per_sec_without_non_generation" not in got


def test_timer_metrics() -> None:
    assert timer_metrics({"train": 3.0, "train_wait": 1.0, "save_model": 0.5}) == {
        "perf/train_time": 3.0,
        "perf/train_wait_time": 1.0,
        "perf/save_model_time": 0.5,
        "perf/step_time": 4.0,
        "perf/wait_time_ratio": 0.25,
    }
    assert timer_metrics({"save_model": 0.5}) == {"perf/save_model_time": 0.5}


# ---- an evaluation ---------------------------------------------------------------------------------------------


def test_eval_metrics() -> None:
    samples = [scored(None, 1, 3), scored(None, 0, 5)]
    data = {
        "carry": {"rewards": [1, 0, 0, 0], "truncated": [True, False, False, False]},
        "hard": {"rewards": [1, 0], "samples": samples},
    }
    got = eval_metrics(data, group_size={"carry": 2, "hard": 1}, with_pass_rate=True, extra={"eval/mine": 1})
    assert got == pytest.approx(
        {
            "eval/carry": 0.25,
            "eval/carry-truncated_ratio": 0.25,
            "eval/carry-pass@1": 0.25,
            "eval/carry-pass@2": 0.5,
            "eval/hard": 0.5,
            "eval/hard/response_len/mean": 4.0,
            "eval/hard/response_len/median": 4.0,
            "eval/hard/response_len/max": 5,
            "eval/hard/response_len/min": 3,
            "eval/hard/repetition_frac": 0.0,
            "eval/hard/truncated_ratio": 0.0,
            "eval/hard/failed_scores": 0,
            "eval/hard-pass@1": 0.5,
            "eval/mine": 1,
        }
    )


def test_a_failed_score_is_no_zero_in_an_evaluation() -> None:
    """Even where an evaluation function put a number into its place."""
    data = {"a": {"rewards": [1.0, 0.0], "samples": [scored(None, 1.0), failed(None)]}, "b": {"rewards": [None]}}
    got = eval_metrics(data, with_pass_rate=True)
    assert got["eval/a"] == 1.0 and got["eval/a/failed_scores"] == 1 and got["eval/a-pass@1"] == 1.0
    assert "eval/b" not in got


# ---- turns and pass@k ------------------------------------------------------------------------------------------------


def test_pass_rates_of_groups_of_any_size() -> None:
    assert pass_rates([[1, 0], [0]]) == {"pass@1": 0.25, "pass@2": 1.0}
    assert pass_rates([[None, 1.0], [None, None]]) == {"pass@1": 1.0}
    assert pass_rates([]) == {}


def test_pass_rates_of_training_groups() -> None:
    samples = [Sample(group_index=g, reward=r) for g, r in [(0, 1.0), (0, 0.0), (1, 0.0), (1, 0.0), (None, 1.0)]]
    metrics = rollout_metrics(samples, with_pass_rate=True)
    assert (metrics["passrate/pass@1"], metrics["passrate/pass@2"]) == (0.25, 0.5)
    assert not any(key.startswith("passrate/") for key in rollout_metrics(samples))


def test_multi_turn_metrics() -> None:
    samples = [
        Sample(response_length=4, loss_mask=[1, 0, 0, 1], metadata={"round_number": 2}),
        Sample(response_length=10, metadata={"round_number": 5}),
        Sample(response_length=1, metadata={}),
    ]
    assert multi_turn_metrics(samples, 10) == {
        "multi_turn/raw_response_length/response_length_mean": 5.0,
        "multi_turn/raw_response_length/response_length_max": 10,
        "multi_turn/raw_response_length/response_length_min": 1,
        "multi_turn/raw_response_length/response_length_clip_ratio": pytest.approx(1 / 3),
        "multi_turn/wo_obs_response_length/response_length_mean": pytest.approx(13 / 3),
        "multi_turn/wo_obs_response_length/response_length_max": 10,
        "multi_turn/wo_obs_response_length/response_length_min": 1,
        "multi_turn/multi_turn_metric/round_number_mean": 3.5,
        "multi_turn/multi_turn_metric/round_number_max": 5,
        "multi_turn/multi_turn_metric/round_number_min": 2,
    }
    assert "multi_turn/raw_response_length/response_length_clip_ratio" not in multi_turn_metrics(samples, None)
    assert multi_turn_metrics([], 10) == {}
