"""Runs Python programs that a model wrote: each in a process of its own that has given up its rights beforehand.

    result = await Sandbox().run("print(37*48)")        Result(output="1776\\n", error=None)

What holds (sandbox_child.py says how): limits on processor time, memory, output and wall time; an empty environment; an
empty folder, removed afterwards; no processes, no threads, no network, no signals to others, nothing written or
removed; only Python's own files can be read. Tested one by one in tests/examples/test_retool_sandbox.py.

What does not: it is a process on this machine's kernel, so a hole in the kernel is a hole in it; processor caches are
shared; a program learns the time, the kernel's version and what is in Python's folder. Where code comes from people who
want to break out, use a virtual machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from asyncio import AbstractEventLoop, Semaphore, StreamReader
from asyncio.subprocess import Process
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from miles.errors import UsageError

logger = logging.getLogger(__name__)

CHILD = Path(__file__).resolve().parent / "sandbox_child.py"
# Isolated, without site-packages, no bytecode written.
PYTHON = (sys.executable, "-I", "-S", "-B", "-X", "utf8")
WEAK_SANDBOX_ENV = "MILES_WEAK_SANDBOX"
"""Set to 1, the sandbox also runs where this machine lacks layers of it."""

PROBE_TIMEOUT_S = 60.0
GRACE_S = 10.0
"""For a killed program to be gone."""

READ_BYTES = 65536
ERROR_LENGTH = 200  # characters


@dataclass(frozen=True)
class Limits:
    """Per program."""

    cpu_s: int = 2
    wall_s: float = 5.0
    memory_mb: int = 256
    output_bytes: int = 2000
    # Programs at the same time; others wait.
    concurrency: int = 8


@dataclass(frozen=True)
class Result:
    """What a program printed, and why it did not end well: a Python error's last line, or the limit it met.

    Example: `Result(output="", error="ZeroDivisionError: division by zero")`
    """

    output: str
    error: str | None = None


class Sandbox:
    """`run` may be called from several event loops; each has its own `concurrency` slots."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.num_runs = 0
        self._slots: weakref.WeakKeyDictionary[AbstractEventLoop, Semaphore] = weakref.WeakKeyDictionary()

    async def run(self, source: str) -> Result:
        """Raises UsageError where this machine cannot hold the sandbox (see `missing_layers`)."""
        missing = await asyncio.to_thread(missing_layers)
        if missing and os.environ.get(WEAK_SANDBOX_ENV) != "1":
            raise UsageError(
                f"the sandbox for programs of the model needs what this machine lacks: {', '.join(missing)} (Linux "
                f"5.13 or newer on x86-64 or ARM64 has it). Set {WEAK_SANDBOX_ENV}=1 to run them with less protection."
            )
        loop = asyncio.get_running_loop()
        async with self._slots.setdefault(loop, Semaphore(self.limits.concurrency)):
            self.num_runs += 1
            with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
                return await self._run(source, folder)

    async def _run(self, source: str, folder: str) -> Result:
        process = await asyncio.create_subprocess_exec(
            *PYTHON, str(CHILD), str(self.limits.cpu_s), str(self.limits.memory_mb),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(source.encode("utf-8", "replace"))
        process.stdin.close()
        ended = asyncio.gather(
            _read_output(process.stdout, self.limits.output_bytes, process),
            _read_errors(process.stderr),
            process.wait(),
        )
        try:
            in_time, _ = await asyncio.wait({ended}, timeout=self.limits.wall_s)
        finally:
            _kill(process)
        (output, flooded), error, status = await asyncio.wait_for(ended, GRACE_S)
        if flooded:
            return Result(output, f"more than {self.limits.output_bytes} bytes of output")
        if not in_time:
            return Result(output, f"stopped after {self.limits.wall_s:g} s")
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return Result(output, f"stopped after {self.limits.cpu_s} s of processor time")
        return Result(output, (error or f"ended with status {status}") if status else None)


async def _read_output(stream: StreamReader, limit: int, process: Process) -> tuple[str, bool]:
    """At most `limit` bytes, as text, and whether there were more, which ends the process.

    Read to its end in any case: asyncio holds a process for alive until its pipes are empty.
    """
    kept, more = bytearray(), False
    while chunk := await stream.read(READ_BYTES):
        more = more or len(kept) + len(chunk) > limit
        kept += chunk[: limit - len(kept)]
        if more:
            _kill(process)
    return kept.decode("utf-8", "replace"), more


async def _read_errors(stream: StreamReader) -> str:
    """The last line of what a traceback says."""
    kept = b""
    while chunk := await stream.read(READ_BYTES):
        kept = (kept + chunk)[-READ_BYTES:]
    lines = kept.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:ERROR_LENGTH] if lines else ""


def _kill(process: Process) -> None:
    """End the process, and with it what it may have started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@cache
def missing_layers() -> tuple[str, ...]:
    """What this machine cannot hold of "privileges", "files" and "calls"; asked once per process."""
    probe = subprocess.run(
        [*PYTHON, str(CHILD), "probe"], capture_output=True, text=True, env={}, timeout=PROBE_TIMEOUT_S, check=False
    )
    if probe.returncode != 0:
        raise UsageError(f"the sandbox cannot start: {probe.stderr.strip() or f'status {probe.returncode}'}")
    missing = tuple(probe.stdout.split())
    if missing:
        logger.warning("sandbox: this machine lacks %s", ", ".join(missing))
    return missing
