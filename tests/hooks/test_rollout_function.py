"""--rollout-function-path: called once per rollout, in every form; what it returns is what is trained."""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hooks_helpers import answered, bound
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError, UsageError
from miles.hooks import RolloutHook, bind, function_registry
from miles.rollout.loop_thread import get_async_loop
from miles.types import (
    RolloutFnConstructorInput,
    RolloutFnInput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
)

MakeStage = Callable[..., Stage]


def groups(size: int = 2) -> list[list[Sample]]:
    return [[answered(2 * g + i, group_index=g, reward=float(i)) for i in range(size)] for g in range(2)]


# ---- what it is called with -----------------------------------------------------------------------------------------


def test_the_published_call(stage: MakeStage) -> None:
    """Three arguments by position, `evaluation` by keyword, in the thread that asks, once per rollout."""
    seen: list[Any] = []

    def rollout(*args: Any, **kwargs: Any) -> RolloutFnTrainOutput:
        seen.append((args, kwargs, threading.current_thread()))
        return RolloutFnTrainOutput(samples=groups(), metrics={"agent/turns": 3})

    s = stage(rollout_function=rollout, custom_rm=None)
    for rollout_id in (0, 1):
        report = s.rollout(rollout_id)
        (args, kwargs, thread) = seen[rollout_id]
        assert args[0] is s.args and args[1] == rollout_id and args[2] is s.manager.data_source and len(args) == 3
        assert kwargs == {"evaluation": False} and thread is threading.current_thread()
    assert len(seen) == 2
    batch = report.shards[0]
    assert batch.sample_indices == [0, 1, 2, 3] and batch.raw_reward == [0.0, 1.0, 0.0, 1.0]
    assert s.metrics()["agent/turns"] == 3, "metrics are logged under the keys given"


def test_the_name_of_the_third_parameter_is_free(stage: MakeStage) -> None:
    def rollout(args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False) -> Any:
        return [[answered(s.index, reward=1.0 * (s.index % 2)) for s in g] for g in data_buffer.get_samples(2)]

    s = stage(rollout_function=rollout)
    assert s.rollout().shards[0].sample_indices == [0, 1, 2, 3], "a raw value counts as the samples"
    assert s.hooks.rollout_function.form == "data-source"


def test_the_guides_form_is_awaited_on_the_event_loop(stage: MakeStage) -> None:
    threads: list[threading.Thread] = []

    async def generate_rollout(args: Namespace, rollout_id: int, *, evaluation: bool = False) -> Any:
        await asyncio.sleep(0)
        threads.append(threading.current_thread())
        return RolloutFnTrainOutput(samples=groups())

    s = stage(rollout_function=generate_rollout)
    assert s.rollout().samples == SAMPLES and s.hooks.rollout_function.form == "no-data-source"
    assert threads == [get_async_loop().thread]


def test_an_async_function_may_take_the_data_source(stage: MakeStage) -> None:
    async def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        return [[answered(s.index, reward=0.0) for s in g] for g in data_source.get_samples(2)]

    assert stage(rollout_function=rollout).rollout().samples == SAMPLES


@pytest.mark.parametrize("is_async", [False, True])
def test_the_class_is_made_once_for_training_and_once_for_evaluation(is_async: bool, stage: MakeStage) -> None:
    made: list[Any] = []

    class Rollout:
        def __init__(self, input: RolloutFnConstructorInput) -> None:
            self.given, self.inputs = input, []
            made.append(self)

        def __call__(self, input: RolloutFnInput) -> Any:
            self.inputs.append((type(input).__name__, input.rollout_id, input.evaluation))
            return RolloutFnTrainOutput(samples=groups())

    class AsyncRollout(Rollout):
        async def __call__(self, input: RolloutFnInput) -> Any:
            return Rollout.__call__(self, input)

    s = stage(rollout_function=AsyncRollout if is_async else Rollout)
    s.rollout(0)
    s.rollout(1)
    train, evaluation = made
    assert train.given.args is s.args and train.given.data_source is s.manager.data_source
    assert train.inputs == [("RolloutFnTrainInput", 0, False), ("RolloutFnTrainInput", 1, False)]
    assert evaluation.inputs == [] and s.hooks.rollout_function.form == "class"


def test_the_switch_changes_the_default(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """MILES_EXPERIMENTAL_ROLLOUT_REFACTOR picks the class tree; a class and a function run under either value."""
    for value, form in (("0", "data-source"), ("1", "class")):
        monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", value)
        s = stage()
        assert s.hooks.rollout_function.form == form and s.hooks.rollout_function.is_built_in
        assert s.rollout().samples == SAMPLES


# ---- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [lambda g: g, lambda g: [g], lambda g: [[g[0]], [g[1]]], lambda g: [s for group in g for s in group], tuple],
    ids=["groups", "list of lists of groups", "entries that are lists", "flat", "tuple"],
)
def test_nesting_is_flattened(shape: Callable[[Any], Any], stage: MakeStage) -> None:
    s = stage(rollout_function=lambda args, rollout_id, data_source, evaluation=False: shape(groups()))
    assert s.rollout().shards[0].sample_indices == [0, 1, 2, 3]


def test_what_the_samples_say_is_what_is_trained(stage: MakeStage) -> None:
    def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        made = groups()
        made[0][0].loss_mask = [0, 1]
        made[0][1].remove_sample = True
        made[1][0].status = Sample.Status.TRUNCATED
        made[1][1].status = "truncated"
        return made

    batch = stage(rollout_function=rollout).rollout().shards[0]
    assert batch.loss_masks.tolist() == [0, 1, 0, 0, 1, 1, 1, 1]
    assert batch.truncated.tolist() == [0, 0, 1, 1]
    assert batch.response_lengths.tolist() == [2, 2, 2, 2]


def test_it_is_not_called_where_rollouts_are_replayed(stage: MakeStage, tmp_path: Path) -> None:
    template = str(tmp_path / "saved_{rollout_id}.pt")
    saved = stage("--save-debug-rollout-data", template)
    saved.rollout(0)

    def never(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        raise AssertionError("called")

    s = stage("--load-debug-rollout-data", template, rollout_function=never)
    assert s.rollout(0).samples == SAMPLES


def test_state_of_the_object_is_kept() -> None:
    hooks = bound("rollout_function", "rollouts:Rollout", whole_run=True)
    given = RolloutFnConstructorInput(args=Namespace(), data_source=None)
    first, second = hooks.rollout_function.build(given), hooks.eval_function.build(given)
    assert type(first) is type(second) and first is not second
    hooks.rollout_function.run(first, RolloutFnTrainInput(0), asyncio.run)
    assert hooks.state_dict() == {"rollout_function": {"seen": 1}, "eval_function": {"seen": 0}}
    hooks.load_state_dict({"rollout_function": {"seen": 5}})
    assert first.seen == 5


def test_a_synchronous_function_leaves_the_event_loop_free() -> None:
    """It may wait for the very loop that awaits it."""

    async def outer() -> Any:
        loop = asyncio.get_running_loop()

        def waits(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
            return asyncio.run_coroutine_threadsafe(fetch(), loop).result(timeout=5)

        async def fetch() -> Any:
            return [[Sample()]]

        with function_registry.temporary("test:waits", waits):
            hook = bind(Namespace(rollout_function_path="test:waits")).rollout_function
        assert hook is not None
        return await hook.call_async(hook.build(RolloutFnConstructorInput(Namespace(), None)), RolloutFnTrainInput(0))

    assert asyncio.run(outer()).samples == [[Sample()]]


def test_a_failing_reward_inside_a_rollout_keeps_its_own_card(stage: MakeStage) -> None:
    async def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        from miles.rollout.rm_hub import async_rm

        return [[await async_rm(args, s) for s in g] for g in data_source.get_samples(1)]

    async def divides(args: Namespace, sample: Sample) -> float:
        return 1 / (len(sample.response) * 0)

    with pytest.raises(HookError) as caught:
        stage(rollout_function=rollout, custom_rm=divides).rollout()
    assert caught.value.failure.flag == "--custom-rm-path" and "ZeroDivisionError" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_evaluation", "unexpected keyword argument 'evaluation'"),
        ("NoCall", "without __call__"),
        ("CallWithoutInput", "cannot take one input"),
    ],
)
def test_problems(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bound("rollout_function", f"rollouts:{name}")


def test_any_arguments_mean_the_published_call() -> None:
    hook = bound("rollout_function", "rollouts:any_arguments")
    assert isinstance(hook, RolloutHook) and hook.form == "data-source"
