"""--rollout-all-samples-process-path: once per rollout, every group that finished, kept or not."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError
from miles.rollout.loop_thread import get_async_loop
from miles.types import DynamicFilterOutput, Sample

MakeStage = Callable[..., Stage]


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, all_groups, get_samples)` by position, sorted by index, inline in the event loop."""
    seen: list[Any] = []

    def process(*given: Any, **kwargs: Any) -> str:
        seen.append((given, kwargs, threading.current_thread()))
        return "ignored"

    s = stage(
        "--over-sampling-batch-size", 3,
        dynamic_sampling_filter=lambda args, members: DynamicFilterOutput(members[0].group_index != 1),
        rollout_all_samples_process=process,
    )  # fmt: skip
    s.engine.delay_s = {0: 0.03}
    s.rollout()
    (((args, groups, get_samples), kwargs, thread),) = seen
    assert args is s.args and kwargs == {} and thread is get_async_loop().thread
    assert [g[0].group_index for g in groups] == [0, 1, 2], "kept, dropped and surplus"
    assert get_samples.__self__ is s.manager.data_source and len(get_samples(1)) == 1
    assert s.hooks.rollout_all_samples_process.form == "get-samples"


def test_the_guides_two_arguments(stage: MakeStage) -> None:
    seen: list[Any] = []

    def process(args: Namespace, samples: list[list[Sample]]) -> None:
        seen.append((args, [len(g) for g in samples]))

    s = stage(rollout_all_samples_process=process)
    s.rollout()
    assert seen == [(s.args, [2, 2])] and s.hooks.rollout_all_samples_process.form == "groups"


def test_it_does_not_see_a_failed_score(stage: MakeStage) -> None:
    seen: list[Any] = []

    async def fails_on_two(args: Namespace, sample: Sample) -> float:
        return 1 / (sample.index != 2)

    def process(args: Namespace, samples: list[list[Sample]]) -> None:
        seen.extend([[s.index for s in g] for g in samples])

    s = stage(
        "--hook-policy", "custom-rm=drop", "--n-samples-per-prompt", 4, custom_rm=fails_on_two,
        rollout_all_samples_process=process,
    )  # fmt: skip
    s.rollout()
    assert seen[0] == [0, 1, 3]


def test_a_side_effect_that_fails_may_be_skipped(stage: MakeStage) -> None:
    def fails(args: Namespace, groups: Any) -> None:
        raise OSError("disk full")

    with pytest.raises(HookError, match="disk full"):
        stage(rollout_all_samples_process=fails).rollout()
    s = stage("--hook-policy", "rollout-all-samples-process=drop", rollout_all_samples_process=fails)
    assert s.rollout().samples == SAMPLES and s.hooks.rollout_all_samples_process.stats.failures == 1
