"""The run's own address: every run serves the engine's protocol on loopback, because plug-ins post there.

The port is open from the start; the web framework is imported when the first client connects, so that a run whose
plug-ins never do starts sooner. Core and plug-ins in this process reach the engine without it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from miles.engine.embedded.engine import EmbeddedEngine
from miles.errors import FlagError
from miles.rollout.loop_thread import get_async_loop

LOOPBACK = "127.0.0.1"
# Connections that may wait while the first one is having the framework imported.
BACKLOG = 1024


@contextmanager
def on_loopback(engine: EmbeddedEngine, port: int | None) -> Iterator[tuple[str, int]]:
    """Serve `engine` at `port` (any free one for None); yields (host, port). FlagError where the port is taken."""
    server = _LateServer(engine, _listen(port))
    loop = get_async_loop().loop
    loop.call_soon_threadsafe(server.wait_for_client)
    try:
        yield LOOPBACK, server.port
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result()


def _listen(port: int | None) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port or 0))
    except OSError as error:
        listening.close()
        raise FlagError(
            "--sglang-router-port",
            given=f"port {port} of {LOOPBACK} cannot be used ({error.strerror}).",
            remedy="Name another port, or leave the flag out to take a free one.",
        ) from error
    listening.listen(BACKLOG)
    listening.setblocking(False)
    return listening


class _LateServer:
    """A listening socket whose HTTP server starts with the first connection. Lives on the background loop."""

    def __init__(self, engine: EmbeddedEngine, listening: socket.socket) -> None:
        self.engine, self.listening = engine, listening
        self.port: int = listening.getsockname()[1]
        self._serving: asyncio.Task[None] | None = None

    def wait_for_client(self) -> None:
        asyncio.get_running_loop().add_reader(self.listening, self._first_client)

    def _first_client(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listening)
        self._serving = loop.create_task(self._serve(), name="engine server")

    async def _serve(self) -> None:
        server_module = await asyncio.to_thread(_import_server)
        app = server_module.create_app(self.engine, own_url=f"http://{LOOPBACK}:{self.port}")
        async with server_module.serve_in_loop(app, self.listening):
            await asyncio.Event().wait()

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.listening)
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self.listening.close()


def _import_server():  # type: ignore[no-untyped-def]
    from miles.engine.embedded import server

    return server
