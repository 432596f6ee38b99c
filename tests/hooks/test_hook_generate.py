"""--custom-generate-function-path: every form, what comes back, and that a failed attempt leaves no trace."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import pytest
from hooks_helpers import bound, sample

from miles.errors import HookError
from miles.types import Failure, GenerateFnInput, GenerateFnOutput, Sample

ARGS = Namespace(word="said")


def given(evaluation: bool = False, **fields: Any) -> GenerateFnInput:
    return GenerateFnInput(Namespace(args=ARGS), sample(**fields), {"temperature": 0.5}, evaluation)


@pytest.mark.parametrize(
    ("name", "form", "response"),
    [
        ("three", "args-sample-params", "said 0.5"),
        ("with_evaluation", "args-sample-params", "evaluation=True"),
        ("with_kwargs", "args-sample-params", "kwargs=[]"),
        ("one_input", "input", "input said"),
        ("OneInput", "input", "object"),
        ("ThreeArguments", "args-sample-params", "object of three"),
        ("synchronous", "args-sample-params", "thread"),
        ("raw_from_input", "input", "4"),
    ],
)
def test_forms(name: str, form: str, response: str) -> None:
    hook = bound("custom_generate_function", f"generates:{name}")
    output = asyncio.run(hook.call_async(given(evaluation=True)))
    assert hook.form == form and isinstance(output, GenerateFnOutput)
    made = output.samples if isinstance(output.samples, Sample) else output.samples[0]
    assert made.response == response


def test_several_samples() -> None:
    output = asyncio.run(bound("custom_generate_function", "generates:several").call_async(given()))
    assert len(output.samples) == 2


@pytest.mark.parametrize(("name", "kind"), [("nothing", "none"), ("text", "type")])
def test_bad_returns(name: str, kind: str) -> None:
    with pytest.raises(HookError) as caught:
        asyncio.run(bound("custom_generate_function", f"generates:{name}").call_async(given()))
    assert caught.value.failure.kind == kind
    hook = bound("custom_generate_function", f"generates:{name}", policies={"custom-generate-function": "drop"})
    assert isinstance(asyncio.run(hook.call_async(given())), Failure)


def test_a_retry_starts_from_the_sample_as_it_was(no_delay: None) -> None:
    hook = bound("custom_generate_function", "generates:half_done", policies={"custom-generate-function": "retry:2"})
    attempts = hook.target.__globals__["ATTEMPTS"]
    attempts.clear()
    output = asyncio.run(hook.call_async(given(response="")))
    assert attempts == [("", 3)] * 3
    assert output.samples.response == "partial" and output.samples.tokens == [1, 2, 3, 9]


def test_a_dropped_sample_is_as_it_was() -> None:
    hook = bound("custom_generate_function", "generates:half_done", policies={"custom-generate-function": "drop"})
    hook.target.__globals__["ATTEMPTS"].clear()
    call = given(response="")
    before = sample(response="")
    assert isinstance(asyncio.run(hook.call_async(call)), Failure)
    assert call.sample == before
