"""Published adapters between the two calling conventions of rollout and generate functions.

A run binds its plug-ins through `miles.hooks`, which recognises more forms and guards every call; this is what code
that loads and calls such functions itself imports.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from miles.hooks import load_function
from miles.rollout.base_types import call_rollout_fn
from miles.rollout.loop_thread import run
from miles.types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnInput,
    RolloutFnOutput,
)

__all__ = [
    "LegacyGenerateFnAdapter",
    "LegacyRolloutFnAdapter",
    "call_rollout_function",
    "load_generate_function",
    "load_rollout_function",
]


class LegacyRolloutFnAdapter:
    """A rollout function in the place of a rollout class: `fn(args, rollout_id, data_source, evaluation=...)`."""

    def __init__(self, input: RolloutFnConstructorInput, fn: Callable[..., Any]) -> None:
        self.args, self.data_source, self.fn = input.args, input.data_source, fn

    def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:
        given = (self.args, input.rollout_id, self.data_source)
        if not _binds(self.fn, *given, evaluation=input.evaluation):
            given = given[:2]
        return call_rollout_fn(self.fn, *given, evaluation=input.evaluation)


def load_rollout_function(input: RolloutFnConstructorInput, path: str) -> Any:
    """What `path` names, ready to be called with a RolloutFnInput: an instance of a class, or an adapter."""
    fn = load_function(path)
    return fn(input) if inspect.isclass(fn) else LegacyRolloutFnAdapter(input, fn)


def call_rollout_function(fn: Callable[[RolloutFnInput], Any], input: RolloutFnInput) -> RolloutFnOutput:
    """Call what `load_rollout_function` returned; a coroutine is run on the shared event loop."""
    output = fn(input)
    return run(output) if inspect.iscoroutine(output) else output


class LegacyGenerateFnAdapter:
    """A generate function of three arguments in the place of one that takes a GenerateFnInput."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._takes_evaluation = "evaluation" in inspect.signature(fn).parameters

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        extra = {"evaluation": input.evaluation} if self._takes_evaluation else {}
        output = self.fn(input.args, input.sample, input.sampling_params, **extra)
        if inspect.isawaitable(output):
            output = await output
        return output if isinstance(output, GenerateFnOutput) else GenerateFnOutput(samples=output)


def load_generate_function(path: str | None) -> Any:
    """What `path` names, ready to be awaited with a GenerateFnInput; None for None."""
    fn = load_function(path)
    if fn is None:
        return None
    if inspect.isclass(fn):
        return fn()
    names = list(inspect.signature(fn).parameters) if inspect.isroutine(fn) else []
    return LegacyGenerateFnAdapter(fn) if len(names) >= 3 and names[0] != "input" else fn


def _binds(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True
