"""The processes that write a checkpoint's files, as far as Megatron leaves it to us: how they report, and how they end.

    rank ── fork ──► writer (for --async-save; else the rank itself) ── fork ──► one process per file
    rank ◄── `Reports` ── writer

Megatron lets writers report through a server process, which would stay behind where a rank is killed; here it is a
file without a name. And a writer whose rank is gone ends at once: what it would finish is no checkpoint any more, and
as long as it lives the driver would not notice that the rank is gone.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from miles.weights.shared_memory import anonymous_file

PR_SET_PDEATHSIG = 1

# Loaded before any fork: a child does as little as it can.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Reports:
    """The report on one save, from a process that was forked or from this one: what Megatron asks of its queue."""

    def __init__(self) -> None:
        self._fd = anonymous_file()

    def __del__(self) -> None:
        os.close(self._fd)

    def put(self, report: Any) -> None:
        data = pickle.dumps(report)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, len(data).to_bytes(8, "little") + data, 0)

    def get_nowait(self) -> Any:
        """Raises queue.Empty where nobody has reported, or not to the end."""
        content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        os.ftruncate(self._fd, 0)
        if len(content) < 8 or len(content) != 8 + int.from_bytes(content[:8], "little"):
            raise queue.Empty
        return pickle.loads(content[8:])


class _Forks:
    """Of this process: whether those that it forks now die with it."""

    die_with_us = False
    parent = 0


def _before() -> None:
    _Forks.parent = os.getpid()


def _in_child() -> None:
    if not _Forks.die_with_us:
        return
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _Forks.parent:
        os._exit(1)


os.register_at_fork(before=_before, after_in_child=_in_child)

assert hasattr(filesystem_async, "_results_queue"), "Megatron-Core keeps its writers' queue elsewhere"


@contextmanager
def of_one_save() -> Iterator[None]:
    """Writers that are started inside report to a file of their own, as several saves may be under way. They end when
    the thread that starts them ends, and so do their own forks (on Linux: elsewhere they end when they have written).
    """
    filesystem_async._results_queue = Reports()
    _Forks.die_with_us = True
    try:
        yield
    finally:
        _Forks.die_with_us = False
