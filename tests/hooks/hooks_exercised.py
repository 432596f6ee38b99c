"""Which forms of which plug points the tests have really called, noted at the adapters; `conftest` fills it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from miles.hooks.adapted import Adapted
from miles.hooks.point import Form, PlugPoint

# (test file without .py, plug point, form)
EXERCISED: set[tuple[str, str, str]] = set()

Adapt = Callable[..., Adapted]


def noting(adapt: Adapt, test_file: str) -> Adapt:
    """`adapt`, whose results note their calls under `test_file`."""

    def adapted(point: PlugPoint, callee: Any, form: Form, *more: Any) -> Adapted:
        made = adapt(point, callee, form, *more)

        def noted(fn: Callable[..., Any] | None) -> Any:
            if fn is None:
                return None

            @functools.wraps(fn)
            def call(*args: Any, **kwargs: Any) -> Any:
                EXERCISED.add((test_file, point.name, form.name))
                return fn(*args, **kwargs)

            return call

        return replace(made, call=noted(made.call), batch=noted(made.batch), build=noted(made.build))

    return adapted


COLLECTED = pytest.StashKey[Counter[str]]()
"""Tests per file before -k and -m choose among them."""
