"""Requests per CPU-second and p99 through MilesRouter, beside the Rust router of SGLang, in front of null workers.

    python benchmarks/router.py [--rival PYTHON] [--requests N] [--only NAME]

Each request has 4 KB in and 16 KB out. CPU seconds are those of the router's process, kernel time included. `--rival`,
or the environment variable MILES_BENCH_RIVAL, is the Python of an environment with `sglang-router` (0.3.2 is what the
goal was set against); without it the Rust rows are left out. The goal: at least its requests per CPU-second at 64 and
256 concurrent requests; and 4,000 slow ones at once without an error, in less than 1 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvloop

from miles.router.serve import raise_open_files

HERE = Path(__file__).resolve().parent
NUM_WORKERS = 4
CONCURRENT = (64, 256, 1024)
SLOW = 4000
SLOW_S = 10.0
IN, OUT = 4096, 16384

BODY = b'{"text": "' + b"x" * (IN - 12) + b'"}'
ANSWER = b'{"text": "' + b"y" * (OUT - 12) + b'"}'
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % OUT + ANSWER
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class PassThrough:
    """The cheapest middleware there is."""

    def __init__(self, app: Any, *, router: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


# ---- null workers: a process of its own ------------------------------------------------------------------------------


class NullWorker(asyncio.Protocol):
    """Answers each request after `delay_s`. Requests have a content-length, or no body."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s, self.data = delay_s, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.data) < end + 4 + size:
                return
            self.data = self.data[end + 4 + size :]
            response = RESPONSE if head.startswith(b"post /generate") else EMPTY
            if self.delay_s and response is RESPONSE:
                asyncio.get_running_loop().call_later(self.delay_s, self._answer, response)
            else:
                self._answer(response)

    def _answer(self, response: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(response)


async def serve_null(ports: list[int], delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: NullWorker(delay_s), "127.0.0.1", port, backlog=SLOW) for port in ports]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


# ---- load: this process ----------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection that sends the next request when the answer to the last one is there."""

    def __init__(self, load: Load) -> None:
        self.load, self.left = load, 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self) -> None:
        if not self.load.take():
            return
        self.began, self.head, self.left = time.perf_counter(), b"", -1
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.head[:end].lower()
            at = head.find(b"content-length:")
            ok = head.startswith(b"http/1.1 200") and at >= 0
            if not ok:
                self.load.errors.append(self.head[:200])
                self.transport.abort()
                return
            self.left = int(head[at + 15 :].split(b"\r\n", 1)[0]) - (len(self.head) - end - 4)
        else:
            self.left -= len(data)
        if self.left == 0:
            self.load.latencies.append(time.perf_counter() - self.began)
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.left:
            self.load.errors.append(b"connection lost")
        self.load.ended()


class Load:
    """`requests` requests over `concurrent` connections."""

    def __init__(self, port: int, concurrent: int, requests: int) -> None:
        self.port, self.concurrent, self.requests = port, concurrent, requests
        self.request = (
            b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nuser-agent: bench\r\naccept: */*\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (port, len(BODY), BODY)
        )
        self.unsent = requests
        self.latencies: list[float] = []
        self.errors: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self) -> bool:
        if len(self.latencies) == self.requests and not self.done.done():
            self.done.set_result(None)
        self.unsent -= 1
        return self.unsent >= 0

    def ended(self) -> None:
        if self.errors and not self.done.done():
            self.done.set_result(None)

    async def run(self) -> float:
        """Seconds that it took."""
        loop = asyncio.get_running_loop()
        clients = []
        for begin in range(0, self.concurrent, 200):
            some = range(begin, min(begin + 200, self.concurrent))
            made = (loop.create_connection(lambda: Client(self), "127.0.0.1", self.port) for _ in some)
            clients += [client for _, client in await asyncio.gather(*made)]
        began = time.perf_counter()
        for client in clients:
            client.send()
        await self.done
        seconds = time.perf_counter() - began
        for client in clients:
            client.transport.abort()
        return seconds


# ---- the routers -----------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def process(command: list[str], port: int) -> Iterator[psutil.Process]:
    """A server that listens on `port`, for the length of the block."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "RUST_LOG": "error"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if started.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} does not listen on {port}")
            time.sleep(0.1)
        time.sleep(1.0)  # the Rust router looks at its workers first
        yield psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait(30)


def routers(workers: list[int], rival: str | None) -> dict[str, tuple[list[str], int]]:
    """Name -> command and port."""
    urls = [f"http://127.0.0.1:{port}" for port in workers]
    ports = free_ports(3)
    route = [sys.executable, "-m", "miles", "route", "--worker-urls", *urls, "--port"]
    found = {
        "miles": ([*route, str(ports[0])], ports[0]),
        "miles, one middleware": ([*route, str(ports[1]), "--middleware", "router.PassThrough"], ports[1]),
    }
    if rival:
        launch = [rival, "-m", "sglang_router.launch_router", "--worker-urls", *urls, "--policy", "round_robin"]
        found["sglang-router (Rust)"] = ([*launch, "--host", "127.0.0.1", "--port", str(ports[2])], ports[2])
    return found


def cpu_seconds(router: psutil.Process) -> float:
    """Of the process and those that it has started."""
    times = [one.cpu_times() for one in (router, *router.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(router: psutil.Process, port: int, concurrent: int, requests: int) -> str:
    async def both() -> tuple[Load, float, float]:
        await Load(port, concurrent, max(concurrent, 500)).run()  # connections, caches
        before = cpu_seconds(router)
        load = Load(port, concurrent, requests)
        seconds = await load.run()
        return load, seconds, cpu_seconds(router) - before

    load, seconds, cpu = uvloop.run(both())
    if load.errors:
        return f"{len(load.errors)} errors, the first {load.errors[0]!r}"
    p99 = sorted(load.latencies)[int(len(load.latencies) * 0.99)]
    return f"{requests / cpu:7.0f} requests/CPU-s  {requests / seconds:7.0f} requests/s  p99 {1e3 * p99:6.0f} ms"


def measure_slow(router: psutil.Process, port: int) -> str:
    peak = 0

    async def both() -> tuple[Load, float]:
        nonlocal peak
        load = Load(port, SLOW, SLOW)
        running = asyncio.ensure_future(load.run())
        while not running.done():
            peak = max(peak, router.memory_info().rss)
            await asyncio.sleep(0.25)
        return load, running.result()

    load, seconds = uvloop.run(both())
    return f"{len(load.errors)} errors, {peak / 1e6:.0f} MB at most, {seconds:.1f} s for answers that take {SLOW_S:g} s"


@contextlib.contextmanager
def null_workers(delay_s: float) -> Iterator[list[int]]:
    ports = free_ports(NUM_WORKERS)
    command = [sys.executable, __file__, "--null-workers", ",".join(map(str, ports)), "--delay", str(delay_s)]
    with process(command, ports[-1]):
        yield ports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", default=os.environ.get("MILES_BENCH_RIVAL"), metavar="PYTHON")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--only", default="", help="routers whose name contains this")
    parser.add_argument("--null-workers", default="", help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    raise_open_files()
    if options.null_workers:
        uvloop.run(serve_null([int(port) for port in options.null_workers.split(",")], options.delay))
        return 0
    print(f"{IN} bytes in, {OUT} bytes out, {NUM_WORKERS} null workers, {options.requests} requests\n")
    with null_workers(0.0) as workers:
        for name, (command, port) in routers(workers, options.rival).items():
            if options.only not in name:
                continue
            with process(command, port) as router:
                for concurrent in CONCURRENT:
                    print(f"{name:22} {concurrent:5} concurrent  {measure(router, port, concurrent, options.requests)}")
    if not options.rival:
        print("sglang-router (Rust)   left out: name a Python that has it with --rival or MILES_BENCH_RIVAL")
    with null_workers(SLOW_S) as workers:
        command, port = routers(workers, None)["miles"]
        with process(command, port) as router:
            print(f"\nmiles, {SLOW} slow requests at once: {measure_slow(router, port)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
