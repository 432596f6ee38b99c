"""Fixtures of the tests with published plug-ins."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.rollout import context
from miles.rollout.singleton import SingletonMeta

PLUG_INS = Path(__file__).parent / "plug_ins"


@pytest.fixture(autouse=True)
def published_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the plug-ins on the import path; nothing of this test is left for the next one."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.syspath_prepend(str(PLUG_INS))
    yield
    for module in [name for name in list(sys.modules) if (PLUG_INS / f"{name}.py").exists()]:
        del sys.modules[module]
    SingletonMeta.clear_all_instances()
    context.install(None)
