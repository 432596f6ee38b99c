"""What goes through the door untouched, what counts as a failure, and values that a later step rejects."""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import Callable
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


# ---- time ------------------------------------------------------------------------------------------------------------


def test_a_call_that_cannot_be_interrupted_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def blocks(args: Namespace, sample: Sample) -> float:
        time.sleep(0.02)
        return 1.0

    hook = hooks_of("custom_rm", blocks, timeout_s=0.005).custom_rm
    assert hook is not None
    with caplog.at_level(logging.WARNING, logger="miles.hooks"):
        for _ in range(3):
            assert asyncio.run(hook.call_async(ARGS, Sample())) == 1.0
    (told,) = caplog.messages
    assert "cannot be interrupted after --hook-timeout-s 0.005" in told and "Write `def`" in told


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
