"""The router as a process: `miles route`, and `run_router(args)` of a run that starts it under its published name.

    miles route --worker-urls http://10.0.0.7:30001 http://10.0.0.8:30001
    miles route --port 0 --args-fd 5        as a run starts it: its `args` come through an inherited file or pipe

Nothing here imports torch: the router is up in a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import uvicorn
import uvloop

from miles.engine.guard import Guard, is_loopback, token_of_process
from miles.engine.listen import bind_port, url_of
from miles.engine.parent import die_with
from miles.errors import FlagError, UsageError
from miles.router.acceptor import Acceptor
from miles.router.balance import WorkerUrlError, worker_url
from miles.router.router import MilesRouter
from miles.router.settings import MIB

KEEP_ALIVE_S = 75
"""How long an idle connection of a client is kept; longer than clients keep theirs, so that they close first."""

GRACE_S = 1.0
"""How long requests in flight may go on when the router is told to stop; then they are answered with 503."""

OPEN_PATHS = (
    "/generate",
    "/health",
    "/health_generate",
    "/list_workers",
    "/workers",
    "/metrics",
    "/get_model_info",
    "/model_info",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/retrieve_from_text",
    "/sessions",
    "/sessions/*",
    "/sessions/*/v1/chat/completions",
)
"""What needs no token where the router listens beyond this machine: generating, and asking how things are."""


class _Server(uvicorn.Server):
    """uvicorn that accepts in bulk and ends, at SIGINT or SIGTERM, with exit status 0."""

    def __init__(self, config: uvicorn.Config, router: MilesRouter, listener: socket.socket) -> None:
        super().__init__(config)
        self._router, self._listener = router, listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self.servers.append(cast(Any, Acceptor(self._listener, self._protocol)))

    def _protocol(self) -> asyncio.Protocol:
        make = cast(Any, self.config.http_protocol_class)
        return cast(
            asyncio.Protocol,
            make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None),
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        asyncio.get_running_loop().call_later(GRACE_S, self._router.forwarder.stop)


def serve(router: MilesRouter, host: str, port: int, *, flag: str = "--sglang-router-port", token: str = "") -> None:
    """Serve until SIGINT or SIGTERM. Raises FlagError where the port is taken.

    `token` guards the control endpoints; by default it is that of the process where `host` is not loopback.
    """
    raise_open_files()
    with bind_port(host, port, flag=flag) as listener:
        _serve_on(router, listener, token)


def _serve_on(router: MilesRouter, listener: socket.socket, token: str) -> None:
    app: Any = router.app
    if not is_loopback(listener.getsockname()[0]):
        app = Guard(app, token=token or token_of_process(), open_paths=OPEN_PATHS)
    config = uvicorn.Config(
        app,
        http="httptools",
        proxy_headers=False,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,  # headers are those of the workers
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(GRACE_S) + 2,
    )
    print(f"miles router at {url_of(listener)} (stop with Ctrl-C)", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Server(config, router, listener).serve(sockets=[]))


def raise_open_files() -> None:
    """Two connections per request need more open files than shells allow by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- miles route -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="miles route", description="One address in front of several engines: balance, retries, health, middleware."
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    made.add_argument("--port", type=int, default=30000, help="port to listen on; 0 takes a free one")
    made.add_argument("--worker-urls", nargs="+", default=[], metavar="URL", help="engines, http://HOST:PORT")
    made.add_argument(
        "--middleware", nargs="+", metavar="PATH", help="Starlette middleware classes, the outermost last"
    )
    made.add_argument("--hf-checkpoint", metavar="DIR", help="tokenizer of the models: turns on /sessions")
    made.add_argument(
        "--timeout", type=float, metavar="S", help="seconds that a request may take; no limit by default"
    )
    made.add_argument("--max-connections", type=int, metavar="N", help="requests on their way; more wait in line")
    made.add_argument("--max-waiting", type=int, metavar="N", help="requests in line; more are answered with 429")
    made.add_argument("--max-body-mb", type=int, metavar="N", help="size of a request; more is answered with 413")
    made.add_argument("--worker-wait", type=float, metavar="S", help="wait of a request while no worker may serve")
    made.add_argument("--health-interval", type=float, metavar="S", help="seconds between two health checks")
    made.add_argument("--health-failures", type=int, metavar="N", help="failures in a row that quarantine a worker")
    made.add_argument("--args-fd", type=int, metavar="FD", help="inherited file with the pickled args of a run")
    return made


# Flag -> attribute of `args`, the smallest value, the factor between them.
_LIMITS = {
    "timeout": ("miles_router_timeout", 0.0, 1),
    "max_connections": ("miles_router_max_connections", 1, 1),
    "max_waiting": ("miles_router_max_waiting", 0, 1),
    "max_body_mb": ("miles_router_max_body_bytes", 1, MIB),
    "worker_wait": ("miles_router_worker_wait", 0.0, 1),
    "health_interval": ("rollout_health_check_interval", 0.01, 1),
    "health_failures": ("miles_router_health_check_failure_threshold", 1, 1),
}


def _args_of(options: argparse.Namespace) -> argparse.Namespace:
    """The run's args where they were handed over, with what the flags say on top. Raises FlagError."""
    args = argparse.Namespace() if options.args_fd is None else _inherited(options.args_fd)
    for name, (attribute, least, factor) in _LIMITS.items():
        value = getattr(options, name)
        if value is None:
            continue
        if not value >= least:
            raise FlagError("--" + name.replace("_", "-"), given=value, expected=f"a number >= {least}")
        setattr(args, attribute, value * factor)
    if options.middleware is not None:
        args.miles_router_middleware_paths = options.middleware
    if options.hf_checkpoint is not None:
        args.hf_checkpoint = options.hf_checkpoint
    return args


def _inherited(fd: int) -> argparse.Namespace:
    """What the parent process has written for this one, and nobody else could."""
    what = "a file descriptor with a pickled Namespace"
    try:
        with os.fdopen(fd, "rb") as file:
            args = pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise FlagError("--args-fd", given=fd, expected=f"{what} ({error})") from None
    if not isinstance(args, argparse.Namespace):
        raise FlagError("--args-fd", given=fd, expected=what)
    return args


def main(argv: Sequence[str]) -> int:
    """`miles route`: print the address, serve until SIGINT or SIGTERM. Returns the exit status."""
    parent = os.getppid()
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if options.args_fd is not None:
            die_with(parent)
        args = _args_of(options)
        raise_open_files()
        with bind_port(options.host, options.port, flag="--port") as listener:
            router = MilesRouter(args)
            for url in options.worker_urls:
                router.table.add(_worker(url))
            _serve_on(router, listener, token="")
    except UsageError as error:
        print(f"miles route: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _worker(url: str) -> str:
    try:
        return worker_url(url)
    except WorkerUrlError as error:
        raise FlagError("--worker-urls", given=str(error).removeprefix("url: ")) from None
