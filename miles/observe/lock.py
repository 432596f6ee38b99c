"""The lock of a run directory: one live run at a time, and a dead run never blocks the next.

The lock file holds the pid for the message; what locks is `flock`, which the kernel releases with the process, so
nothing is left to clean up after `kill -9`. Leaves what is done under the lock to `miles.observe.record`.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from miles.errors import RunDirError
from miles.observe.files import disk_errors

LOCK_NAME = "run.lock"
# File systems that know no locks (some network mounts): the run goes on without one.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """Held from construction to `release()`. Raises RunDirError when a live run holds it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._run_dir = run_dir
        with disk_errors(self._path):
            while not self._acquire():
                pass

    def _acquire(self) -> bool:
        """Lock the file; False when its holder deleted it meanwhile, and the name means another file now."""
        import fcntl

        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 4096, 0).decode(errors="replace")
            os.close(self._fd)
            raise RunDirError(self._in_use(holder)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(self._fd)
                raise
        try:
            same_file = os.stat(self._path).st_ino == os.fstat(self._fd).st_ino
        except FileNotFoundError:
            same_file = False
        if not same_file:
            os.close(self._fd)
            return False
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode(), 0)
        return True

    def _in_use(self, holder: str) -> str:
        try:
            known = json.loads(holder)
            who = f"process {known['pid']} on {known['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return (
            f"{self._run_dir}: in use by a live run ({who}). Wait for it or stop it, "
            "or give another directory with --run-dir."
        )

    def release(self, run_dir: Path | None = None) -> None:
        """Let go and delete the lock file; `run_dir` is where the directory is now, if it was moved meanwhile."""
        if self._fd < 0:
            return
        path = (run_dir or self._run_dir) / LOCK_NAME
        with disk_errors(path):
            path.unlink(missing_ok=True)
            fd, self._fd = self._fd, -1
            os.close(fd)
