"""--custom-rm-path: every form, every return value, every policy."""

from __future__ import annotations

import asyncio
import math
from argparse import Namespace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks_helpers import bound, bound_hooks, group, sample

from miles.errors import HookError, UsageError
from miles.hooks import RewardHook, function_registry
from miles.types import Failure

ARGS = Namespace(reward_key=None)


def reward(name: str, **settings: Any) -> RewardHook:
    hook = bound("custom_rm", f"rewards:{name}", **settings)
    assert isinstance(hook, RewardHook)
    return hook


@pytest.mark.parametrize(
    ("name", "form", "single", "batch"),
    [
        ("annotated", "sample", 1.0, [1.0, 1.0, 1.0]),
        ("in_thread", "sample", 1.0, [1.0, 1.0, 1.0]),
        ("plain", "sample-or-samples", 0.0, [0.0, 1.0, 2.0]),
        ("makes_coroutine", "sample-or-samples", 0.0, [0.0, 1.0, 2.0]),
        ("many", "samples", 0.0, [0.0, 1.0, 2.0]),
        ("many_in_thread", "samples", 0.0, [0.0, 1.0, 2.0]),
        ("AsyncObject", "sample", 2.0, [2.0, 2.0, 2.0]),
        ("instance", "sample", 2.0, [2.0, 2.0, 2.0]),
        ("Stateful", "sample", 1.0, [2.0, 3.0, 4.0]),
        ("trl_prompts", "trl", 5.0, [5.0, 5.0, 5.0]),
        ("compute_score_short", "verl", 1.0, [1.0, 1.0, 1.0]),
    ],
)
def test_forms(name: str, form: str, single: float, batch: list[float]) -> None:
    hook = reward(name)
    assert hook.form == form
    assert asyncio.run(hook.call_async(ARGS, sample())) == single
    assert asyncio.run(hook.call_batch_async(ARGS, group())) == batch
    assert asyncio.run(hook.call_batch_async(ARGS, [])) == []
    assert hook.stats.calls == 4 and hook.stats.failures == 0
    assert hook.stats.total_s >= hook.stats.max_s > 0


def test_trl_columns_come_from_metadata_and_label() -> None:
    samples = [sample(0, metadata={"difficulty": 2}), sample(1, response="5", metadata={"difficulty": 3})]
    assert asyncio.run(reward("trl_columns").call_batch_async(ARGS, samples)) == [2.0, 0.0]


def test_trl_sees_conversations_where_prompts_are() -> None:
    chat = sample(prompt=[{"role": "user", "content": "2+2="}])
    assert asyncio.run(reward("trl_async").call_async(ARGS, chat)) == 1.0


def test_verl_scores_count_by_their_score() -> None:
    given = sample(metadata={"data_source": "gsm8k", "level": 3})
    assert asyncio.run(reward("compute_score").call_async(ARGS, given)) == 1.0
    keyed = Namespace(reward_key="acc")
    assert asyncio.run(reward("compute_score").call_async(keyed, given)) == {"score": 1.0, "acc": True}


def test_forced_form() -> None:
    hook = reward("plain", forms={"custom-rm": "sample"})
    assert hook.form == "sample"
    assert asyncio.run(hook.call_batch_async(ARGS, group())) == [0.0, 1.0, 2.0]


LEGAL = [1, 0, True, -2.5, Fraction(1, 2), np.float32(1.5), np.int64(3), np.bool_(True), torch.tensor(1.0)]
LEGAL += [torch.tensor(2), torch.tensor(True), torch.tensor([0.1, 0.2]), np.array([1.0, 2.0]), torch.tensor([])]


@pytest.mark.parametrize("value", LEGAL, ids=repr)
def test_legal_values_pass_unchanged(value: Any) -> None:
    given = sample(metadata={"value": value})
    assert asyncio.run(reward("from_metadata").call_async(ARGS, given)) is value


BAD = [
    (None, "none"),
    (math.nan, "nan"),
    (math.inf, "nan"),
    (-math.inf, "nan"),
    (np.float64("nan"), "nan"),
    (torch.tensor(math.nan), "nan"),
    (torch.tensor([0.0, math.inf]), "nan"),
    (Decimal("1.5"), "type"),
    ("1.0", "type"),
    ([1.0], "type"),
    ({"score": 1.0}, "type"),
    ({}, "type"),
    (torch.zeros(2, 2), "type"),
    (1 + 2j, "type"),
    (object(), "type"),
    (np.array(["a"]), "type"),
]


@pytest.mark.parametrize("policy", ["drop", "mask", "retry:1,drop", "retry:1,mask"])
@pytest.mark.parametrize(("value", "kind"), BAD, ids=[f"{k}-{v!r}"[:30] for v, k in BAD])
def test_a_failed_reward_is_never_a_number(value: Any, kind: str, policy: str, no_delay: None) -> None:
    hook = reward("from_metadata", policies={"custom-rm": policy})
    result = asyncio.run(hook.call_async(ARGS, sample(7, metadata={"value": value})))
    assert isinstance(result, Failure)
    assert (result.kind, result.sample_index, result.flag) == (kind, 7, "--custom-rm-path")
    with pytest.raises((TypeError, ValueError)):
        float(result)  # type: ignore[arg-type]
    batch = asyncio.run(
        hook.call_batch_async(ARGS, [sample(metadata={"value": 1.0}), sample(1, metadata={"value": value})])
    )
    assert batch[0] == 1.0 and isinstance(batch[1], Failure)


@pytest.mark.parametrize("policy", ["raise", "retry:1"])
@pytest.mark.parametrize(("value", "kind"), BAD, ids=[f"{k}-{v!r}"[:30] for v, k in BAD])
def test_a_failed_reward_raises_by_default(value: Any, kind: str, policy: str, no_delay: None) -> None:
    hook = reward("from_metadata", policies={"custom-rm": policy})
    with pytest.raises(HookError) as caught:
        asyncio.run(hook.call_async(ARGS, sample(7, metadata={"value": value})))
    assert caught.value.failure.kind == kind


@pytest.mark.parametrize(
    ("value", "settings", "kind"),
    [
        ({"score": 1.0}, {"reward_key": "score"}, None),
        ({"score": None}, {"reward_key": "score"}, "none"),
        ({"score": math.nan}, {"reward_key": "score"}, "nan"),
        ({"score": "1"}, {"reward_key": "score"}, "type"),
        ({"acc": 1.0}, {"reward_key": "score"}, "type"),
        (1.0, {"reward_key": "score"}, "type"),
        ({"acc": 1.0}, {"reward_key": "score", "eval_reward_key": "acc"}, None),
        ({"acc": 1.0}, {"reward_key": None, "custom_reward_post_process_path": "a.b"}, None),
        ({"acc": 1.0}, {"reward_key": None, "custom_convert_samples_to_train_data_path": "a.b"}, None),
        ({"acc": 1.0}, {}, "type"),
    ],
)
def test_dict_rewards(value: Any, settings: dict[str, Any], kind: str | None) -> None:
    hook = reward("from_metadata", policies={"custom-rm": "drop"})
    result = asyncio.run(hook.call_async(Namespace(**settings), sample(metadata={"value": value})))
    if kind is None:
        assert result == value
    else:
        assert isinstance(result, Failure) and result.kind == kind


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("batch_with_holes", [None, "none", "nan"]),
        ("short_batch", ["length", "length", "length"]),
        ("batch_fails", ["exception", "exception", "exception"]),
        ("divides", ["exception", "exception", "exception"]),
        ("odd_fails", [None, "exception", None]),
        ("trl_none", [None, "none", None]),
        ("stops_iteration", ["exception", "exception", "exception"]),
    ],
)
def test_batches_fail_sample_by_sample(name: str, kinds: list[str | None]) -> None:
    hook = reward(name, policies={"custom-rm": "drop"})
    values = asyncio.run(hook.call_batch_async(ARGS, group()))
    assert [v.kind if isinstance(v, Failure) else None for v in values] == kinds
    assert [v.sample_index for v in values if isinstance(v, Failure)] == [i for i, k in enumerate(kinds) if k]
    assert hook.stats.calls == 3 and hook.stats.failures == sum(k is not None for k in kinds)


def test_time_limit() -> None:
    hook = reward("slow", policies={"custom-rm": "drop"}, timeout_s=0.05)
    result = asyncio.run(hook.call_async(ARGS, sample()))
    assert isinstance(result, Failure) and result.kind == "timeout" and "--hook-timeout-s" in result.message


def test_retry_succeeds(no_delay: None) -> None:
    hook = reward("flaky", policies={"custom-rm": "retry:3"})
    hook.target.__globals__["FLAKY"]["calls"] = 0
    assert asyncio.run(hook.call_async(ARGS, sample())) == 7.0
    assert hook.stats.failures == 0


@pytest.mark.parametrize(
    "error", [UsageError("mine"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("synchronous", [False, True])
def test_some_errors_pass_untouched(error: BaseException, synchronous: bool) -> None:
    async def raises(args: Namespace, sample: Any) -> float:
        raise error

    def raises_here(args: Namespace, sample: Any) -> float:
        raise error

    with function_registry.temporary("test:raises", raises_here if synchronous else raises):
        hooks = bound_hooks("custom_rm", "x:y", args={"custom_rm_path": "test:raises"}, policies={"custom-rm": "drop"})
        assert hooks.custom_rm is not None
        with pytest.raises(type(error)) as caught:
            asyncio.run(hooks.custom_rm.call_async(ARGS, sample()))
        assert caught.value is error


def test_cancellation_passes() -> None:
    hook = reward("slow", policies={"custom-rm": "drop"})

    async def cancel() -> None:
        task = asyncio.create_task(hook.call_async(ARGS, sample()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert hook.stats.failures == 0


def test_state_of_an_object_comes_back(tmp_path: Path) -> None:
    hooks = bound_hooks("custom_rm", "rewards:Stateful")
    assert hooks.custom_rm is not None
    asyncio.run(hooks.custom_rm.call_batch_async(ARGS, group()))
    state = hooks.state_dict()
    assert state == {"custom_rm": {"calls": 3}}
    again = bound_hooks("custom_rm", "rewards:Stateful")
    again.load_state_dict(state)
    assert again.custom_rm is not None
    assert asyncio.run(again.custom_rm.call_async(ARGS, sample())) == 4.0
    with pytest.raises(UsageError, match="no plug-in with load_state_dict"):
        bound_hooks("custom_rm", "rewards:plain").load_state_dict(state)
