"""`InferenceRolloutFn`, the rollout function as a class, and the coroutines of one sample under published names."""

from __future__ import annotations

from miles.rollout.evaluate import DatasetCache, evaluate
from miles.rollout.inference_rollout.inference_rollout_train import generate_rollout_async
from miles.rollout.loop import give_back
from miles.rollout.sample import generate_and_rm, generate_and_rm_group
from miles.rollout.state import GenerateState, compute_sampling_params
from miles.types import RolloutFnConstructorInput, RolloutFnInput, RolloutFnOutput

__all__ = [
    "GenerateState",
    "InferenceRolloutFn",
    "compute_sampling_params",
    "generate_and_rm",
    "generate_and_rm_group",
]


class InferenceRolloutFn:
    """The default rollout, one object per path: training and evaluation have a state each."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.data_source = input.data_source
        self.state = GenerateState(input.args)
        self.eval_prompt_dataset_cache: DatasetCache = {}

    async def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:
        if input.evaluation:
            return await evaluate(self.state, self.eval_prompt_dataset_cache)
        output, aborted = await generate_rollout_async(self.state, input.rollout_id, self.data_source.get_samples)
        give_back(self.state, self.data_source.add_samples, aborted)
        return output
