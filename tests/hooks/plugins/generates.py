"""Generate functions in every form, and failing ones."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from miles.types import GenerateFnInput, GenerateFnOutput, Sample


async def three(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.response = f"{args.word} {sampling_params['temperature']}"
    return sample


async def with_evaluation(args, sample, sampling_params, evaluation=False):
    sample.response = f"evaluation={evaluation}"
    return sample


async def with_kwargs(args, sample, sampling_params, **kwargs):
    sample.response = f"kwargs={sorted(kwargs)}"
    return sample


async def one_input(input: GenerateFnInput) -> GenerateFnOutput:
    input.sample.response = f"input {input.args.word}"
    return GenerateFnOutput(samples=input.sample)


class OneInput:
    async def __call__(self, input):
        input.sample.response = "object"
        return GenerateFnOutput(samples=input.sample)


class ThreeArguments:
    async def __call__(self, args, sample, sampling_params):
        sample.response = "object of three"
        return sample


def synchronous(args, sample, sampling_params):
    sample.response = "thread"
    return sample


async def several(args, sample, sampling_params):
    return [copy.deepcopy(sample), copy.deepcopy(sample)]


async def raw_from_input(input):
    return [input.sample]


async def nothing(args, sample, sampling_params):
    sample.response = "lost"


async def text(args, sample, sampling_params):
    return "text"


ATTEMPTS: list[tuple[str, int]] = []


async def half_done(args, sample, sampling_params):
    ATTEMPTS.append((sample.response, len(sample.tokens)))
    sample.response += "partial"
    sample.tokens.append(9)
    sample.metadata["turn"] = 1
    if len(ATTEMPTS) < 3:
        raise ConnectionError("engine is busy")
    return sample


async def two_arguments(args, sample):
    return sample


class NeedsArgument:
    def __init__(self, model):
        self.model = model
