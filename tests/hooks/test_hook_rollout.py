"""--rollout-function-path and --eval-function-path: functions and classes, synchronous and async."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any

import pytest
from hooks_helpers import bound, bound_hooks

from miles.errors import HookError, UsageError
from miles.hooks import RolloutHook, function_registry
from miles.types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
)


class Source:
    def get_samples(self, count: int) -> list[list[Sample]]:
        return [[Sample(index=i)] for i in range(count)]


GIVEN = RolloutFnConstructorInput(args=Namespace(), data_source=Source())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def rollout(name: str) -> RolloutHook:
    hook = bound("rollout_function", f"rollouts:{name}")
    assert isinstance(hook, RolloutHook)
    return hook


@pytest.mark.parametrize(
    ("name", "form", "groups"),
    [
        ("raw", "data-source", 3),
        ("no_source", "no-data-source", 1),
        ("guide", "no-data-source", 1),
        ("async_with_source", "data-source", 1),
        ("any_arguments", "data-source", 1),
        ("Rollout", "class", 1),
        ("AsyncRollout", "class", 1),
    ],
)
def test_training_forms(name: str, form: str, groups: int) -> None:
    hook = rollout(name)
    built = hook.build(GIVEN)
    inline = hook.run(built, RolloutFnTrainInput(3), run)
    awaited = asyncio.run(hook.call_async(built, RolloutFnTrainInput(3)))
    for output in (inline, awaited):
        assert isinstance(output, RolloutFnTrainOutput) and len(output.samples) == groups
    assert hook.form == form and hook.stats.calls == 2


@pytest.mark.parametrize("name", ["raw", "no_source", "guide", "Rollout"])
def test_evaluation_forms(name: str) -> None:
    hook = rollout(name)
    output = hook.run(hook.build(GIVEN), RolloutFnEvalInput(2), run)
    assert isinstance(output, RolloutFnEvalOutput)
    assert output.data == ({"set": {"rewards": [2.0]}} if name == "raw" else {})


def test_evaluation_falls_back_to_the_rollout_function_with_an_object_of_its_own() -> None:
    hooks = bound_hooks("rollout_function", "rollouts:Rollout")
    assert hooks.rollout_function is not None and hooks.eval_function is not None
    first, second = hooks.rollout_function.build(GIVEN), hooks.eval_function.build(GIVEN)
    assert type(first) is type(second) and first is not second
    hooks.rollout_function.run(first, RolloutFnTrainInput(0), run)
    assert hooks.state_dict() == {"rollout_function": {"seen": 1}, "eval_function": {"seen": 0}}
    hooks.load_state_dict({"rollout_function": {"seen": 5}})
    assert first.seen == 5


def test_a_synchronous_rollout_leaves_the_event_loop_free() -> None:
    """It may wait for the very loop that awaits it."""

    async def outer() -> Any:
        loop = asyncio.get_running_loop()

        def waits(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
            return asyncio.run_coroutine_threadsafe(fetch(), loop).result(timeout=5)

        async def fetch() -> Any:
            return [[Sample()]]

        with function_registry.temporary("test:waits", waits):
            hooks = bound_hooks("rollout_function", "x:y", args={"rollout_function_path": "test:waits"})
        hook = hooks.rollout_function
        assert hook is not None
        return await hook.call_async(hook.build(GIVEN), RolloutFnTrainInput(0))

    assert asyncio.run(outer()).samples == [[Sample()]]


def test_run_stays_in_the_callers_thread() -> None:
    hook = rollout("notes_thread")
    threads = hook.target.__globals__["THREADS"]
    threads.clear()
    hook.run(hook.build(GIVEN), RolloutFnTrainInput(0), run)
    assert threads == ["MainThread"]


@pytest.mark.parametrize(
    ("name", "evaluation", "kind", "says"),
    [
        ("returns_none", False, "none", "returned None"),
        ("returns_none", True, "none", "returned None"),
        ("wrong_kind", False, "type", "RolloutFnTrainOutput"),
        ("no_rewards", True, "type", "no 'rewards'"),
    ],
)
def test_bad_returns(name: str, evaluation: bool, kind: str, says: str) -> None:
    hook = rollout(name)
    given = RolloutFnEvalInput(0) if evaluation else RolloutFnTrainInput(0)
    with pytest.raises(HookError, match=says) as caught:
        hook.run(hook.build(GIVEN), given, run)
    assert caught.value.failure.kind == kind


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
        rollout(name)


def test_a_failing_reward_inside_a_rollout_keeps_its_own_card() -> None:
    reward = bound("custom_rm", "rewards:divides")

    def scores(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        return asyncio.run(reward.call_async(Namespace(), Sample()))

    with function_registry.temporary("test:scores", scores):
        hooks = bound_hooks("rollout_function", "x:y", args={"rollout_function_path": "test:scores"})
    hook = hooks.rollout_function
    assert hook is not None
    with pytest.raises(HookError) as caught:
        hook.run(hook.build(GIVEN), RolloutFnTrainInput(0), run)
    assert caught.value.failure.flag == "--custom-rm-path"
