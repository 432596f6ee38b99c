"""Published path of what rollout and generate functions take and return; the types live in `miles.types`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from miles.rollout.loop_thread import run
from miles.types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnBaseInput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)

__all__ = [
    "GenerateFnInput",
    "GenerateFnOutput",
    "RolloutFnBaseInput",
    "RolloutFnConstructorInput",
    "RolloutFnEvalInput",
    "RolloutFnEvalOutput",
    "RolloutFnInput",
    "RolloutFnOutput",
    "RolloutFnTrainInput",
    "RolloutFnTrainOutput",
    "call_rollout_fn",
]


def call_rollout_fn(fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any) -> RolloutFnOutput:
    """Call a rollout function of the published form and wrap what is not wrapped yet.

    `evaluation` decides the wrapper; an awaitable result is awaited on the shared event loop.
    """
    output = fn(*args, **kwargs, evaluation=evaluation)
    if inspect.iscoroutine(output):
        output = run(output)
    if isinstance(output, RolloutFnTrainOutput | RolloutFnEvalOutput):
        return output
    return RolloutFnEvalOutput(data=output) if evaluation else RolloutFnTrainOutput(samples=output)
