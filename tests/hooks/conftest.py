"""Fixtures of the plug-point tests."""

from __future__ import annotations

import pytest

import miles.hooks.call


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of awaited plug points follow at once."""
    monkeypatch.setattr(miles.hooks.call, "RETRY_DELAY_S", 0.0)
