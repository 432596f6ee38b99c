"""--eval-function-path: called once per evaluation, apart from training; what it returns is what is logged."""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hooks_helpers import answered, bound
from hooks_stage import Stage

from miles.errors import HookError
from miles.rollout.loop_thread import get_async_loop
from miles.types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnTrainOutput,
)

MakeStage = Callable[..., Stage]


def data(*rewards: float) -> dict[str, Any]:
    samples = [answered(i, reward=r) for i, r in enumerate(rewards)]
    return {"held": {"rewards": list(rewards), "truncated": [False] * len(rewards), "samples": samples}}


def test_the_published_call(stage: MakeStage) -> None:
    """Three arguments by position, `evaluation=True` by keyword, in the thread that asks."""
    seen: list[Any] = []

    def evaluate(*args: Any, **kwargs: Any) -> RolloutFnEvalOutput:
        seen.append((args, kwargs, threading.current_thread()))
        return RolloutFnEvalOutput(data=data(1.0, 0.0), metrics={"mine/rate": 0.5})

    s = stage(eval_function=evaluate)
    s.rollout()
    assert seen == [], "not called for training"
    report = s.evaluate(done=2)
    ((args, kwargs, thread),) = seen
    assert args[0] is s.args and args[1] == 1 and args[2] is s.manager.data_source and len(args) == 3
    assert kwargs == {"evaluation": True} and thread is threading.current_thread()
    assert report is not None and report.scores == {"held": 0.5}
    logged = s.metrics()
    assert logged["eval/held"] == 0.5 and logged["mine/rate"] == 0.5


def test_the_guides_form_is_awaited_on_the_event_loop(stage: MakeStage) -> None:
    threads: list[threading.Thread] = []

    async def evaluate(args: Namespace, rollout_id: int, *, evaluation: bool = False) -> Any:
        await asyncio.sleep(0)
        threads.append(threading.current_thread())
        return data(1.0)

    s = stage(eval_function=evaluate)
    report = s.evaluate()
    assert report is not None and report.scores == {"held": 1.0}, "a raw value counts as the data"
    assert s.hooks.eval_function.form == "no-data-source" and threads == [get_async_loop().thread]


def test_unset_it_is_the_rollout_function_with_an_object_of_its_own(stage: MakeStage) -> None:
    made: list[Any] = []

    class Rollout:
        def __init__(self, input: RolloutFnConstructorInput) -> None:
            self.inputs: list[RolloutFnInput] = []
            made.append(self)

        async def __call__(self, input: RolloutFnInput) -> Any:
            self.inputs.append(input)
            if input.evaluation:
                return RolloutFnEvalOutput(data=data(0.25))
            return RolloutFnTrainOutput(samples=[[answered(i, reward=1.0 * i) for i in range(4)]])

    s = stage(rollout_function=Rollout)
    s.rollout(0)
    s.evaluate(done=1)
    train, evaluation = made
    assert [i.evaluation for i in train.inputs] == [False]
    assert evaluation.inputs == [RolloutFnEvalInput(0)] and s.hooks.eval_function.form == "class"


def test_the_built_in_one_scores_every_prompt_with_evaluation_true(stage: MakeStage, tmp_path: Path) -> None:
    kinds: list[bool] = []

    async def generate(args: Namespace, sample: Any, sampling_params: Any, evaluation: bool = False) -> Any:
        kinds.append(evaluation)
        return answered(sample.index, reward=0.5)

    report = stage(*Stage.evaluating(tmp_path, 3), custom_generate_function=generate).evaluate()
    assert kinds == [True, True, True] and report is not None and report.scores == {"held": 0.5}


@pytest.mark.parametrize(
    ("returned", "kind", "says"),
    [
        (None, "none", "returned None, expected a dict: data set name -> {'rewards': [...]}"),
        (RolloutFnTrainOutput(samples=[]), "type", "expected a RolloutFnEvalOutput (evaluation=True)"),
        ({"held": {"samples": []}}, "type", "data set 'held' has no 'rewards'"),
        ({"held": {"rewards": 0.5}}, "type", "rewards of data set 'held': got float 0.5, expected a list of numbers"),
        ({"held": {"rewards": [1.0, None]}}, "none", "rewards[1] of data set 'held': None, expected a number"),
        ({"held": {"rewards": [float("nan")]}}, "nan", "rewards[0] of data set 'held': float nan"),
        ({"held": {"rewards": [1.0], "samples": 3}}, "type", "'samples' of data set 'held': got int 3"),
    ],
    ids=str,
)
def test_what_cannot_be_logged(returned: Any, kind: str, says: str, stage: MakeStage) -> None:
    s = stage(eval_function=lambda args, rollout_id, data_source, evaluation: returned)
    with pytest.raises(HookError) as caught:
        s.evaluate()
    assert caught.value.failure.kind == kind and says in str(caught.value)


def test_an_evaluation_without_rewards_is_no_accident_of_arithmetic(stage: MakeStage) -> None:
    s = stage(eval_function=lambda args, rollout_id, data_source, evaluation: {"held": {"rewards": []}})
    report = s.evaluate()
    assert report is not None and "held" not in report.scores


def test_it_may_differ_from_the_rollout_function() -> None:
    hook = bound("eval_function", "rollouts:any_arguments")
    assert hook.form == "data-source"
