"""Rollout and generate functions in every form, for runs that use them; each notes how it was called."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn
from miles.rollout.sglang_rollout import eval_rollout, generate, generate_rollout, generate_rollout_async
from miles.types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnInput,
    RolloutFnTrainOutput,
    Sample,
)

seen: list[str] = []


def note(what: str, evaluation: bool) -> None:
    seen.append(f"{what} {'eval' if evaluation else 'train'}")


# ---- rollout functions ---------------------------------------------------------------------------------------------

sources: dict[int, Any] = {}


def sync(args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False) -> Any:
    note("sync", evaluation)
    output = generate_rollout(args, rollout_id, data_buffer, evaluation)
    return output.data if evaluation else output.samples  # raw values are wrapped


async def with_source(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    note("with_source", evaluation)
    if evaluation:
        return (await eval_rollout(args, rollout_id))[0]
    output, aborted = await generate_rollout_async(args, rollout_id, data_source.get_samples)
    data_source.add_samples(aborted)
    return output


async def guide(args: Namespace, rollout_id: int, *, evaluation: bool = False) -> Any:
    """The form of the guide has no data source: it brings its own."""
    note("guide", evaluation)
    if evaluation:
        return (await eval_rollout(args, rollout_id))[0]
    from miles.rollout.data_source import RolloutDataSource

    source = sources.setdefault(id(args), RolloutDataSource(args))
    return (await generate_rollout_async(args, rollout_id, source.get_samples))[0]


class AsyncClass(InferenceRolloutFn):
    async def __call__(self, input: RolloutFnInput) -> Any:
        note("AsyncClass", input.evaluation)
        output = await super().__call__(input)
        output.metrics = {**(output.metrics or {}), "rollout/of_my_own": 7} if not input.evaluation else output.metrics
        return output


class SyncClass:
    """A synchronous class that scores what it makes up: no engine, no reward function."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = input.args, input.data_source

    def __call__(self, input: RolloutFnInput) -> Any:
        note("SyncClass", input.evaluation)
        if input.evaluation:
            return {"heldout": {"rewards": [1.0, 0.0]}}
        groups = self.data_source.get_samples(self.args.rollout_batch_size)
        for sample in (s for group in groups for s in group):
            sample.tokens, sample.response, sample.response_length = [14, 15, 1], "7<eos>", 2
            sample.reward, sample.status = float(sample.index % 2), "completed"
        return RolloutFnTrainOutput(samples=groups, metrics={"agent/made_up": len(groups)})


# ---- generate functions --------------------------------------------------------------------------------------------


async def three(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    seen.append("three")
    return await generate(args, sample, sampling_params)


async def four(args: Namespace, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    note("four", evaluation)
    return await generate(args, sample, sampling_params)


async def one_input(input: GenerateFnInput) -> GenerateFnOutput:
    note("one_input", input.evaluation)
    return GenerateFnOutput(samples=await generate(input.args, input.sample, input.sampling_params))


class OneInput:
    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        note("OneInput", input.evaluation)
        return GenerateFnOutput(samples=await generate(input.args, input.sample, input.sampling_params))


def threaded(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Synchronous: runs in a thread, from which it reaches the engine on the run's own loop."""
    from miles.rollout.loop_thread import run

    seen.append("threaded")
    return run(generate(args, sample, sampling_params))


async def several(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    """Two answers for each sample; the second has a reward already."""
    seen.append("several")
    other = copy.deepcopy(sample)
    made = [await generate(args, s, sampling_params) for s in (sample, other)]
    made[1].reward = 0.5
    return made


async def batch_or_single(args: Namespace, sample: Any, **kwargs: Any) -> Any:
    """A reward for samples that come alone (evaluation) and in lists."""
    if isinstance(sample, list):
        seen.append(f"scored {len(sample)}")
        return [float(s.index % 2) for s in sample]
    return 1.0


# ---- conversations -------------------------------------------------------------------------------------------------

SPECS = [{"type": "function", "function": {"name": "check", "parameters": {"type": "object", "properties": {}}}}]


async def check(name: str, params: dict[str, Any]) -> str:
    seen.append(f"checked {params['said']}")
    return "once more"


def masks_of_tools(args: Namespace, groups: list[list[Sample]]) -> None:
    """A sample filter that looks at what the conversations became."""
    for sample in (s for group in groups for s in group):
        sample.validate()
        turns = sample.response.split("once more")
        assert sample.loss_mask is not None
        seen.append(f"turns {len(turns)} masked {sample.loss_mask.count(0)}")
