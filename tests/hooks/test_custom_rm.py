"""--custom-rm-path: when it is called and with what, every form, every return value, every policy."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from argparse import Namespace
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks_helpers import answered, bound, bound_hooks, group, sample
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError, UsageError
from miles.hooks import RewardHook, function_registry
from miles.rollout.loop_thread import get_async_loop
from miles.types import Failure, Sample

MakeStage = Callable[..., Stage]
ARGS = Namespace(reward_key=None)


def reward(name: str, **settings: Any) -> RewardHook:
    hook = bound("custom_rm", f"rewards:{name}", **settings)
    assert isinstance(hook, RewardHook)
    return hook


# ---- when it is called, and with what -------------------------------------------------------------------------------


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, sample)` by position on the event loop, after the generation of that sample, once."""
    seen: list[tuple[Any, ...]] = []
    threads: set[threading.Thread] = set()

    async def score(*given: Any, **kwargs: Any) -> float:
        assert kwargs == {}
        seen.append(given)
        threads.add(threading.current_thread())
        _, scored = given
        assert scored.status == Sample.Status.COMPLETED and scored.reward is None and scored.response_length > 0
        return float(scored.index)

    s = stage("--hook-form", "custom-rm=sample", custom_rm=score)
    report = s.rollout()
    assert sorted(given[1].index for given in seen) == [0, 1, 2, 3] and all(given[0] is s.args for given in seen)
    assert threads == {get_async_loop().thread}
    assert report.shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0]


def test_group_rm_scores_a_group_once_all_of_it_is_generated(stage: MakeStage) -> None:
    seen: list[list[int]] = []

    async def score(args: Namespace, samples: list[Sample]) -> list[float]:
        assert all(s.status == Sample.Status.COMPLETED and s.reward is None for s in samples)
        seen.append([s.index for s in samples if s.index is not None])
        return [float(s.index or 0) for s in samples]

    s = stage("--group-rm", custom_rm=score)
    report = s.rollout()
    assert sorted(seen) == [[0, 1], [2, 3]] and report.shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0]
    assert s.hooks.custom_rm.form == "samples"


def test_a_function_of_one_sample_scores_groups_one_by_one(stage: MakeStage) -> None:
    async def score(args: Namespace, sample: Sample) -> float:
        return float(sample.index or 0)

    s = stage("--group-rm", custom_rm=score)
    assert s.rollout().shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0] and s.hooks.custom_rm.form == "sample"


def test_a_function_that_tells_groups_apart_itself(stage: MakeStage) -> None:
    """Without annotation a group arrives as a list, as published; several samples of one prompt do, too."""
    kinds: list[str] = []

    async def score(args, sample, **kwargs):  # type: ignore[no-untyped-def]
        kinds.append(type(sample).__name__)
        return [float(s.index) for s in sample] if isinstance(sample, list) else float(sample.index)

    async def twice(args: Namespace, sample: Sample, sampling_params: Any) -> list[Sample]:
        return [answered(sample.index or 0), answered((sample.index or 0) + 10)]

    s = stage(custom_rm=score)
    assert s.rollout().shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0] and set(kinds) == {"Sample"}
    s = stage("--group-rm", custom_rm=score)
    assert s.rollout().shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0] and set(kinds[SAMPLES:]) == {"list"}
    assert s.hooks.custom_rm.form == "sample-or-samples"
    s = stage(custom_rm=score, custom_generate_function=twice)
    assert s.rollout().shards[0].raw_reward == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 3.0, 13.0]


def test_it_scores_evaluations(stage: MakeStage, tmp_path: Path) -> None:
    prompts: list[Any] = []

    async def score(args: Namespace, sample: Sample) -> float:
        prompts.append(sample.prompt)
        return 0.5

    report = stage(*Stage.evaluating(tmp_path, 2), custom_rm=score).evaluate()
    assert prompts == ["20+1=?", "21+1=?"] and report is not None and report.scores == {"held": 0.5}


def test_it_precedes_rm_type_and_metadata(stage: MakeStage) -> None:
    async def score(args: Namespace, sample: Sample) -> float:
        return 0.25

    s = stage("--rm-type", "random", custom_rm=score)
    assert s.rollout().shards[0].raw_reward == [0.25] * SAMPLES


def test_args_may_be_written_to_and_copied(stage: MakeStage) -> None:
    """What one plug-in writes on `args`, the next plug-in of the process sees."""

    async def score(args: Namespace, sample: Sample) -> float:
        own = copy.deepcopy(args)
        own.temperature = 0.0
        args.scored = vars(args).get("scored", 0) + 1
        return 1.0

    counted: list[int] = []
    s = stage(custom_rm=score, custom_rollout_log_function=lambda rollout_id, args, *rest: counted.append(args.scored))
    s.rollout()
    assert counted == [SAMPLES] and s.args.scored == SAMPLES


def test_a_client_of_another_loop_may_be_used(stage: MakeStage) -> None:
    """A reward that runs a loop of its own in a thread: nothing of ours is bound to one loop or thread."""

    async def fetch(sample: Sample) -> float:
        await asyncio.sleep(0.001)
        return float(sample.index or 0)

    async def score(args: Namespace, sample: Sample) -> float:
        return await asyncio.to_thread(lambda: asyncio.run(fetch(sample)))

    assert stage(custom_rm=score).rollout().shards[0].raw_reward == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, Fraction, np.float64, lambda v: np.array(v)])
def test_rewards_may_be_tensors_and_arrays(kind: Callable[[float], Any], stage: MakeStage) -> None:
    async def score(args: Namespace, sample: Sample) -> Any:
        return kind(float((sample.index or 0) % 2))

    batch = stage(custom_rm=score).rollout().shards[0]
    np.testing.assert_allclose(np.asarray(batch.rewards), np.float32([-1, 1, -1, 1]) / np.sqrt(2), atol=1e-5)


# ---- forms ----------------------------------------------------------------------------------------------------------


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


def test_an_annotation_says_more_than_a_name() -> None:
    """`samples: Sample` is one sample, whatever it is called."""

    async def score(args: Namespace, samples: Sample) -> float:
        return float(samples.index or 0)

    with function_registry.temporary("test:score", score):
        hook = bound_hooks("custom_rm", "x:y", args={"custom_rm_path": "test:score"}).custom_rm
    assert hook is not None and hook.form == "sample"
    assert asyncio.run(hook.call_batch_async(ARGS, group())) == [0.0, 1.0, 2.0]


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


# ---- values and policies --------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize(("value", "kind"), BAD, ids=[f"{k}-{type(v).__name__}-{i}" for i, (v, k) in enumerate(BAD)])
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
@pytest.mark.parametrize(("value", "kind"), BAD, ids=[f"{k}-{type(v).__name__}-{i}" for i, (v, k) in enumerate(BAD)])
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
