"""What goes through the door untouched, what counts as a failure, and values that a later step rejects."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles.errors import EngineError, HookError
from miles.hooks import Hooks, bind, function_registry
from miles.hooks.source import is_built_in
from miles.types import Failure, RolloutFnConstructorInput, RolloutFnTrainInput, Sample

ARGS = Namespace(reward_key=None)


def hooks_of(point: str, target: Callable[..., Any], **settings: Any) -> Hooks:
    with function_registry.temporary("test:it", target):
        return bind(Namespace(**{f"{point}_path": "test:it"}), **settings)


# ---- endings that a plug-in has caused -------------------------------------------------------------------------------


async def exits(args: Namespace, sample: Sample) -> float:
    raise SystemExit(3)


def exits_in_thread(args: Namespace, sample: Sample) -> float:
    raise SystemExit(3)


async def cancelled(args: Namespace, sample: Sample) -> float:
    own = asyncio.ensure_future(asyncio.sleep(60))
    own.cancel()
    await own
    return 1.0


@pytest.mark.parametrize("reward", [exits, exits_in_thread, cancelled], ids=lambda f: f.__name__)
def test_a_plug_in_that_wants_to_end_more_than_its_call_has_failed(reward: Any) -> None:
    hook = hooks_of("custom_rm", reward, policies={"custom-rm": "drop"}).custom_rm
    assert hook is not None
    failure = asyncio.run(hook.call_async(ARGS, Sample(index=4)))
    assert isinstance(failure, Failure) and failure.kind == "exception" and failure.sample_index == 4
    assert failure.message.startswith("SystemExit: 3" if "exits" in reward.__name__ else "CancelledError")
    assert "test_hooks_door.py:" in failure.location


def test_exits_of_synchronous_plug_points() -> None:
    def leaves(args: Namespace, samples: list[Sample]) -> bool:
        raise SystemExit

    hook = hooks_of("dynamic_sampling_filter", leaves).dynamic_sampling_filter
    assert hook is not None
    with pytest.raises(HookError, match="SystemExit"):
        hook(ARGS, [])


# ---- the data source -------------------------------------------------------------------------------------------------


class Source:
    def __init__(self, args: Namespace) -> None: ...
    def get_samples(self, num_samples: int) -> list[Any]:
        raise OSError("the database is gone")

    def add_samples(self, samples: list[Any]) -> None: ...
    def save(self, rollout_id: int) -> None: ...
    def load(self, rollout_id: int | None = None) -> None: ...


def test_methods_of_the_data_source() -> None:
    hook = hooks_of("data_source", Source).data_source
    assert hook is not None
    source = hook(ARGS)
    assert hook.enter(source.add_samples, []) is None
    with pytest.raises(HookError) as caught:
        hook.enter(source.get_samples, 4)
    card = str(caught.value)
    assert card.startswith("--data-source-path test:it failed at ") and "OSError: the database is gone" in card
    assert "miles replay" not in card, "a method of a live object cannot be called again"
    assert (hook.stats.calls, hook.stats.failures) == (3, 1)


# ---- rejected afterwards ---------------------------------------------------------------------------------------------


def a_reward(args: Namespace, sample: Sample) -> float:
    return 1.0


def test_what_a_later_step_rejects() -> None:
    hooks = hooks_of("custom_rm", a_reward, policies={"custom-rm": "drop"})
    hooks.reject("no such sample", "custom_generate_function", "rollout_function")
    with pytest.raises(HookError) as caught:
        hooks.reject("sample 3 has no tokens", "rollout_function", "custom_rm")
    assert "--custom-rm-path test:it failed at " in str(caught.value) and "sample 3 has no tokens" in str(caught.value)
    assert "raise" in str(caught.value), "the policy speaks of calls, not of this"


def test_built_in_plug_ins_are_not_suspected() -> None:
    hooks = bind(Namespace(rollout_function_path="miles.rollout.sleep_rollout.sleep"))
    assert hooks.rollout_function is not None and hooks.rollout_function.is_built_in
    hooks.reject("anything", "rollout_function")
    assert not is_built_in(__file__)


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built_in", [True, False])
def test_what_an_engine_says_is_told_as_it_is_where_no_plug_in_asked(
    built_in: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        raise EngineError("the logits are not finite")

    hook = hooks_of("rollout_function", rollout).rollout_function
    assert hook is not None
    monkeypatch.setattr("miles.hooks.call.is_built_in", lambda file: built_in)
    built = hook.build(RolloutFnConstructorInput(ARGS, None))
    with pytest.raises(EngineError if built_in else HookError, match="the logits are not finite"):
        hook.run(built, RolloutFnTrainInput(0), lambda coroutine: None)


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_an_exception_without_a_text() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    async def raises(args: Namespace, sample: Sample) -> float:
        raise Unspeakable

    hook = hooks_of("custom_rm", raises).custom_rm
    assert hook is not None
    with pytest.raises(HookError, match=r"Unspeakable: \(str of it raised RuntimeError\)"):
        asyncio.run(hook.call_async(ARGS, Sample()))


def card_of(reward: Callable[..., Any], **settings: Any) -> str:
    hook = hooks_of("custom_rm", reward, **settings).custom_rm
    assert hook is not None
    with pytest.raises(HookError) as caught:
        asyncio.run(hook.call_async(ARGS, Sample(index=4)))
    return str(caught.value)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(text))


async def fails_later() -> None:
    await asyncio.sleep(0)
    raise ValueError("from a task")  # of a task


async def awaits_its_task(args: Namespace, sample: Sample) -> float:
    await asyncio.create_task(fails_later())
    return 1.0


async def uses_a_task_group(args: Namespace, sample: Sample) -> float:
    async with asyncio.TaskGroup() as group:
        group.create_task(fails_later())
    return 1.0


async def uses_an_executor(args: Namespace, sample: Sample) -> float:
    return float(await asyncio.get_running_loop().run_in_executor(None, float, sample.label))  # in an executor


def recurses(args: Namespace, sample: Sample) -> float:
    return recurses(args, sample)  # again and again


async def imports_late(args: Namespace, sample: Sample) -> float:
    return float(eval("1 +"))  # a syntax error of its own


@pytest.mark.parametrize(
    ("reward", "line", "says"),
    [
        (awaits_its_task, "# of a task", "ValueError: from a task"),
        (uses_a_task_group, "# of a task", "in a TaskGroup (1 sub-exception)\n    ValueError: from a task"),
        (uses_an_executor, "# in an executor", "TypeError: float() argument must be"),
        (recurses, "# again and again", "RecursionError: maximum recursion depth exceeded"),
        (imports_late, "# a syntax error of its own", "SyntaxError: invalid syntax"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_the_card_names_the_users_line_wherever_it_failed(reward: Any, line: str, says: str) -> None:
    card = card_of(reward)
    assert card.startswith("--custom-rm-path test:it failed at ")
    assert f"test_hooks_door.py:{line_of(line)}\n" in card and says in card


def test_a_huge_message_is_cut_in_the_middle() -> None:
    async def raises(args: Namespace, sample: Sample) -> float:
        raise ValueError("beginning" + "x" * 100_000 + "end")

    card = card_of(raises)
    assert len(card) < 4000 and "ValueError: beginning" in card and "xend\n" in card and "98" in card


def test_a_time_limit_names_the_line_that_waited() -> None:
    async def waits(args: Namespace, sample: Sample) -> float:
        await asyncio.sleep(60)  # for ever
        return 1.0

    card = card_of(waits, timeout_s=0.02)
    assert f"test_hooks_door.py:{line_of('# for ever')}\n" in card
    assert "took longer than 0.02 s (--hook-timeout-s)" in card


def test_a_limit_of_0_is_none() -> None:
    async def slow(args: Namespace, sample: Sample) -> float:
        await asyncio.sleep(0.01)
        return 1.0

    hook = hooks_of("custom_rm", slow, timeout_s=0.0).custom_rm
    assert hook is not None and hook.timeout_s is None
    assert asyncio.run(hook.call_async(ARGS, Sample())) == 1.0
