"""The published adapters between function and class forms."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest

from miles.hooks import function_registry
from miles.rollout.inference_rollout.compatibility import (
    LegacyGenerateFnAdapter,
    LegacyRolloutFnAdapter,
    call_rollout_function,
    load_generate_function,
    load_rollout_function,
)
from miles.types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
)

ARGS = Namespace(word="said")
GIVEN = RolloutFnConstructorInput(args=ARGS, data_source="the source")


def published(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    return {"set": {"rewards": [rollout_id]}} if evaluation else [[args.word, rollout_id, data_source]]


async def guide(args: Namespace, rollout_id: int, *, evaluation: bool = False) -> Any:
    await asyncio.sleep(0)
    return published(args, rollout_id, None, evaluation)


class Wrapped:
    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.given = input

    async def __call__(self, input: RolloutFnInput) -> Any:
        return RolloutFnTrainOutput(samples=[[self.given.data_source, input.rollout_id]])  # type: ignore[list-item]


class Plain(Wrapped):
    def __call__(self, input: RolloutFnInput) -> Any:  # type: ignore[override]
        return RolloutFnEvalOutput(data={"set": {"rewards": [input.evaluation]}})


def loaded(fn: Any) -> Any:
    with function_registry.temporary("test:fn", fn):
        return load_rollout_function(GIVEN, "test:fn")


def test_functions_are_adapted() -> None:
    fn = loaded(published)
    assert isinstance(fn, LegacyRolloutFnAdapter)
    assert (fn.args, fn.data_source, fn.fn) == (ARGS, "the source", published)
    train = call_rollout_function(fn, RolloutFnTrainInput(3))
    assert train == RolloutFnTrainOutput(samples=[["said", 3, "the source"]], metrics=None)
    assert call_rollout_function(fn, RolloutFnEvalInput(4)) == RolloutFnEvalOutput(data={"set": {"rewards": [4]}})


def test_the_form_of_the_guide_is_awaited() -> None:
    output = call_rollout_function(loaded(guide), RolloutFnTrainInput(3))
    assert output == RolloutFnTrainOutput(samples=[["said", 3, None]])


@pytest.mark.parametrize(
    ("cls", "input", "expected"),
    [
        (Wrapped, RolloutFnTrainInput(5), RolloutFnTrainOutput(samples=[["the source", 5]])),
        (Plain, RolloutFnEvalInput(5), RolloutFnEvalOutput(data={"set": {"rewards": [True]}})),
    ],
)
def test_classes_are_built_with_their_one_input(cls: Any, input: RolloutFnInput, expected: Any) -> None:
    assert call_rollout_function(loaded(cls), input) == expected


# ---- generate ------------------------------------------------------------------------------------------------------


async def three(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.response = f"{args.word} {sampling_params['temperature']}"
    return sample


async def with_evaluation(args: Namespace, sample: Sample, sampling_params: Any, evaluation: bool = False) -> Any:
    return [Sample(response=f"evaluation={evaluation}")]


def synchronous(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> GenerateFnOutput:
    return GenerateFnOutput(samples=Sample(response="sync"))


async def one_input(input: GenerateFnInput) -> GenerateFnOutput:
    return GenerateFnOutput(samples=Sample(response=f"input {input.args.word}"))


class OneInput:
    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        return await one_input(input)


@pytest.mark.parametrize(
    ("fn", "adapted", "response"),
    [
        (three, True, "said 0.5"),
        (with_evaluation, True, "evaluation=True"),
        (synchronous, True, "sync"),
        (one_input, False, "input said"),
        (OneInput, False, "input said"),
    ],
)
def test_generate_functions(fn: Any, adapted: bool, response: str) -> None:
    with function_registry.temporary("test:fn", fn):
        generate = load_generate_function("test:fn")
    assert isinstance(generate, LegacyGenerateFnAdapter) == adapted
    given = GenerateFnInput(Namespace(args=ARGS), Sample(), {"temperature": 0.5}, True)
    output = asyncio.run(generate(given))
    assert isinstance(output, GenerateFnOutput)
    made = output.samples[0] if isinstance(output.samples, list) else output.samples
    assert made.response == response


def test_no_path_is_no_function() -> None:
    assert load_generate_function(None) is None
