"""--custom-reward-post-process-path: once per rollout, on the flat list of trained samples; its numbers are trained."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError
from miles.types import Sample

MakeStage = Callable[..., Stage]


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, samples)` by position, after the log function, in the thread that asks."""
    seen: list[Any] = []

    def process(*given: Any, **kwargs: Any) -> tuple[list[float], list[float]]:
        seen.append(("process", given, kwargs, threading.current_thread()))
        raw = [s.reward for s in given[1]]
        return raw, [10.0 * r for r in raw]

    s = stage(
        custom_reward_post_process=process,
        custom_rollout_log_function=lambda *given: seen.append(("log",)),
    )
    batch = s.rollout().shards[0]
    (first,), (name, (args, samples), kwargs, thread) = seen
    assert (first, name) == ("log", "process") and kwargs == {} and args is s.args
    assert [m.index for m in samples] == [0, 1, 2, 3] and all(isinstance(m, Sample) for m in samples)
    assert thread is threading.current_thread()
    assert batch.raw_reward == [0.0, 1.0, 0.0, 1.0] and np.asarray(batch.rewards).tolist() == [0.0, 10.0, 0.0, 10.0]


def test_what_it_leaves_on_samples_reaches_the_batch(stage: MakeStage) -> None:
    def teach(args: Namespace, samples: list[Sample]) -> Any:
        for sample in samples:
            sample.teacher_log_probs = torch.full((sample.response_length,), -0.5)  # type: ignore[attr-defined]
        return [0.0] * len(samples), [0.0] * len(samples)

    batch = stage(custom_reward_post_process=teach).rollout().shards[0]
    assert batch.teacher_log_probs is not None and len(batch.teacher_log_probs) == SAMPLES


def test_rewards_may_be_tensors_of_one_dimension(stage: MakeStage) -> None:
    def per_token(args: Namespace, samples: list[Sample]) -> Any:
        return [0.0] * len(samples), [torch.zeros(s.response_length) for s in samples]

    batch = stage(custom_reward_post_process=per_token).rollout().shards[0]
    assert [len(r) for r in batch.rewards] == batch.response_lengths.tolist()  # type: ignore[union-attr]


def test_it_turns_dicts_into_numbers(stage: MakeStage) -> None:
    """With one, a reward may be a dict although no --reward-key says what counts."""

    async def score(args: Namespace, sample: Sample) -> dict[str, float]:
        return {"right": 1.0, "short": float(sample.index or 0)}

    def add(args: Namespace, samples: list[Sample]) -> Any:
        total = [s.reward["right"] + s.reward["short"] for s in samples]
        return total, total

    batch = stage(custom_rm=score, custom_reward_post_process=add).rollout().shards[0]
    assert np.asarray(batch.rewards).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_custom_conversion_takes_its_place(stage: MakeStage) -> None:
    def never(args: Namespace, samples: list[Sample]) -> Any:
        raise AssertionError("called")

    def convert(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
        return {
            "tokens": [s.tokens for s in samples],
            "response_lengths": [s.response_length for s in samples],
            "loss_masks": [[1] * s.response_length for s in samples],
            "rewards": [0.5] * len(samples),
        }

    s = stage(custom_reward_post_process=never, custom_convert_samples_to_train_data=convert)
    assert np.asarray(s.rollout().shards[0].rewards).tolist() == [0.5] * SAMPLES


def test_a_failed_score_is_not_shown_to_it(stage: MakeStage) -> None:
    async def fails_on_two(args: Namespace, sample: Sample) -> float:
        return (sample.index or 0) / (sample.index != 2)

    def process(args: Namespace, samples: list[Sample]) -> Any:
        rewards = [s.reward for s in samples]
        assert None not in rewards and len(rewards) == 7
        return rewards, rewards

    s = stage(
        "--hook-policy", "custom-rm=mask", "--n-samples-per-prompt", 4, custom_rm=fails_on_two,
        custom_reward_post_process=process,
    )  # fmt: skip
    batch = s.rollout().shards[0]
    assert batch.failed.tolist() == [i == 2 for i in range(8)]
    begin, end = batch.response_offsets[2:4]
    assert np.asarray(batch.rewards)[2] == 0 and not batch.loss_masks[begin:end].any()


def clears(args: Namespace, samples: list[Sample]) -> Any:
    samples.clear()
    return [], []


def sorts(args: Namespace, samples: list[Sample]) -> Any:
    samples.sort(key=lambda s: s.reward)
    return [s.reward for s in samples], [s.reward for s in samples]


@pytest.mark.parametrize(
    ("returned", "kind", "says"),
    [
        (None, "none", "returned None, expected (raw_rewards, rewards)"),
        ([0.0] * SAMPLES, "length", "returned 4 values, expected (raw_rewards, rewards)"),
        (([0.0], [0.0]), "length", "raw_rewards has 1 entries for 4 samples"),
        (([0.0] * SAMPLES, [0.0]), "length", "rewards has 1 entries for 4 samples"),
        ((1.0, 2.0), "type", "raw_rewards is a float, expected a list"),
        (([0.0] * SAMPLES, [0.0, 1.0, float("nan"), 0.0]), "nan", "rewards[2] (sample 2): float nan"),
        (([0.0] * SAMPLES, [0.0, 1.0, None, 0.0]), "none", "rewards[2] (sample 2): None"),
        (([0.0] * SAMPLES, ["a"] * SAMPLES), "type", "rewards[0] (sample 0): str 'a'"),
        (clears, "type", "changed the list of samples that it was given"),
        (sorts, "type", "hint      work on a copy"),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_what_cannot_be_trained(returned: Any, kind: str, says: str, stage: MakeStage) -> None:
    s = stage(custom_reward_post_process=returned if callable(returned) else lambda args, samples: returned)
    with pytest.raises(HookError) as caught:
        s.rollout()
    assert caught.value.failure.kind == kind and says in str(caught.value)
