"""HTTP/1.1 to one engine: a pool of connections on which requests go out and answers come back as they are.

Bytes pass through: bodies are neither parsed nor copied more than once. Which engine is asked, and what an error means
for the request, is the business of `forward`.

    connection = await upstream.open()          a pooled one, or a new one
    connection.begin(method, head, body)        the request is written
    await connection.answered()                 status and headers are there
    chunk, more = await connection.read()       until `more` is False
    upstream.release(connection)                back into the pool, or closed

An answer is read into memory as far as READ_AHEAD; then the engine waits until `read` has taken it.
"""

from __future__ import annotations

import asyncio
import os
from typing import cast
from urllib.parse import urlsplit

import httptools

from miles.engine.guard import bearer

READ_AHEAD = 256 * 1024
"""Bytes of one answer that are kept for a slow client before the engine has to wait."""

MAX_HEAD = 256 * 1024
"""Bytes before the body of an answer; more is no HTTP server."""

CONNECT_TIMEOUT_S = 5.0

Headers = list[tuple[bytes, bytes]]

# Headers that speak about one connection, not about the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade".split()
)


class UpstreamError(Exception):
    """An engine could not be asked, or its answer broke off. `reused`: on a connection from the pool."""

    def __init__(self, message: str, *, reused: bool = False) -> None:
        self.reused = reused
        super().__init__(message)


class Connection(asyncio.Protocol):
    """One connection and the answer that it carries at the moment.

    After `answered`: `status`, and `headers` (names in lower case, hop-by-hop ones left out).
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.transport: asyncio.Transport | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.busy = self.reused = False
        self.status = 0
        self.headers: Headers = []
        self._loop = upstream.loop
        self._can_write: asyncio.Future[None] | None = None
        self._write_paused = False

    # ---- the caller's side

    def begin(self, method: str, head: bytes, body: bytes) -> None:
        """Write a request, or what there is of its body. Raises UpstreamError where the connection is gone."""
        if self.transport is None or self.transport.is_closing():
            raise UpstreamError("closed the connection", reused=self.reused)
        self.busy = True
        self.status, self.headers = 0, []
        self._without_body = method == "HEAD"
        self._head_size = 0
        self._interim = self._until_close = self._complete = self._keep = self._read_paused = False
        self._chunks: list[bytes] = []
        self._size = 0
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        if len(body) < READ_AHEAD:
            self.transport.write(head + body)
        else:
            self.transport.writelines([head, body])

    async def write(self, data: bytes) -> None:
        """More of the request's body; waits while the engine does not read. Raises UpstreamError."""
        self._check()
        assert self.transport is not None
        self.transport.write(data)
        if self._write_paused:
            self._can_write = self._loop.create_future()
            await self._can_write
            self._check()

    @property
    def has_answered(self) -> bool:
        return self.status != 0

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._complete or bool(self._chunks)

    async def answered(self) -> None:
        """Wait for status and headers. Raises UpstreamError."""
        while not self.status:
            self._check()
            await self._wait()

    async def read(self) -> tuple[bytes, bool]:
        """What has arrived of the body, and whether more may come. Raises UpstreamError where it breaks off."""
        while not self._chunks and not self._complete:
            self._check()
            await self._wait()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks, self._size = [], 0
        if self._read_paused and self.transport is not None:
            self._read_paused = False
            self.transport.resume_reading()
        return data, not self._complete

    def abort(self) -> None:
        """Close at once: the engine sees that nobody waits for its answer."""
        self.busy = False
        if self.transport is not None:
            self.transport.abort()

    def end(self) -> bool:
        """Whether another request may follow; closes the connection otherwise."""
        assert self.transport is not None
        self.busy = False
        if self._complete and self._keep and not self._write_paused and not self.transport.is_closing():
            return True
        self.transport.abort()
        return False

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, message: str) -> None:
        if self.busy and not self._complete and self._error is None:
            self._error = UpstreamError(message, reused=self.reused and not self._head_size)
            self._wake()
            self.resume_writing()
        if self.transport is not None:
            self.transport.abort()

    # ---- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy and self.status and self._until_close and exc is None:
            self._complete = True
            self._wake()
        elif self.busy:
            self._fail("cut the connection" if self._head_size else "closed the connection without an answer")
        self.transport = None
        self.upstream.forget(self)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)

    def data_received(self, data: bytes) -> None:
        if not self.busy or self._complete:  # nobody has asked
            self._keep = False
            assert self.transport is not None
            self.transport.abort()
            return
        if not self.status:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._fail(f"sent more than {MAX_HEAD} bytes of headers")
                return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("wants to change to another protocol")
        except httptools.HttpParserError as error:
            self._keep = False
            self._fail(f"answered what is not HTTP ({error})")

    # ---- the parser's side

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status < 200:
            self._interim, self.headers = True, []
            return
        if status > 599:
            raise ValueError(f"status {status}")
        self._keep = self.parser.should_keep_alive() and not self._without_body
        self.headers = self._end_to_end(self.headers, status)
        self.status = status
        if self._without_body:
            self._complete = True
        self._wake()

    def _end_to_end(self, headers: Headers, status: int) -> Headers:
        kept, framed, named = [], self._without_body or status in (204, 304), b""
        for header in headers:
            name = header[0]
            if name in HOP_BY_HOP:
                framed = framed or name == b"transfer-encoding"
                if name == b"connection" and header[1].lower() not in (b"close", b"keep-alive"):
                    named += b"," + header[1].lower()
                continue
            framed = framed or name == b"content-length"
            kept.append(header)
        self._until_close = not framed
        if named:
            also = {token.strip() for token in named.split(b",")}
            kept = [header for header in kept if header[0] not in also]
        return kept

    def on_body(self, data: bytes) -> None:
        if self._without_body:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > READ_AHEAD and not self._read_paused and self.transport is not None:
            self._read_paused = True
            self.transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        self._complete = True
        self._wake()


class Upstream:
    """The connections to one engine. Belongs to the event loop that uses it.

    Example: `Upstream("http://10.0.0.7:30001")`
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.authority = parts.netloc.rpartition("@")[2].encode()
        self.prefix = parts.path.rstrip("/").encode()
        self.loop = asyncio.get_running_loop()
        self._idle: dict[Connection, None] = {}  # the one used last comes first

    async def open(self, *, fresh: bool = False) -> Connection:
        """A connection to send one request on; `fresh`: not from the pool. Raises UpstreamError."""
        while self._idle and not fresh:
            connection, _ = self._idle.popitem()
            if connection.transport is not None and not connection.transport.is_closing():
                connection.reused = True
                return connection
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await self.loop.create_connection(lambda: Connection(self), self.host, self.port)
        except TimeoutError as error:
            raise UpstreamError(f"did not accept a connection within {CONNECT_TIMEOUT_S:g} s") from error
        except OSError as error:
            what = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise UpstreamError(f"cannot be reached: {what}") from error
        return connection

    def release(self, connection: Connection) -> None:
        """After an answer was read to its end: keep the connection for another request if that is possible."""
        if connection.end():
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Close what is idle; connections in use end with their requests."""
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()


async def fetch(url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """GET on a connection of its own: status and body. Raises UpstreamError, also where it takes longer.

    Example: `await fetch("http://127.0.0.1:30001", "/health", 5.0)` -> `(200, b"")`
    """
    upstream = Upstream(url)
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            connection = await upstream.open()
            target = upstream.prefix + path.encode()
            token = b"".join(b"%b: %b\r\n" % (k.encode(), v.encode("latin-1")) for k, v in bearer().items())
            head = b"GET %b HTTP/1.1\r\nhost: %b\r\n%bconnection: close\r\n\r\n" % (target, upstream.authority, token)
            connection.begin("GET", head, b"")
            await connection.answered()
            body, more = b"", True
            while more:
                chunk, more = await connection.read()
                body += chunk
                if len(body) > READ_AHEAD:
                    raise UpstreamError(f"answered {path} with more than {READ_AHEAD} bytes")
            return connection.status, body
    except TimeoutError as error:
        raise UpstreamError(f"no answer to {path} within {timeout_s:g} s") from error
    finally:
        if connection is not None:
            connection.abort()
