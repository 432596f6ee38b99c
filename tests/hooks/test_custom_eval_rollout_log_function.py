"""--custom-eval-rollout-log-function-path: once per evaluation; true skips the default logging."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hooks_helpers import answered
from hooks_stage import Stage

from miles.errors import HookError
from miles.types import RolloutFnEvalOutput

MakeStage = Callable[..., Stage]
DATA = {"held": {"rewards": [1.0, 0.0], "truncated": [False, True], "samples": [answered(0), answered(1)]}}


def evaluate(args: Any, rollout_id: int, data_source: Any, evaluation: bool) -> RolloutFnEvalOutput:
    return RolloutFnEvalOutput(data=DATA, metrics={"mine/rate": 0.5})


def test_the_published_call(stage: MakeStage) -> None:
    """`(rollout_id, args, data, extra_metrics)` by position."""
    seen: list[Any] = []

    def log(*given: Any, **kwargs: Any) -> bool:
        seen.append((given, kwargs, threading.current_thread()))
        return True

    s = stage(eval_function=evaluate, custom_eval_rollout_log_function=log)
    s.rollout()
    assert seen == [], "not called for training"
    report = s.evaluate(done=3)
    (((rollout_id, args, data, extra), kwargs, thread),) = seen
    assert rollout_id == 2 and args is s.args and data == DATA and extra == {"mine/rate": 0.5}
    assert kwargs == {} and thread is threading.current_thread()
    assert "eval/held" not in s.metrics(), "true: nothing is logged in its place"
    assert report is not None and report.scores == {"held": 0.5}, "the run itself still knows the result"


@pytest.mark.parametrize(("value", "logs"), [(True, False), ("yes", False), (None, True), (False, True)])
def test_truth_decides_about_the_default_logging(value: Any, logs: bool, stage: MakeStage) -> None:
    s = stage(eval_function=evaluate, custom_eval_rollout_log_function=lambda rollout_id, args, data, extra: value)
    s.evaluate()
    assert ("eval/held" in s.metrics()) == logs


def test_it_sees_what_the_built_in_evaluation_made(stage: MakeStage, tmp_path: Path) -> None:
    seen: list[Any] = []
    s = stage(*Stage.evaluating(tmp_path, 3), custom_eval_rollout_log_function=lambda *given: seen.append(given))
    s.evaluate()
    ((_, _, data, extra),) = seen
    assert list(data) == ["held"] and len(data["held"]["rewards"]) == len(data["held"]["samples"]) == 3
    assert data["held"]["truncated"] == [False] * 3 and extra is None


def test_one_that_fails_may_be_replaced_by_the_default(stage: MakeStage) -> None:
    def fails(rollout_id: int, args: Any, data: Any, extra: Any) -> bool:
        raise ValueError("no such metric")

    with pytest.raises(HookError, match="no such metric"):
        stage(eval_function=evaluate, custom_eval_rollout_log_function=fails).evaluate()
    policy = ("--hook-policy", "custom-eval-rollout-log-function=drop")
    s = stage(*policy, eval_function=evaluate, custom_eval_rollout_log_function=fails)
    s.evaluate()
    assert s.metrics()["eval/held"] == 0.5
