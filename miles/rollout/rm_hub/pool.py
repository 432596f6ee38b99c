"""A few processes that grade untrusted text, each grade with a time limit.

    event loop ── await grade("sympy", pairs) ──► thread ──► worker process (`miles.rollout.rm_hub.worker`)
                                                    │  a line of JSON there, a line back
                                                    └─ no reply in time: the worker is killed, GraderError

Workers start when they are first needed, one per grade that runs at the same time and at most `MAX_WORKERS`; they are
plain child processes that import what they need, so neither fork nor the user's main module is involved.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import select
import subprocess
import sys
import threading
from time import monotonic
from typing import Any

from miles.hooks.threads import Threads

# A verdict on a final answer takes milliseconds; an answer that takes longer than this takes forever.
GRADE_LIMIT_S = 10.0
# Importing sympy or a user's IFBench on a machine that is busy with something else.
LOAD_LIMIT_S = 120.0
MAX_WORKERS = max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class GraderError(RuntimeError):
    """There is no verdict: the grader took too long, ended, or raised. The message says which."""


class _Ended(Exception):
    """The worker process is gone; the message says how it went."""


class _Worker:
    """One worker process."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "miles.rollout.rm_hub.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # closed by the worker once it runs
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
        )
        self._loaded: set[str] = set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def grade(self, name: str, given: tuple[Any, ...], limit_s: float) -> Any:
        """The verdict. Raises GraderError; TimeoutError or _Ended where the worker is of no further use."""
        if name not in self._loaded:
            self._ask({"load": name}, LOAD_LIMIT_S)
            self._loaded.add(name)
        return self._ask({"grade": name, "given": given, "limit_s": limit_s}, limit_s)

    def _ask(self, request: dict[str, Any], limit_s: float) -> Any:
        assert self._process.stdin is not None
        data = memoryview(json.dumps(request).encode() + b"\n")
        deadline = monotonic() + limit_s
        try:
            os.set_blocking(self._process.stdin.fileno(), False)
            while data:
                self._wait(self._process.stdin, select.POLLOUT, deadline)
                data = data[self._process.stdin.write(data) or 0 :]
            reply = json.loads(self._line(deadline))
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise _Ended(self.end()) from None
        if "error" in reply:
            raise GraderError(reply["error"])
        return reply["value"]

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        received = b""
        while not received.endswith(b"\n"):
            self._wait(self._process.stdout, select.POLLIN, deadline)
            chunk = self._process.stdout.read(1 << 16)
            if not chunk:
                raise EOFError
            received += chunk
        return received

    @staticmethod
    def _wait(pipe: Any, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - monotonic()) * 1000):
            raise TimeoutError

    def end(self) -> str:
        """Kill the process, unless it is gone; its exit status (negative for a signal), and the last that it said."""
        self._process.kill()
        status = self._process.wait()
        pipes = self._process.stdin, self._process.stdout, self._process.stderr
        said = b"" if pipes[2] is None or pipes[2].closed else pipes[2].read()
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        return f"status {status}{': ' + last if last else ''}"


class GraderPool:
    """Workers, and the threads that wait for them.

    Example: `await GraderPool().grade("sympy", [["1/2", "0.5"]]) is True`
    """

    def __init__(self, max_workers: int = MAX_WORKERS, limit_s: float = GRADE_LIMIT_S) -> None:
        self.limit_s = limit_s
        self._threads = Threads(max_workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        with self._lock:
            return [worker.pid for worker in self._all]

    async def grade(self, name: str, *given: Any) -> Any:
        """The verdict of the grader `name`. Raises GraderError."""
        verdict = asyncio.ensure_future(self._threads.run(self._grade, name, given))
        verdict.add_done_callback(_take_note)
        # Shielded: whoever gives up waiting leaves the worker to its own time limit, and whole.
        return await asyncio.shield(verdict)

    def _grade(self, name: str, given: tuple[Any, ...]) -> Any:
        try:
            return self._attempt(name, given)
        except _Ended:  # killed from outside while it was idle, most likely: the grade has another try
            pass
        try:
            return self._attempt(name, given)
        except _Ended as error:
            raise GraderError(f"the {name} grader's process ended twice in a row, lastly with {error}") from error

    def _attempt(self, name: str, given: tuple[Any, ...]) -> Any:
        worker = self._take()
        try:
            value = worker.grade(name, given, self.limit_s)
        except GraderError:
            self._give_back(worker)
            raise
        except TimeoutError:
            self._discard(worker)
            raise GraderError(
                f"the {name} grader gave no verdict within {self.limit_s:g} s; its process was killed"
            ) from None
        except BaseException:
            self._discard(worker)
            raise
        self._give_back(worker)
        return value

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        worker = _Worker()
        with self._lock:
            self._all.add(worker)
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)

    def _discard(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.end()

    def close(self) -> None:
        """End all workers; the next grade starts new ones."""
        with self._lock:
            workers, self._all, self._idle = self._all, set(), []
        for worker in workers:
            worker.end()


def _take_note(verdict: asyncio.Future[Any]) -> None:
    """An error that nobody waits for any more is no news."""
    if not verdict.cancelled():
        verdict.exception()


_pool: GraderPool | None = None
_lock = threading.Lock()


def shared() -> GraderPool:
    """The pool of this process."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = GraderPool()
        return _pool


@atexit.register
def _close_shared() -> None:
    if _pool is not None:
        _pool.close()


async def grade(name: str, *given: Any) -> Any:
    """The verdict of the grader `name` in the process's pool. Raises GraderError."""
    return await shared().grade(name, *given)


def _forget_after_fork() -> None:
    """A forked child has the parent's pipes but not its threads: it starts its own workers."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
