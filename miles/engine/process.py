"""A server of this machine as a child process: start it, wait until it answers, say how it ended, end it.

The child and everything that it starts die with this process, however that ends. Its output goes to a file; the last
lines are kept for whoever asks why it is gone. What the server is and when it is started anew is the fleet's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

import miles
from miles.errors import EngineError

# Lines of a dead server's output that its epitaph repeats.
LAST_LINES = 12
# How long the output of a server that has ended may take to reach us.
READ_S = 1.0
# One look at whether a server answers.
LOOK_S = 5.0

# The child asks the kernel to be killed when the thread that started it ends, and then becomes the server.
_BOUND = (
    "import ctypes, os, sys; "
    "ctypes.CDLL(None).prctl(1, 9) if sys.platform == 'linux' else None; "
    "sys.exit(1) if os.getppid() != int(sys.argv[1]) else os.execv(sys.argv[2], sys.argv[2:])"
)


class ServerProcess:
    """One server that listens at `url`. Start it from a thread that lives as long as it shall.

    Example::

        server = ServerProcess("engine 0", [sys.executable, "-m", "miles", "serve", ...], url, log, environment)
        while not server.answers(): ...
        server.stop()
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        url: str,
        log: Path,
        environment: Mapping[str, str],
        fds: Sequence[int] = (),
    ) -> None:
        self.name, self.url, self.log = name, url, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _BOUND, str(os.getpid()), *argv],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is for the run, and the whole group can be ended at once
        )
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, name=f"miles-output-of-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self.log.open("ab") as file:
            for line in lines:
                self._last.append(line.decode(errors="backslashreplace").rstrip())
                file.write(line)
                file.flush()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def answers(self) -> bool:
        """One look at /health."""
        try:
            return httpx.get(f"{self.url}/health", timeout=LOOK_S, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def listens(self) -> bool:
        """Whether anything accepts connections there: a router without engines is not healthy and can be given some."""
        try:
            httpx.get(self.url, timeout=LOOK_S, trust_env=False)
        except httpx.HTTPError:
            return False
        return True

    def last_words(self) -> str:
        """How the process ended, if it has, and what it printed last."""
        status = self._process.poll()
        if status is None:
            how = "is running"
        elif status >= 0:
            how = f"ended with exit status {status}"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ", by somebody or by the system for want of memory"
        if status is not None:
            self._reader.join(READ_S)
        said = "\n  ".join(self._last)
        printed = f"Its last output ({self.log}):\n  {said}" if said else "It printed nothing."
        return f"{self.name} (process {self.pid}, {self.url}) {how}. {printed}"

    def stop(self) -> None:
        """No process of the server is left when this returns. It is killed: an engine has nothing to put in order."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has started is in its group, also after it has ended
        self._process.wait()
        self._reader.join(READ_S)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def child_environment(threads: int) -> dict[str, str]:
    """What a server of ours finds: the import path of this process, `threads` cores to compute with, no proxies."""
    root = str(Path(miles.__file__).parents[1])
    paths = dict.fromkeys([root, *(path or os.getcwd() for path in sys.path)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(max(1, threads))}


def wait_until_it_answers(server: ServerProcess, timeout_s: float, *, pause_s: float = 0.05) -> None:
    """Raise EngineError where the server ends or does not answer in time."""
    deadline = time.monotonic() + timeout_s
    while not server.answers():
        if server.has_ended:
            raise EngineError(server.last_words())
        if time.monotonic() > deadline:
            raise EngineError(f"waited {timeout_s:.0f} s for an answer of {server.last_words()}")
        time.sleep(pause_s)
