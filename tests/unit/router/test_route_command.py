"""`miles route` as a process: its address, its args, its end; and the token where it listens beyond this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from null_workers import worker

from miles.engine import guard
from miles.engine.guard import Guard, is_loopback
from miles.router import serve

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60  # before a process that hangs fails its test


@contextlib.contextmanager
def route(*flags: str, fds: tuple[int, ...] = (), **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router at a free port, and its URL as it prints it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "miles", "route", "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line or process.communicate()[1]
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def refused(*flags: str) -> str:
    command = [sys.executable, "-m", "miles", "route", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2, done
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends_when_it_is_told(number: signal.Signals) -> None:
    async def through(url: str, of_worker: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:
            assert (await client.post("/generate", json={})).json() == {"ok": True}
            assert (await client.get("/list_workers")).json() == {"urls": [of_worker]}

    async def main() -> None:
        async with worker() as one:
            with route("--worker-urls", one.url) as (process, url):
                await through(url, one.url)
                assert "torch" not in _modules(process.pid)
                process.send_signal(number)
                assert await asyncio.to_thread(process.wait, SECONDS) == 0
                assert process.stderr is not None and "Traceback" not in process.stderr.read()

    asyncio.run(main())


def _modules(pid: int) -> str:
    """Files that a process has mapped; a library of torch would be among them."""
    return "\n".join(m.path for m in psutil.Process(pid).memory_maps())


def test_args_of_a_run_come_through_an_inherited_file() -> None:
    args = Namespace(
        miles_router_middleware_paths=[f"{ROOT}/tests/hooks/plugins/middlewares.py:Answering"],
        miles_router_max_connections=9,
        mine={"of": "the run"},
    )
    with tempfile.TemporaryFile() as file:
        pickle.dump(args, file)
        file.seek(0)
        with route("--args-fd", str(file.fileno()), fds=(file.fileno(),)) as (_, url):
            assert httpx.get(f"{url}/mine", timeout=SECONDS).json() == {"args": {"of": "the run"}, "verbose": False}


def test_it_does_not_outlive_the_process_that_handed_it_args() -> None:
    code = (
        "import os, pickle, subprocess, sys, argparse\n"
        "r, w = os.pipe()\n"
        "os.write(w, pickle.dumps(argparse.Namespace()))\n"
        "p = subprocess.Popen([sys.executable, '-m', 'miles', 'route', '--port', '0', '--args-fd', str(r)],\n"
        "                     pass_fds=(r,), stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "print(p.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(SECONDS)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "--port: expected a port"),
        (["--worker-urls", "ftp://x"], "--worker-urls: expected http://HOST:PORT, got 'ftp://x'"),
        (["--timeout", "-1"], "--timeout: expected a number >= 0"),
        (["--max-connections", "0"], "--max-connections: expected a number >= 1"),
        (["--health-failures", "0"], "--health-failures: expected a number >= 1"),
        (["--args-fd", "77"], "--args-fd: expected a file descriptor"),
        (["--middleware", "no.such.Thing"], "no.such.Thing"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], says: str) -> None:
    assert says in refused("--port", "0", *flags)


def test_what_is_not_a_namespace_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        pickle.dump({"a": 1}, file)
        file.seek(0)
        with pytest.raises(serve.FlagError, match="--args-fd"):
            serve._inherited(os.dup(file.fileno()))


# ---- the token -----------------------------------------------------------------------------------------------------


def test_beyond_this_machine_control_needs_the_token() -> None:
    with route("--host", "0.0.0.0", MILES_API_TOKEN="secret") as (_, printed):
        url = printed.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            assert client.post("/generate", json={}).status_code == 503  # no worker, but no token needed
            for path in (
                "/add_worker?url=http://w:1",
                "/remove_worker",
                "/weight_version",
                "/update_weights_from_disk",
            ):
                got = client.post(path)
                assert got.status_code == 401 and "MILES_API_TOKEN" in got.json()["error"]["message"]
            right = {"authorization": "Bearer secret"}
            assert client.post("/add_worker?url=http://w:1", headers=right).status_code == 200


def test_without_a_token_one_is_made_and_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(guard.TOKEN_VARIABLE, "")
    token = guard.token_of_process()
    assert len(token) > 30 and token in capsys.readouterr().err
    assert guard.token_of_process() == token and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.7", False), ("node7", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/generate", None, 200),
        ("/generate/", None, 200),
        ("/sessions/ab12", None, 200),
        ("/sessions/ab12/v1/chat/completions", None, 200),
        ("/sessions/ab12/update_weights_from_disk", None, 401),
        ("/generate/../add_worker", None, 401),
        ("//generate", None, 401),
        ("/add_worker", None, 401),
        ("/add_worker", b"Bearer wrong", 401),
        ("/add_worker", b"Bearer", 401),
        ("/add_worker", b"Basic token", 401),
        ("/add_worker", b"\xff\xfe", 401),
        ("/add_worker", b"Bearer token", 200),
        ("/add_worker", b"bearer  token", 200),
    ],
)
def test_the_guard(path: str, header: bytes | None, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        guarded = Guard(app, token="token", open_paths=serve.OPEN_PATHS)
        headers = [] if header is None else [(b"authorization", header)]
        await guarded({"type": "http", "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
        await guarded({"type": "lifespan"}, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert sent[0]["status"] == status
