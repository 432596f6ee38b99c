"""The one door into plug-in code: `Hook`. Every call of every plug-in is timed, counted and guarded here.

    core ── hook(...) ──► adapter ──► the user's function
              │ returns: value checked by the adapter
              │ raises, returns nonsense, or takes too long: retries, then `guard.report`
              ▼
         value | Failure | HookError

KeyboardInterrupt, the cancellation of the caller's own task and miles' own errors (UsageError, a nested HookError) pass
untouched. A plug-in that calls `sys.exit`, or lets a cancellation of its own tasks out, has failed like any other.
One call may take `--hook-timeout-s` seconds; what does not await is interrupted by the watchdog (`limits`, `watchdog`).
Synchronous plug points: `hook(...)`, inline. Awaited ones: `await hook.call_async(...)`. A rollout function, which may
be either, has `build` once and then `run` or `call_async`.
"""

from __future__ import annotations

import asyncio
import inspect
from argparse import Namespace
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from time import perf_counter
from types import CoroutineType
from typing import Any, NoReturn, TypeVar

from miles.errors import EngineError
from miles.hooks.adapt import is_async
from miles.hooks.adapted import Adapted
from miles.hooks.adapters import rollout_output
from miles.hooks.blame import innermost
from miles.hooks.card import FailedCall, first_sample
from miles.hooks.guard import Guard, passes
from miles.hooks.limits import Interrupted, TookTooLong, limited
from miles.hooks.point import PlugPoint, Policy
from miles.hooks.source import Source, is_built_in
from miles.hooks.stats import HookStats
from miles.hooks.threads import Threads
from miles.hooks.values import BadReturn, reward_problem
from miles.tasks import gather_or_cancel
from miles.types import (
    DynamicFilterOutput,
    Failure,
    RolloutFnConstructorInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnTrainOutput,
    Sample,
)

# Seconds before the first retry of an awaited call; doubled each time up to the limit. Inline calls retry at once.
RETRY_DELAY_S = 0.1
MAX_RETRY_DELAY_S = 5.0

T = TypeVar("T")

# What a call may raise that counts as its failure; `passes` tells what among it does not.
FAILURES = (Exception, SystemExit, BaseExceptionGroup)

# What the core receives when a failed call is dropped. Awaited plug points return the Failure itself.
_DROPPED: dict[str, Any] = {
    "dynamic_sampling_filter": DynamicFilterOutput(keep=False, reason="filter_failed"),
    "custom_rollout_log_function": False,
    "custom_eval_rollout_log_function": False,
}


class Hook:
    """One bound plug-in.

    Example: `hook.point.flag == "--custom-rm-path"`, `hook.path == "my.rewards.grade"`, `hook.form == "sample"`,
    `hook.stats == HookStats(calls=32, ...)`; `hook.target` is what the path names: a function, class or object.
    """

    def __init__(
        self,
        point: PlugPoint,
        path: str,
        target: Any,
        form: str,
        source: Source,
        adapted: Adapted,
        guard: Guard,
        policy: Policy,
        timeout_s: float | None,
    ) -> None:
        self.point, self.path, self.target, self.form, self.source = point, path, target, form, source
        self.policy, self.timeout_s = policy, timeout_s
        self.stats = HookStats()
        # What is asked for `state_dict`: the object that a class was made into, the one that a method belongs to, or
        # the plug-in itself; None before a rollout class or a data source is built.
        self.state_holder: Any = None
        # Whether the calls leave the event loop: a synchronous function at an awaited plug point.
        self.in_thread = False
        self._adapted, self._guard = adapted, guard
        self._call = adapted.call
        self.__name__ = point.name

    @property
    def is_built_in(self) -> bool:
        """Whether the plug-in is one of miles itself: a default, or another that a flag names."""
        return self.source.file is not None and is_built_in(self.source.file)

    def raw(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted call without the door, for `miles replay`: errors fly. Awaited plug points give a coroutine."""
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Hook({self.point.flag} {self.path}, form {self.form})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The canonical call of a synchronous plug point."""
        begin = perf_counter()
        try:
            value, seconds = limited(self, self._call, args, kwargs)
            if type(value) is CoroutineType:
                value = _refuse(value)
        except FAILURES as error:
            return self._recover(error, args, kwargs, begin)
        self.stats.rollout.add(seconds)
        return value

    def _recover(self, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any], begin: float) -> Any:
        """Retry, then report; what the core receives instead of a value."""
        try:
            for _ in range(self.policy.retries):
                raise_if_passing(error)
                try:
                    value, _ = limited(self, self._call, args, kwargs)
                    return _refuse(value) if type(value) is CoroutineType else value
                except FAILURES as again:
                    error = again
            raise_if_passing(error)
            self._guard.report(self.failed(error, args, kwargs), self.stats)
            return _DROPPED.get(self.point.name)
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    async def call_async(self, *args: Any, **kwargs: Any) -> Any:
        """The canonical call of an awaited plug point. A tolerated failure is returned as a `Failure`."""
        begin = perf_counter()
        try:
            return await self._attempts(self._call, args, kwargs)
        except FAILURES as error:
            raise_if_passing(error)
            return self._guard.report(self.failed(error, args, kwargs), self.stats)
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    async def _attempts(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Any) -> Any:
        delay = RETRY_DELAY_S
        for _ in range(self.policy.retries):
            try:
                return await self._limited(call, args, kwargs)
            except FAILURES as error:
                raise_if_passing(error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_DELAY_S)
        return await self._limited(call, args, kwargs)

    async def _limited(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Any) -> Any:
        """One attempt under the time limit. The watchdog reads `self`, `args` and `kwargs` of this frame."""
        if self._guard.over is not None:
            raise self._guard.over
        scope = asyncio.timeout(self.timeout_s)
        try:
            async with scope:
                return await call(*args, **kwargs)
        except TimeoutError as error:
            if scope.expired():
                raise TookTooLong from error
            raise
        except Interrupted as error:
            raise TookTooLong from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise OwnTaskCancelled from error

    def enter(self, method: Callable[..., T], *args: Any) -> T:
        """One call of a method of `state_holder`: `hook.enter(source.get_samples, 16)`. Raises HookError."""
        begin = perf_counter()
        try:
            value: T = limited(self, method, args, {})[0]
            return value
        except FAILURES as error:
            raise_if_passing(error)
            self._guard.report(self.failed(error, args, {}, call="method"), self.stats)
            raise
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    @property
    def has_state(self) -> bool:
        """Whether checkpoints hold something of this plug-in."""
        return callable(getattr(self.state_holder, "state_dict", None))

    def save_state(self) -> Any:
        """What `state_dict` of the plug-in says. Raises HookError."""
        return self.enter(self.state_holder.state_dict)

    def load_state(self, state: Any) -> None:
        """Hand `state` to `load_state_dict` of the plug-in. Raises HookError."""
        self.enter(self.state_holder.load_state_dict, state)

    def reject(self, problem: BadReturn, *given: Any, sample: Sample | None = None) -> NoReturn:
        """What a later step found wrong with a value of this plug-in: HookError, with the card of a failed call."""
        call = "call" if given else "method"
        failed = replace(self.failed(problem, given, {}, call=call, sample=sample), policy=Policy())
        self._guard.report(failed, self.stats)
        raise AssertionError("the policy is raise")

    def failed(
        self, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any], *, call: str = "call",
        sample: Sample | None = None,
    ) -> FailedCall:  # fmt: skip
        if isinstance(error, OwnTaskCancelled) and error.__cause__ is not None:
            error = error.__cause__
        in_time = innermost(error, Interrupted) is None and not isinstance(error, TookTooLong)
        return FailedCall(
            point=self.point,
            path=self.path,
            form=self.form,
            source=self.source,
            policy=self.policy,
            error=error,
            inputs=(args, kwargs),
            call=call,
            sample=sample or first_sample((*args, *kwargs.values())),
            timeout_s=None if in_time else self.timeout_s,
        )


class OwnTaskCancelled(Exception):
    """A CancelledError that nobody but the plug-in has caused; it is the cause."""


class RewardHook(Hook):
    """The reward: values are checked, one sample or several at once."""

    async def call_async(self, args: Namespace, sample: Sample) -> Any:
        """The reward of one sample, or a Failure: never None, NaN or a number that was not returned."""
        return await self._scored(args, sample)

    async def _scored(self, args: Namespace, sample: Sample) -> Any:
        begin = perf_counter()
        try:
            return await self._attempts(self._checked, (args, sample), {})
        except FAILURES as error:
            raise_if_passing(error)
            return self._guard.report(self.failed(error, (args, sample), {}, sample=sample), self.stats)
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    async def _checked(self, args: Namespace, sample: Sample) -> Any:
        value = await self._call(args, sample)
        problem = reward_problem(value, args)
        if problem is not None:
            raise problem
        return value

    def raw(self, args: Namespace, sample: Sample) -> Any:
        return self._checked(args, sample)

    async def raw_batch(self, args: Namespace, samples: list[Sample]) -> list[Any]:
        """`raw` for several samples. Raises the first BadReturn."""
        try:
            if self._adapted.batch is None:
                return [await self._checked(args, sample) for sample in samples]
            return await self._checked_batch(args, samples)
        except BadEntries as error:
            raise next(e for e in error.entries if isinstance(e, BadReturn)) from None

    async def call_batch_async(self, args: Namespace, samples: list[Sample]) -> list[Any]:
        """One reward or Failure per sample, in order. Functions that take one sample run concurrently."""
        if not samples:
            return []
        if self._adapted.batch is None:
            return await gather_or_cancel([self._scored(args, sample) for sample in samples])
        begin = perf_counter()
        try:
            return list(await self._attempts(self._checked_batch, (args, samples), {}))
        except BadEntries as error:
            return self._entries(error, args, samples)
        except FAILURES as error:
            raise_if_passing(error)
            failed = self.failed(error, (args, samples), {}, call="batch", sample=samples[0])
            failure = self._guard.report(failed, self.stats, count=len(samples))
            return [_of_sample(failure, sample) for sample in samples]
        finally:
            self.stats.rollout.add(perf_counter() - begin, len(samples))

    async def _checked_batch(self, args: Namespace, samples: list[Sample]) -> list[Any]:
        assert self._adapted.batch is not None
        values: list[Any] = await self._adapted.batch(args, samples)
        problems = [reward_problem(value, args) for value in values]
        if any(p is not None for p in problems):
            raise BadEntries([p or value for p, value in zip(problems, values, strict=True)])
        return values

    def _entries(self, error: BadEntries, args: Namespace, samples: list[Sample]) -> list[Any]:
        """The good values of a batch, and a Failure for each bad one."""
        entries: list[Any] = []
        for value, sample in zip(error.entries, samples, strict=True):
            if isinstance(value, BadReturn):
                failed = self.failed(value, (args, samples), {}, call="batch", sample=sample)
                value = self._guard.report(failed, self.stats)
            entries.append(value)
        return entries


class BadEntries(Exception):
    """Some scores of a batch cannot be used: `entries` holds a BadReturn in the place of each."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries
        super().__init__("some rewards of the batch cannot be used")


def _of_sample(failure: Failure, sample: Sample) -> Failure:
    return Failure(**{**vars(failure), "sample_index": sample.index})


class RolloutHook(Hook):
    """A rollout or evaluation function: `build` once, then `run` (synchronous) or `call_async` per rollout."""

    def __init__(self, *args: Any, threads: Threads | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threads = threads

    def build(self, given: RolloutFnConstructorInput) -> Any:
        """The object that is called once per rollout: an instance of the class, or a stand-in for the function."""
        assert self._adapted.build is not None
        try:
            built = self._adapted.build(given)
        except FAILURES as error:
            raise_if_passing(error)
            self._guard.report(self.failed(error, (given,), {}, call="build"), self.stats)
            raise
        if self.form == "class":
            self.state_holder = built
        return built

    def run(
        self, obj: Any, input: RolloutFnInput, runner: Callable[[Coroutine[Any, Any, Any]], Any]
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        """One rollout, inline; `runner` runs the coroutine of an `async def` one (on the event-loop thread)."""

        def call(obj: Any, input: RolloutFnInput) -> Any:
            value = obj(input)
            return rollout_output(runner(_awaited(value)) if inspect.isawaitable(value) else value, input)

        begin = perf_counter()
        try:
            output: RolloutFnTrainOutput | RolloutFnEvalOutput = call(obj, input)
            return output
        except FAILURES as error:
            self.raise_if_passing(error)
            self._guard.report(self.failed(error, (input,), {}), self.stats)
            raise
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    async def call_async(self, obj: Any, input: RolloutFnInput) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        """One rollout from inside an event loop. A synchronous function runs in a thread: it may wait for this loop."""
        begin = perf_counter()
        try:
            if self._threads is None or is_async(self.target) or is_async(obj):
                value = obj(input)
            else:
                value = await self._threads.run(obj, input)
            return rollout_output(await value if inspect.isawaitable(value) else value, input)
        except FAILURES as error:
            self.raise_if_passing(error)
            self._guard.report(self.failed(error, (input,), {}), self.stats)
            raise
        finally:
            self.stats.rollout.add(perf_counter() - begin)

    def raise_if_passing(self, error: BaseException) -> None:
        """What an engine says to the built-in functions is no plug-in's fault; it says itself what is wrong."""
        raise_if_passing(error)
        if isinstance(error, EngineError) and self.is_built_in:
            raise error


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def raise_if_passing(error: BaseException) -> None:
    untouched = passes(error)
    if untouched is not None:
        raise untouched


def _refuse(coroutine: Any) -> Any:
    coroutine.close()
    raise BadReturn("type", "returned a coroutine, but this plug point is called synchronously", "write `def`")
