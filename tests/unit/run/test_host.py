"""What a run finds out about the machine it shares."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from miles.run.host import BusyCores, crowding


@pytest.mark.parametrize(
    ("threads", "cores", "others", "warns"),
    [
        (2, 2, 0.0, False),
        (2, 2, 0.4, False),
        (2, 2, 1.0, True),
        (1, 2, 2.0, False),
        (4, 8, 3.9, False),
        (8, 8, 3.0, True),
        (2, 2, None, False),
    ],
)
def test_warns_only_where_threads_have_to_share(threads: int, cores: int, others: float | None, warns: bool) -> None:
    assert (crowding(threads, cores, others) is not None) == warns


def test_the_warning_says_what_to_do() -> None:
    assert "OMP_NUM_THREADS=5" in str(crowding(8, 8, 3.0))
    assert "OMP_NUM_THREADS=1" in str(crowding(2, 2, 7.0))


def test_other_processes_are_seen_and_the_own_is_not_counted() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    other = subprocess.Popen(spin)
    try:
        cores = BusyCores()
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            pass
        seen = cores.others()
    finally:
        other.kill()
        other.wait()
    assert seen is not None and seen > 0.3
