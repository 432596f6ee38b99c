"""A rollout that waits for every group, and tries again later what nobody solved.

    miles train --config examples/quickstart/carry.yaml \
        --rollout-function-path examples/plug_ins/rollout_function.py:generate_rollout

The built-in rollout stops as soon as enough groups are kept. This one generates exactly `--rollout-batch-size`
groups, and gives the prompts without a single right answer back to the data source, from where a later rollout takes
them.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import TYPE_CHECKING

from miles.rollout.sglang_rollout import GenerateState, eval_rollout, generate_and_rm_group
from miles.types import RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

if TYPE_CHECKING:
    from miles.rollout.data_source import DataSource


async def generate_rollout(
    args: Namespace, rollout_id: int, data_source: DataSource, *, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    if evaluation:
        output, _ = await eval_rollout(args, rollout_id)
        return output
    state = GenerateState(args)
    prompts = data_source.get_samples(args.rollout_batch_size)
    tasks = [generate_and_rm_group(args, group, dict(state.sampling_params)) for group in prompts]
    groups = await asyncio.gather(*tasks)
    unsolved = [group for group in groups if all(sample.get_reward_value(args) < 1 for sample in group)]
    data_source.add_samples([unanswered(group) for group in unsolved])
    return RolloutFnTrainOutput(samples=groups, metrics={"rollout/unsolved_groups": len(unsolved)})


def unanswered(group: list[Sample]) -> list[Sample]:
    """The same prompts without responses, with the number of attempts in their metadata."""
    attempts = group[0].metadata.get("attempts", 0) + 1
    return [
        Sample(
            group_index=sample.group_index,
            index=sample.index,
            prompt=sample.prompt,
            label=sample.label,
            metadata={**sample.metadata, "attempts": attempts},
        )
        for sample in group
    ]
