"""Hooks of the plug points that are more than a call: an object, a reducer, a generate function, an agent."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

from miles.hooks.call import FAILURES, Hook, raise_if_passing
from miles.hooks.limits import limited
from miles.hooks.values import scalar_problem
from miles.types import Sample


class ObjectHook(Hook):
    """A plug point that makes an object once: the data source. Its methods are called through `enter`.

    Making it has no time limit: it may read any amount of data.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        limit, self.timeout_s = self.timeout_s, None
        try:
            self.state_holder = super().__call__(*args, **kwargs)
        finally:
            self.timeout_s = limit
        return self.state_holder


class ReducerHook(Hook):
    """The reducer of the policy loss: what it returns is a function of the user's, too, and is called with its errors
    told."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reducer = super().__call__(*args, **kwargs)

        def reduce(values: Any) -> Any:
            try:
                value, _ = limited(self, reducer, (values,), {})
            except FAILURES as error:
                raise_if_passing(error)
                self._guard.report(self.failed(error, args, kwargs, call="method"), self.stats)
                raise
            problem = scalar_problem(value)
            if problem is not None:
                self.reject(problem, *args)
            return value

        return reduce


class GenerateHook(Hook):
    """The generate function: a failed attempt leaves the sample as it was, so that a retry starts anew."""

    async def _limited(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Any) -> Any:
        attributes = vars(args[0].sample)
        before = {k: copy.copy(v) if isinstance(v, _CHANGED_IN_PLACE) else v for k, v in attributes.items()}
        try:
            return await super()._limited(call, args, kwargs)
        except FAILURES:
            attributes.clear()
            attributes.update(before)
            raise


_CHANGED_IN_PLACE = (list, dict, Sample.SpecInfo, Sample.PrefixCacheInfo)


class AgentHook(Hook):
    """The agent: every attempt has a session of its own, so that a retry does not go on with what a failed one said.

    `base_url` is the address, or an async function that opens a session and returns its address.
    """

    async def _limited(self, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Any) -> Any:
        base_url = kwargs["base_url"]
        if callable(base_url):
            kwargs = {**kwargs, "base_url": await base_url()}
        return await super()._limited(call, args, kwargs)
