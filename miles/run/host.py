"""What a training process does to its own process before the heavy work: allocator and collector."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path

# mallopt(3): sizes from which glibc maps fresh pages for each block, and free memory from which it returns pages.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BELOW_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: a training step frees and takes the same buffers again and again.

    By default each tensor above 128 KiB is a fresh mapping whose pages the kernel must clear on first touch, which
    costs a small model a tenth of its step. Does nothing where the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, KEEP_BELOW_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BELOW_BYTES)


def memory_environment() -> dict[str, str]:
    """`keep_freed_memory` for processes that are yet to start: glibc reads these."""
    return {"MALLOC_TRIM_THRESHOLD_": str(KEEP_BELOW_BYTES), "MALLOC_MMAP_THRESHOLD_": str(KEEP_BELOW_BYTES)}


def forget_imports() -> None:
    """Exempt everything that exists from garbage collection: what imports left is never garbage.

    Without it every full collection walks through a few hundred thousand such objects: a tenth of a second each.
    """
    gc.freeze()


class BusyCores:
    """How many cores other programs kept busy since this was made. None where the system does not tell (not Linux)."""

    def __init__(self) -> None:
        self._start = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """(wall, busy seconds of all cores, CPU seconds of this process)."""
        try:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, _PROC_STAT.read_text().split()[1:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def others(self) -> float | None:
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now))
        return max(0.0, busy - own) / wall if wall > 0 else None


_PROC_STAT = Path("/proc/stat")


def crowding(threads: int, cores: int, others: float | None) -> str | None:
    """A warning where the cores that are left are fewer than the threads that compute; None otherwise.

    OpenMP's threads wait for each other after every operation, so one that has to share its core holds up all: a
    small model then trains ten times slower, with nothing to see but slowness.
    """
    if others is None or threads < 2 or threads + others < cores + CROWDED_BY:
        return None
    free = max(1, int(cores - others + CROWDED_BY))
    return (
        f"other programs keep {others:.1f} of {cores} cores busy while PyTorch computes with {threads} threads, which "
        f"can make it many times slower. End them, or start with OMP_NUM_THREADS={free}"
    )


# Cores' worth of other work that does not matter yet.
CROWDED_BY = 0.5
