"""The class forms, as such plug-ins are written: options of their own, one input, an environment from a YAML file."""

from copy import deepcopy

from miles.rollout.base_types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
)
from miles.rollout.generate_hub.single_turn import generate as single_turn
from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn
from miles.utils.misc import load_function

BUILT = []
TURNS = []


class BranchRollout(InferenceRolloutFn):
    def __init__(self, input: RolloutFnConstructorInput):
        super().__init__(input)
        self.calls = 0
        BUILT.append(self)

    async def __call__(self, input):
        self.calls += 1
        result = await super().__call__(input)
        if input.evaluation:
            assert isinstance(result, RolloutFnEvalOutput)
        else:
            assert isinstance(result, RolloutFnTrainOutput)
        width = self.state.args.branch_width
        result.metrics = {**(result.metrics or {}), "agent/calls": self.calls, "agent/width": width}
        return result

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--branch-width", type=int, default=1)


class InteractiveGenerate:
    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--environment-noise", type=float, default=0.0)

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        environment = load_function(input.args.rollout_interaction_env_path)
        TURNS.append((input.args.max_turns, input.args.environment_noise, input.evaluation))
        output = await single_turn(input)
        output.samples.metadata["feedback"] = environment(deepcopy(input.args), output.samples)
        input.sampling_params["temperature"] = 123.0  # its own copy
        return output


def environment(args, sample):
    args.max_turns = -1  # a copy of its own
    return f"{sample.label}!"
