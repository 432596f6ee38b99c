"""Fixtures of the plug-point tests: stages, a time limit for each test, a note of every form that is called."""

from __future__ import annotations

import importlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hooks_exercised import COLLECTED, noting
from hooks_stage import Stage

import miles.hooks.call

# No test of this folder needs a tenth of it; a plug-in that hangs the test has hung the run.
LIMIT_S = 60


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is told about all tests of this folder is asked after them."""
    config.stash[COLLECTED] = Counter(item.path.stem for item in items)
    items.sort(key=lambda item: item.path.stem == "test_catalogue_is_tested")


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    def expire(*_: object) -> None:
        raise TimeoutError(f"the test took longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _note_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = importlib.import_module("miles.hooks.bind")  # the package has a function of that name
    monkeypatch.setattr(binding, "adapt", noting(binding.adapt, request.path.stem))


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of awaited plug points follow at once."""
    monkeypatch.setattr(miles.hooks.call, "RETRY_DELAY_S", 0.0)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """`stage("--group-rm", custom_rm=fn)`: an open Stage. The next one, or the test's end, closes it."""
    with ExitStack() as stack:

        def make(*flags: object, **plug_ins: Any) -> Stage:
            stack.close()
            folder = tmp_path / f"stage{len(list(tmp_path.glob('stage*')))}"
            folder.mkdir()
            return stack.enter_context(Stage(folder, flags, **plug_ins))

        yield make
