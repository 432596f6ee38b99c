"""Published import path of a small helper: something to do when a block or a function ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["with_defer"]


@contextmanager
def with_defer(deferred_func: Callable[[], Any]) -> Iterator[None]:
    """`with with_defer(f):` or `@with_defer(f)`: calls `f()` at the end, also when it ends with an exception."""
    try:
        yield
    finally:
        deferred_func()
