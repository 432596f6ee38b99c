"""What published plug-ins rely on beyond signatures: loose samples, writable args, helpers from any thread and loop."""

from __future__ import annotations

import asyncio
import copy
import threading
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks_helpers import answered
from hooks_stage import SAMPLES, Stage

from miles.rollout.rm_hub import async_rm, batched_async_rm
from miles.rollout.sglang_rollout import GenerateState, generate, generate_and_rm_group
from miles.types import RolloutFnTrainOutput, Sample

MakeStage = Callable[..., Stage]


@pytest.mark.parametrize(
    ("status", "truncated"),
    [("completed", 0), ("truncated", 1), ("failed", 0), ("pending", 0), ("my own", 0), (Sample.Status.TRUNCATED, 1)],
)
def test_a_status_may_be_plain_text(status: Any, truncated: int, stage: MakeStage) -> None:
    """It goes through the batch, the record, a saved rollout and its replay."""

    async def plug_in(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        return answered(sample.index or 0, status=status, group_index=sample.group_index)

    s = stage(custom_generate_function=plug_in)
    batch = s.rollout().shards[0]
    assert batch.truncated.tolist() == [truncated] * SAMPLES and batch.raw_reward == [0.0, 1.0, 0.0, 1.0]
    s.record.flush()
    again = Sample.from_dict(answered(0, status=status).to_dict())
    assert again.status == status and copy.deepcopy(again).status == status


def test_attributes_of_its_own_travel_with_a_sample(stage: MakeStage, tmp_path: Path) -> None:
    seen: list[Any] = []

    async def plug_in(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        done = await generate(args, sample, sampling_params)
        done.tool_call_count = 3  # type: ignore[attr-defined]
        done.payload_text = "raw"  # type: ignore[attr-defined]
        return done

    def log(rollout_id: int, args: Namespace, samples: list[Any], extra: Any, seconds: float) -> None:
        seen.extend((s.tool_call_count, s.payload_text) for s in samples)

    template = str(tmp_path / "saved_{rollout_id}.pt")
    s = stage("--save-debug-rollout-data", template, custom_generate_function=plug_in, custom_rollout_log_function=log)
    s.rollout()
    stage("--load-debug-rollout-data", template, custom_rollout_log_function=log).rollout()
    assert seen == [(3, "raw")] * (2 * SAMPLES), "also after they were saved and read again"


def test_an_output_may_be_changed_after_it_is_made(stage: MakeStage) -> None:
    def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        output = RolloutFnTrainOutput(samples=[])
        output.samples = [[answered(i, reward=float(i)) for i in range(4)]]
        output.metrics = {"agent/turns": np.float32(2.0), "agent/kl": torch.tensor(0.5)}
        return output

    s = stage(rollout_function=rollout)
    assert s.rollout().samples == SAMPLES and s.metrics()["agent/turns"] == 2.0 and s.metrics()["agent/kl"] == 0.5


def test_args_may_be_written_to_copied_and_handed_on(stage: MakeStage) -> None:
    """A plug-in keeps its objects on `args`, and calls published helpers with a changed copy."""
    temperatures: list[float] = []

    async def plug_in(args: Namespace, sample: Sample, sampling_params: Any) -> Sample:
        args.counter = vars(args).get("counter", 0) + 1
        args.lock = vars(args).get("lock") or asyncio.Lock()
        return await generate(args, sample, sampling_params)

    async def score(args: Namespace, sample: Sample) -> float:
        own = copy.deepcopy(Namespace(**{k: v for k, v in vars(args).items() if k != "lock"}))
        own.rollout_temperature = 0.1
        temperatures.append(own.rollout_temperature)
        assert args.rollout_temperature == 1.0
        return float((sample.index or 0) % 2)

    s = stage(custom_generate_function=plug_in, custom_rm=score)
    s.rollout()
    assert s.args.counter == SAMPLES and temperatures == [0.1] * SAMPLES


def test_a_copy_of_args_may_name_other_plug_ins(stage: MakeStage) -> None:
    """Published helpers obey the args that they are given: here each group is scored by another reward."""

    async def rollout(args: Namespace, rollout_id: int, data_source: Any, *, evaluation: bool = False) -> Any:
        done = []
        for path, group in zip(("test:custom_rm", f"{__file__}:always_seven"), data_source.get_samples(2)):
            own = copy.copy(args)
            own.custom_rm_path = path
            done.append(await generate_and_rm_group(own, group, GenerateState(args).sampling_params))
        return done

    assert stage(rollout_function=rollout).rollout().shards[0].raw_reward == [0.0, 1.0, 7.0, 7.0]


async def always_seven(args: Namespace, sample: Sample) -> float:
    return 7.0


def test_helpers_may_be_called_from_another_thread_with_its_own_loop(stage: MakeStage) -> None:
    """A rollout function that works in threads of its own, each with its own event loop."""
    results: dict[int, Any] = {}

    def work(args: Namespace, group: list[Sample], number: int) -> None:
        params = GenerateState(args).sampling_params
        results[number] = asyncio.run(generate_and_rm_group(args, group, params))

    def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        groups = data_source.get_samples(2)
        threads = [threading.Thread(target=work, args=(args, g, i)) for i, g in enumerate(groups)]
        for thread in threads:
            thread.start()
            thread.join()
        return [results[i] for i in range(2)]

    s = stage(rollout_function=rollout)
    assert s.rollout().shards[0].raw_reward == [0.0, 1.0, 0.0, 1.0] and len(s.engine.requests) == SAMPLES


def test_rewards_may_be_asked_for_by_plug_ins(stage: MakeStage) -> None:
    async def rollout(args: Namespace, rollout_id: int, data_source: Any, *, evaluation: bool = False) -> Any:
        first, second = [[answered(s.index or 0) for s in g] for g in data_source.get_samples(2)]
        for sample in first:
            sample.reward = await async_rm(args, sample)
        assert await batched_async_rm(args, second, inplace_set_reward_field=True) is None
        return [first, second]

    assert stage(rollout_function=rollout).rollout().shards[0].raw_reward == [0.0, 1.0, 0.0, 1.0]


def test_group_rm_with_several_samples_of_one_prompt(stage: MakeStage) -> None:
    """All samples of the group are scored in one call."""
    sizes: list[int] = []

    async def twice(args: Namespace, sample: Sample, sampling_params: Any) -> list[Sample]:
        return [answered(sample.index or 0), answered(10 + (sample.index or 0))]

    async def score(args: Namespace, samples: list[Sample]) -> list[float]:
        sizes.append(len(samples))
        return [float(s.index or 0) for s in samples]

    batch = stage("--group-rm", custom_generate_function=twice, custom_rm=score).rollout().shards[0]
    assert sizes == [4, 4] and batch.raw_reward == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 3.0, 13.0]


class Judge:
    async def score(self, args: Namespace, sample: Sample) -> float:
        return 3.0

    @staticmethod
    def keep(args: Namespace, samples: list[Sample], **kwargs: Any) -> bool:
        return True


async def scaled(factor: float, args: Namespace, sample: Sample) -> float:
    return factor


judge = Judge()
double = partial(scaled, 2.0)


@pytest.mark.parametrize(("name", "reward"), [("judge.score", 3.0), ("double", 2.0)])
def test_bound_methods_and_partials_are_functions(name: str, reward: float, stage: MakeStage) -> None:
    assert stage(custom_rm=f"{__file__}:{name}").rollout().shards[0].raw_reward == [reward] * SAMPLES


def test_a_static_method_is_a_function(stage: MakeStage) -> None:
    assert stage(dynamic_sampling_filter=f"{__file__}:Judge.keep").rollout().samples == SAMPLES


def test_a_decorated_coroutine_function_is_awaited(stage: MakeStage) -> None:
    """A wrapper that is not `async` itself, but returns what it wraps."""

    async def inner(args: Namespace, sample: Sample) -> float:
        await asyncio.sleep(0)
        return 4.0

    def wrapper(args: Namespace, sample: Sample) -> Any:
        return inner(args, sample)

    assert stage(custom_rm=wrapper).rollout().shards[0].raw_reward == [4.0] * SAMPLES
