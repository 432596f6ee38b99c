"""Frames of other threads are read while no garbage collection can let those threads go on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from miles.hooks.limits import frames_at_rest

COLLECTS_WHEN_ALLOCATING = sys.version_info < (3, 12)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()


def test_collection_is_off_inside_and_as_before_outside() -> None:
    with frames_at_rest():
        assert gc.isenabled() == (not COLLECTS_WHEN_ALLOCATING)
        with frames_at_rest():
            pass
        assert gc.isenabled() == (not COLLECTS_WHEN_ALLOCATING)
    assert gc.isenabled()
    gc.disable()
    with frames_at_rest():
        pass
    assert not gc.isenabled()
