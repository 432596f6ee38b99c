"""--dynamic-sampling-filter-path: once per finished group, in order of completion; dropped groups are replaced."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks_helpers import bound, group
from hooks_stage import PER_PROMPT, Stage

from miles.errors import HookError, UsageError
from miles.hooks import function_registry
from miles.rollout.loop_thread import get_async_loop
from miles.types import DynamicFilterOutput, Sample

MakeStage = Callable[..., Stage]
ARGS = Namespace(reward_key=None)
DROP = "rollout/dynamic_filter/drop_"


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, group)` by position, inline in the event loop, when the group is scored, in order of completion."""
    seen: list[Any] = []

    def keep(*given: Any, **kwargs: Any) -> DynamicFilterOutput:
        args, members = given
        assert kwargs == {} and all(s.reward is not None for s in members) and isinstance(members, list)
        seen.append((args, [s.index for s in members], threading.current_thread()))
        return DynamicFilterOutput(keep=True)

    s = stage(dynamic_sampling_filter=keep)
    s.engine.delay_s = {0: 0.05}
    report = s.rollout()
    assert [indices for _, indices, _ in seen] == [[2, 3], [0, 1]], "the first prompt took longer"
    assert all(args is s.args and thread is get_async_loop().thread for args, _, thread in seen)
    assert report.shards[0].sample_indices == [0, 1, 2, 3], "trained in order of their index"


def test_a_dropped_group_is_replaced_and_counted_by_its_reason(stage: MakeStage) -> None:
    everything: list[Any] = []

    def filtered(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
        first = samples[0].group_index == 0
        return DynamicFilterOutput(keep=not first, reason="too_easy" if first else None)

    s = stage(
        dynamic_sampling_filter=filtered,
        rollout_all_samples_process=lambda args, groups: everything.extend(g[0].group_index for g in groups),
    )
    assert set(s.rollout().shards[0].group_index or ()) == {1, 2}
    assert s.metrics()[DROP + "too_easy"] == 1 and everything[:2] == [0, 1], "all samples hold the dropped group, too"
    assert len(s.manager.data_source.buffer) == 0, "a dropped group does not come back"


def test_it_is_not_called_in_evaluation(stage: MakeStage, tmp_path: Path) -> None:
    def never(args: Namespace, samples: list[Sample]) -> bool:
        raise AssertionError("called")

    assert stage(*Stage.evaluating(tmp_path), dynamic_sampling_filter=never).evaluate() is not None


@pytest.mark.parametrize(
    ("value", "keep", "reason"),
    [
        (DynamicFilterOutput(True, "kept"), True, "kept"),
        (DynamicFilterOutput(False, "small"), False, "small"),
        (True, True, None),
        (False, False, None),
        (1, True, None),
        (0.0, False, None),
        (np.bool_(True), True, None),
        (torch.tensor(False), False, None),
        (torch.tensor(0.5), True, None),
        (None, False, "returned_none"),
    ],
    ids=str,
)
def test_what_a_value_means(value: Any, keep: bool, reason: str | None) -> None:
    with function_registry.temporary("test:it", lambda args, samples: value):
        hook = bound_to("test:it")
    assert hook(ARGS, group()) == DynamicFilterOutput(keep, reason)


def bound_to(path: str) -> Any:
    from miles.hooks import bind

    return bind(Namespace(dynamic_sampling_filter_path=path)).dynamic_sampling_filter


@pytest.mark.parametrize("value", [[], [1], (False, "same reward"), {"keep": False}, "drop", torch.zeros(2)], ids=str)
def test_a_value_whose_truth_is_not_meant(value: Any, stage: MakeStage) -> None:
    """`(False, "reason")` is true: it would keep what it wants to drop."""
    with pytest.raises(HookError, match="expected a DynamicFilterOutput or a bool") as caught:
        stage(dynamic_sampling_filter=lambda args, samples: value).rollout()
    assert caught.value.failure.kind == "type"


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(float("nan")), np.float32("nan")], ids=str)
def test_nan_keeps_nothing(value: Any, stage: MakeStage) -> None:
    with pytest.raises(HookError) as caught:
        stage(dynamic_sampling_filter=lambda args, samples: value).rollout()
    assert caught.value.failure.kind == "nan"


def test_one_that_fails_may_cost_its_group_only(stage: MakeStage) -> None:
    calls: list[int] = []

    def fails_once(args: Namespace, samples: list[Sample]) -> bool:
        calls.append(len(samples))
        if len(calls) == 1:
            raise ZeroDivisionError("std of one")
        return True

    with pytest.raises(HookError, match="std of one"):
        stage(dynamic_sampling_filter=fails_once).rollout()
    calls.clear()
    s = stage("--hook-policy", "dynamic-sampling-filter=drop", dynamic_sampling_filter=fails_once)
    assert s.rollout().samples == 2 * PER_PROMPT and s.metrics()[DROP + "filter_failed"] == 1


def test_an_async_filter_is_refused() -> None:
    with pytest.raises(UsageError, match=r"called synchronously(.|\n)*write `def`"):
        bound("dynamic_sampling_filter", "groups:async_filter")
