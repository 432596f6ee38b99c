"""SGLang's HTTP API in front of an embedded engine: for plug-ins of a run, for other machines, for `miles serve`.

    generate_routes.py   /generate, /health_generate
    control_routes.py    what the server is, abort, pause, flush, memory
    weight_routes.py     weight updates and their checks
    chat.py              /v1/chat/completions, /v1/models
    http.py              bodies, errors, clients that hang up
    command.py           `miles serve`

One engine, one app. Inside a run the app also plays the router's part: `/list_workers` and `/workers` name the server
itself, so that plug-ins which ask the router for its engines find it. This file puts the app together and serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from miles import __version__
from miles.engine.embedded.chat import mount_chat
from miles.engine.embedded.control_routes import add_control_routes, add_information, add_router_part
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.generate_routes import Load, add_generate_routes
from miles.engine.embedded.http import Limits, add_error_handlers
from miles.engine.embedded.weight_routes import ReadShared, add_weight_routes
from miles.engine.listen import bind_port, url_of
from miles.errors import EngineError

OPEN_PATHS = (
    "/generate",
    "/health",
    "/health_generate",
    "/get_model_info",
    "/model_info",
    "/get_weight_version",
    "/weight_version",
    "/list_workers",
    "/workers",
    "/v1/chat/completions",
    "/v1/models",
    "/openapi.json",
)
"""What anybody may ask of a server that is guarded by a token: it generates or reports, and changes nothing."""


def create_app(
    engine: EmbeddedEngine,
    *,
    own_url: str | None = None,
    limits: Limits | None = None,
    shared: ReadShared | None = None,
    tool_call_parser: str | None = None,
) -> FastAPI:
    """The app of one engine.

    `own_url` is what `/list_workers` answers; None takes the address that was asked. `shared` reads the weights in an
    inherited memory, `tool_call_parser` names the format of tool calls (None: the chat template tells).
    """
    limits = limits or Limits()
    load = Load(limits.queued_requests)
    app = FastAPI(title="miles embedded engine", version=__version__, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    add_generate_routes(app, engine, limits, load)
    add_information(app, engine, limits, load)
    add_control_routes(app, engine, limits)
    add_weight_routes(app, engine, limits, shared)
    add_router_part(app, own_url)
    mount_chat(app, engine, limits, load, tool_call_parser=tool_call_parser)
    return app


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the event loop decides what SIGINT means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve_in_loop(
    app: FastAPI, host: str, port: int, *, flag: str = "--sglang-router-port"
) -> AsyncIterator[str]:
    """Serve `app` in the running event loop for the duration of the block; yields its URL.

    Example::

        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as url:
            register_local_engine(url, engine)
    """
    async with serve_on(app, bind_port(host, port, flag=flag)) as url:
        yield url


@contextlib.asynccontextmanager
async def serve_on(app: FastAPI, listener: socket.socket) -> AsyncIterator[str]:
    """The same on a socket that listens already; it is closed at the end."""
    url = url_of(listener)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name=f"miles-serve-{url}")
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if serving.done():
            serving.result()
            raise EngineError(f"the server of {url} ended while it started.")
        yield url
    finally:
        server.should_exit = True
        await serving
        listener.close()
