"""For all tests: signals as a terminal delivers them, and which tests share a process when several run them.

A shell that starts the tests in the background has them ignore SIGINT, and every process they start inherits that.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """The tests of a file stay together, because they share what is costly to set up; so do those of all plug points,
    the last of which asks what the others have called, and those with several ranks, which fill all cores alone."""
    file = item.path.relative_to(HERE)
    group = file.parts[0] if file.parts[0] in ("hooks", "parallel") else str(file)
    item.add_marker(pytest.mark.xdist_group(group))
