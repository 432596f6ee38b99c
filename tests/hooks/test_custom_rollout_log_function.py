"""--custom-rollout-log-function-path: once per rollout, before conversion; true skips the default logging."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hooks_helpers import answered
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError
from miles.types import RolloutFnTrainOutput

MakeStage = Callable[..., Stage]

# One of the names that the default logging uses.
DEFAULT = "perf/rollout_time"


def test_the_published_call(stage: MakeStage) -> None:
    """`(rollout_id, args, samples, rollout_extra_metrics, rollout_time)` by position, before rewards are processed."""
    seen: list[Any] = []

    def log(*given: Any, **kwargs: Any) -> bool:
        seen.append((given, kwargs, threading.current_thread()))
        return True

    def rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> RolloutFnTrainOutput:
        groups = [[answered(2 * g + i, reward=float(i)) for i in range(2)] for g in range(2)]
        return RolloutFnTrainOutput(samples=groups, metrics={"agent/turns": 3})

    s = stage(rollout_function=rollout, custom_rollout_log_function=log)
    s.rollout(5)
    (((rollout_id, args, samples, extra, seconds), kwargs, thread),) = seen
    assert rollout_id == 5 and args is s.args and [m.index for m in samples] == [0, 1, 2, 3]
    assert extra == {"agent/turns": 3} and isinstance(seconds, float) and 0 <= seconds < 60
    assert kwargs == {} and thread is threading.current_thread()
    assert DEFAULT not in s.metrics(), "true: nothing is logged in its place"


@pytest.mark.parametrize(("value", "logs"), [(True, False), (1, False), ("yes", False), (None, True), (False, True)])
def test_truth_decides_about_the_default_logging(value: Any, logs: bool, stage: MakeStage) -> None:
    s = stage(custom_rollout_log_function=lambda rollout_id, args, samples, extra, seconds: value)
    s.rollout()
    assert (DEFAULT in s.metrics()) == logs


def test_without_metrics_of_the_rollout_it_gets_none(stage: MakeStage) -> None:
    seen: list[Any] = []
    s = stage(
        rollout_function=lambda args, rollout_id, source, evaluation: [[answered(i, reward=0.0) for i in range(4)]],
        custom_rollout_log_function=lambda rollout_id, args, samples, extra, seconds: seen.append(extra),
    )
    s.rollout()
    assert seen == [None]


def test_its_list_of_samples_is_its_own(stage: MakeStage) -> None:
    """Sorting or clearing what is logged changes nothing that is trained."""

    def log(rollout_id: int, args: Any, samples: list[Any], extra: Any, seconds: float) -> None:
        samples.reverse()
        samples.pop()

    assert stage(custom_rollout_log_function=log).rollout().shards[0].sample_indices == [0, 1, 2, 3]


def test_it_is_called_for_replayed_rollouts(stage: MakeStage, tmp_path: Path) -> None:
    template, seen = str(tmp_path / "saved_{rollout_id}.pt"), []
    stage("--save-debug-rollout-data", template).rollout()
    s = stage("--load-debug-rollout-data", template, custom_rollout_log_function=lambda *given: seen.append(given[0]))
    s.rollout()
    assert seen == [0] and DEFAULT not in s.metrics()


def test_one_that_fails_may_be_replaced_by_the_default(stage: MakeStage) -> None:
    def fails(rollout_id: int, args: Any, samples: Any, extra: Any, seconds: float) -> bool:
        raise ValueError("the logger is gone")

    with pytest.raises(HookError, match="the logger is gone"):
        stage(custom_rollout_log_function=fails).rollout()
    s = stage("--hook-policy", "custom-rollout-log-function=drop", custom_rollout_log_function=fails)
    assert s.rollout().samples == SAMPLES and DEFAULT in s.metrics()
