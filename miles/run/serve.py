"""The run's own address: every run serves the engine's protocol on loopback, because plug-ins post there.

The port is open from the start; the web framework is imported when the first client connects, so that a run whose
plug-ins never do starts sooner. Core and plug-ins in this process reach the engine without it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType

from miles.engine.calls import register_local_engine, unregister_local_engine
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.listen import bind_port
from miles.rollout.loop_thread import get_async_loop

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
FLAG = "--sglang-router-port"


@contextmanager
def on_loopback(engine: EmbeddedEngine, port: int | None) -> Iterator[tuple[str, int]]:
    """Serve `engine` at `port` (any free one for None); yields (host, port). FlagError where the port is taken."""
    listening = bind_port(LOOPBACK, port or 0, flag=FLAG)
    listening.setblocking(False)
    server = _LateServer(engine, listening)
    url = f"http://{LOOPBACK}:{server.port}"
    loop = get_async_loop().loop
    loop.call_soon_threadsafe(server.wait_for_client)
    register_local_engine(url, engine)
    try:
        yield LOOPBACK, server.port
    finally:
        unregister_local_engine(url)
        asyncio.run_coroutine_threadsafe(server.close(), loop).result()


def check_free(port: int) -> None:
    """FlagError where nobody could listen at `port`."""
    bind_port(LOOPBACK, port, flag=FLAG).close()


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
        self._serving.add_done_callback(self._ended)

    async def _serve(self) -> None:
        # Not asyncio's own pool: plug-ins may hold all its threads, waiting for this very server.
        with ThreadPoolExecutor(1, thread_name_prefix="miles-serve") as importing:
            server = await asyncio.get_running_loop().run_in_executor(importing, _import_server)
        app = server.create_app(self.engine, own_url=f"http://{LOOPBACK}:{self.port}")
        async with server.serve_on(app, self.listening):
            await asyncio.Event().wait()

    def _ended(self, serving: asyncio.Task[None]) -> None:
        """A server that dies takes its port with it: whoever connects is refused, and does not wait for ever."""
        if not serving.cancelled() and serving.exception() is not None:
            self.listening.close()
            logger.error("the run's engine server at port %d died", self.port, exc_info=serving.exception())

    async def close(self) -> None:
        if self._serving is None:
            asyncio.get_running_loop().remove_reader(self.listening)
        else:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        self.listening.close()


def _import_server() -> ModuleType:
    from miles.engine.embedded import server

    return server
