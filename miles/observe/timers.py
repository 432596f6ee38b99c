"""Where the time of a process goes: named timers that add up until they are read and reset.

One `Timer` per process, so that plug-ins (`miles.utils.timer`) and the run add to the same one. Leaves the names of the
metrics to `metrics.timer_metrics`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, overload

F = TypeVar("F", bound=Callable[..., Any])


class _OnePerProcess(type):
    """Calling the class returns the same object each time."""

    def __call__(cls) -> Any:
        if "_instance" not in cls.__dict__:
            cls._instance = super().__call__()
        return cls._instance


class Timer(metaclass=_OnePerProcess):
    """Seconds per name, summed since the last `reset`. For one thread: a name runs once at a time (asserted).

    Example::

        with Timer().context("train"):
            ...
        Timer().log_dict()      # {"train": 0.21}
    """

    def __init__(self) -> None:
        self.timers: dict[str, float] = {}
        self.start_time: dict[str, float] = {}

    def start(self, name: str) -> None:
        assert name not in self.start_time, f"timer {name!r} is running already"
        self.start_time[name] = time.perf_counter()

    def end(self, name: str) -> None:
        assert name in self.start_time, f"timer {name!r} was not started"
        self.add(name, time.perf_counter() - self.start_time.pop(name))

    def reset(self, name: str | None = None) -> None:
        """Forget the sum of `name`, or all sums; running timers go on."""
        if name is None:
            self.timers = {}
        else:
            self.timers.pop(name, None)

    def add(self, name: str, elapsed_time: float) -> None:
        self.timers[name] = self.timers.get(name, 0.0) + elapsed_time

    def log_dict(self) -> dict[str, float]:
        """The sums of all finished timings, by name."""
        return dict(self.timers)

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Time the block, also when it raises."""
        self.start(name)
        try:
            yield
        finally:
            self.end(name)


@overload
def timer(name_or_func: str) -> AbstractContextManager[None]: ...
@overload
def timer(name_or_func: F) -> F: ...
def timer(name_or_func: str | Callable[..., Any]) -> Any:
    """`with timer("save"):` times a block; `@timer` times each call of a function under the function's name."""
    if isinstance(name_or_func, str):
        return Timer().context(name_or_func)
    function = name_or_func

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with Timer().context(function.__name__):
            return function(*args, **kwargs)

    return timed


@contextmanager
def inverse_timer(name: str) -> Iterator[None]:
    """Stop the running timer `name` for the block: what the block takes does not count."""
    Timer().end(name)
    try:
        yield
    finally:
        Timer().start(name)
