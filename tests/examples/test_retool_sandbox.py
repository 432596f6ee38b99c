"""The sandbox under attack: each program tries one thing, and the answer is an error or a limit, never the thing."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from examples.retool import sandbox, sandbox_child
from examples.retool.sandbox import Limits, Result, Sandbox
from miles.errors import UsageError

SHORT = Limits(cpu_s=1, wall_s=2.0, memory_mb=128, output_bytes=500)
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}

whole = pytest.mark.skipif(bool(sandbox.missing_layers()), reason="this machine lacks layers of the sandbox")


def run(source: str, limits: Limits = SHORT) -> Result:
    return asyncio.run(Sandbox(limits).run(source))


pytestmark = whole


# ---- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(37*48)", Result("1776\n")),
        ("37*48", Result("")),
        ("import math, fractions\nprint(math.comb(9, 4), fractions.Fraction(1, 3) * 2)", Result("126 2/3\n")),
        ("import json, re, datetime, decimal, random, statistics, itertools, sqlite3", Result("")),
        ("print('é日本')", Result("é日本\n")),
        ("import sys; sys.exit(0)", Result("")),
        ("import sys; print('a'); sys.exit(3)", Result("a\n", "ended with status 3")),
        ("print(1); 1/0", Result("1\n", "ZeroDivisionError: division by zero")),
        ("print(", Result("", "SyntaxError: '(' was never closed")),
        ("def f(): f()\nf()", Result("", "RecursionError: maximum recursion depth exceeded")),
        ("print(input())", Result("", "EOFError: EOF when reading a line")),
        ("a\0b", Result("", "SyntaxError: source code string cannot contain null bytes")),
        ("raise ValueError('x' * 10**6)", Result("", ("ValueError: " + "x" * 200)[:200])),
    ],
)
def test_programs(source: str, expected: Result) -> None:
    got = run(source)
    if expected.error is not None and len(expected.error) == sandbox.ERROR_LENGTH:  # the end of a very long line
        assert got.error is not None and len(got.error) == sandbox.ERROR_LENGTH
    else:
        assert got == expected


def test_the_source_is_taken_as_it_is() -> None:
    """Nothing on the way to the program interprets it: no shell, no command line, no file name."""
    source = "print('''\"; $(id) `id` \\\\ %s {x}''')"
    assert run(source).output == "\"; $(id) `id` \\ %s {x}\n"


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("import time; time.sleep(60)", "stopped after 2 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "stopped after 2 s"),
        ("x = [0] * 10**9", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "MemoryError"),
        ("while True: print('x' * 1000)", "more than 500 bytes of output"),
        ("print('x' * 501)", "more than 500 bytes of output"),
    ],
)
def test_limits(source: str, limit: str) -> None:
    begin = time.perf_counter()
    got = run(source)
    assert got.error == limit
    assert len(got.output) <= SHORT.output_bytes
    assert time.perf_counter() - begin < SHORT.wall_s + 3


@pytest.mark.parametrize("source", ["while True: pass", "print(10**10**8)"])
def test_processor_time(source: str) -> None:
    """Also where Python itself hangs in one long calculation."""
    got = run(source, Limits(cpu_s=1, wall_s=60.0))
    assert got.error == "stopped after 1 s of processor time"


def test_a_flood_of_errors_ends_with_the_processor_time() -> None:
    got = run("import sys\nwhile True: sys.stderr.write('x' * 1000)")
    assert got.error in ("stopped after 1 s of processor time", "stopped after 2 s")


def test_programs_at_the_same_time_are_limited() -> None:
    box = Sandbox(Limits(concurrency=2))

    async def many() -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(box.run("import time; time.sleep(0.3)") for _ in range(4)))
        return time.perf_counter() - begin

    assert asyncio.run(many()) > 0.6
    assert box.num_runs == 4


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor a process, where the program is killed and where whoever waits for it is cancelled."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))

    async def cancelled() -> None:
        task = asyncio.ensure_future(Sandbox(Limits(wall_s=60)).run("import time; time.sleep(60)"))
        while not any(tmp_path.iterdir()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.2)

    asyncio.run(cancelled())
    run("while True: print('x' * 1000)")
    assert list(tmp_path.iterdir()) == []
    assert not children_named("sandbox_child.py")


def children_named(name: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == os.getpid() and name in command:
            found.append(command)
    return found


# ---- attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True: os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(PARENT, 0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', PORT))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT')",
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/proc/PARENT/environ')",
        "open('/proc/PARENT/mem', 'r+b')",
        "open('VICTIM')",
        "import os; os.listdir('/')",
        "import os; os.listdir('/proc')",
        "open('VICTIM', 'a')",
        "open('new', 'w')",
        "open('/dev/shm/new', 'w')",
        "import os; os.remove('VICTIM')",
        "import os; os.rename('VICTIM', 'VICTIM.moved')",
        "import os; os.truncate('VICTIM', 0)",
        "import os; os.chmod('VICTIM', 0)",
        "import os; os.symlink('VICTIM', 'link')",
        "import os; os.mkdir('/tmp/sandbox-made')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os; os.setuid(0); os.chroot('/')",
        "import os; os.nice(-5)",
        "import os; os.memfd_create('x')",
        "import ctypes; assert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0",
    ],
)
def test_attacks(attack: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attack = attack.replace("PARENT", str(os.getpid())).replace("PORT", str(port)).replace("VICTIM", str(victim))
        got = run(attack + "\nprint('it worked')")
    assert "it worked" not in got.output
    assert got.error is not None
    refused = ("PermissionError", "AssertionError", "can't start new thread", "not allowed", "not permitted")
    assert any(word in got.error for word in refused), got.error
    assert victim.read_text() == "secret" and victim.stat().st_mode & 0o600 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["victim.txt"]


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    got = run("import os; print(dict(os.environ), os.listdir('.'))")
    assert "SECRET" not in got.output and got.output.endswith(" []\n")


def test_neither_installed_packages_nor_this_repository_can_be_imported() -> None:
    for name in ("numpy", "torch", "miles", "examples"):
        assert run(f"import {name}").error == f"ModuleNotFoundError: No module named '{name}'"


# ---- where it cannot hold ------------------------------------------------------------------------------------------


def test_a_machine_without_a_layer_is_refused_or_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_layers", lambda: ("files", "calls"))
    monkeypatch.delenv(sandbox.WEAK_SANDBOX_ENV, raising=False)
    with pytest.raises(UsageError, match=r"lacks: files, calls .* Set MILES_WEAK_SANDBOX=1"):
        run("print(1)")
    monkeypatch.setenv(sandbox.WEAK_SANDBOX_ENV, "1")
    assert run("print(1)") == Result("1\n")


@pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_the_system_calls_are_the_kernel_s(machine: str) -> None:
    header = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"no {header}")
    column, _ = sandbox_child.MACHINES[machine]
    defined = {
        words[1].removeprefix("__NR3264_").removeprefix("__NR_"): words[2]
        for words in (line.split() for line in header.read_text().splitlines())
        if len(words) >= 3 and words[1].startswith("__NR") and words[2].isdecimal()
    }
    defined["newfstatat"] = defined.get("newfstatat", defined.get("fstatat", ""))
    for name, numbers in sandbox_child.ALLOWED.items():
        number = numbers[column]
        if number is None:
            assert name not in defined or machine == "aarch64"
        else:
            assert defined[name] == str(number), name
