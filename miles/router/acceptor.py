"""Accepting connections in bulk.

uvloop's own servers take one connection per turn of the event loop. A router with a thousand requests on their way
needs tens of milliseconds for a turn, so that the last of several hundred new clients would wait for seconds. Here all
that wait are taken in one turn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger("miles.router")

AT_ONCE = 1024
"""Connections that are taken in one turn; requests in flight get theirs in between."""

PAUSE_S = 1.0
"""How long nothing is accepted after the system had no file descriptor or memory for a connection."""


class Acceptor:
    """Hands connections of `listener` to protocols that `factory` makes, from now on until `close`.

    Belongs to the running event loop. The listener stays the caller's. `close` and `wait_closed` are those of
    asyncio's servers.
    """

    def __init__(self, listener: socket.socket, factory: Callable[[], asyncio.Protocol]) -> None:
        self._listener, self._factory = listener, factory
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[object]] = set()
        self._closed = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._starting, return_exceptions=True)

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("no connection can be accepted for %g s: %s", PAUSE_S, error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_S, self._listen)
                return
            starting = self._loop.create_task(self._start(connection))
            self._starting.add(starting)
            starting.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError:  # it went away meanwhile
            connection.close()
