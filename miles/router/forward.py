"""One request's way to an engine and back, as an ASGI application.

    1 read      the body, as far as it is kept for another attempt (REPLAY)
    2 enter     the gate: a bounded number of requests is on its way, the others wait in line
    3 pick      an engine (`balance`); where all are held, wait for one
    4 ask       the request goes out; status and headers come back
    5 relay     status, headers and body go to the client as they arrive

Until 5 nothing has reached the client, so a connection that fails in 3 or 4 means another engine, a bounded number of
times. From 5 on it can only be cut. Nothing is parsed but the head: bodies are bytes.

Every request in flight is a `Flight`. A sweep looks at them all a few times a second: those that have lasted get
somebody who watches for the client to hang up, those over the time limit are ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from miles.router.balance import WorkerTable
from miles.router.gate import Gate, LineFull
from miles.router.message import Outgoing, Receive, Refused, ResponseCut, Scope, Send, send_error
from miles.router.settings import RouterSettings
from miles.router.upstream import Connection, Upstream, UpstreamError

logger = logging.getLogger("miles.router")

REPLAY = 1024 * 1024
"""Bytes of a request's body that are kept for another attempt. A longer body is sent as it arrives, to one engine."""

MAX_ATTEMPTS = 3
"""Engines that one request is sent to: a request that kills engines must not kill all of them."""

SWEEP_S = 0.25
"""How often the requests in flight are looked at."""

WATCH_AFTER_S = 1.0
"""A request that lasts longer gets a task that waits for its client to hang up: shorter ones do not pay for it."""

GONE, TIMEOUT, STOPPING = "the client hung up", "timeout", "stopping"

CLIENT_GONE = 499
"""Status that nobody reads: the client hung up."""


class Flight:
    """One request in flight."""

    __slots__ = ("began", "receive", "status", "task", "watcher", "why")

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.receive: Receive | None = None  # set when the body has been read: then it tells of the disconnect
        self.status = 0  # what was sent to the client
        self.task = asyncio.current_task()
        self.watcher: asyncio.Task[None] | None = None
        self.why: str | None = None

    def stop(self, why: str) -> None:
        if self.why is None and self.task is not None:
            self.why = why
            self.task.cancel()


class Forwarder:
    """The ASGI application in front of all engines of `table`."""

    def __init__(self, table: WorkerTable, settings: RouterSettings) -> None:
        self.table, self.settings = table, settings
        self.gate = Gate(settings.max_connections, settings.max_waiting)
        self.answers: Counter[int] = Counter()  # by status
        self.retries = 0
        self._flights: dict[Flight, None] = {}
        self._sweeping = False
        self._upstreams: dict[str, Upstream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ResponseCut where the answer breaks off after its head."""
        self._in_loop()
        flight = Flight()
        self._flights[flight] = None
        if not self._sweeping:
            self._sweep_later()
        try:
            await self._carry(flight, scope, receive, send)
        except Refused as refused:
            await self._refuse(flight, refused, send)
        except asyncio.CancelledError:
            if flight.why is None or flight.task is None:
                raise
            flight.task.uncancel()
            await self._stopped(flight, send)
        finally:
            del self._flights[flight]
            if flight.watcher is not None:
                flight.watcher.cancel()
            self.answers[flight.status] += 1

    def _in_loop(self) -> None:
        """Connections belong to one event loop: another one starts without any."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._upstreams, self._changed, self._sweeping = loop, {}, asyncio.Event(), False
            self.gate = Gate(self.settings.max_connections, self.settings.max_waiting)

    # ---- the way there and back

    async def _carry(self, flight: Flight, scope: Scope, receive: Receive, send: Send) -> None:
        request = Outgoing(scope)
        limit = self.settings.max_body
        if request.length is not None and request.length > limit:
            raise too_large(request.length, limit)
        body, more = await _first_part(receive)
        if len(body) > limit:
            raise too_large(len(body), limit)
        if not more:
            flight.receive = receive
        try:
            await self.gate.enter()
        except LineFull:
            raise Refused(
                429,
                f"{self.gate.inside} requests are on their way and {self.gate.waiting} wait, which is the limit. "
                "Send fewer at once, or raise --max-connections or --max-waiting of the router.",
                retry_after_s=1,
            ) from None
        try:
            await self._attempts(flight, request, body, receive if more else None, send)
        finally:
            self.gate.leave()

    async def _attempts(self, flight: Flight, request: Outgoing, body: bytes, rest: Receive | None, send: Send) -> None:
        """`rest`: where the body goes on, None where `body` is all of it."""
        table = self.table
        tried: dict[str, str] = {}
        while True:
            url = table.pick(request.key, tried=tried) if len(tried) < MAX_ATTEMPTS else None
            if url is None and not tried:
                url = await self._wait_for_worker(request)
            if url is None:
                raise self._nobody(tried)
            try:
                connection = await self._ask(url, flight, request, body, rest)
            except UpstreamError as error:
                table.finish(url)
                tried[url] = str(error)
                self._failed(url, str(error))
                if isinstance(error, SentInPart):
                    raise self._nobody(tried) from error
                self.retries += 1
                continue
            except BaseException:
                table.finish(url)
                raise
            try:
                table.succeeded(url)
                await self._relay(url, flight, connection, send)
            finally:
                table.finish(url)
            return

    async def _ask(self, url: str, flight: Flight, request: Outgoing, body: bytes, rest: Receive | None) -> Connection:
        """The connection on which the head of an answer has arrived. Raises UpstreamError."""
        upstream = self._upstreams.get(url)
        if upstream is None:
            upstream = self._upstreams[url] = Upstream(url)
        length = len(body) if rest is None else request.length
        fresh = rest is not None  # what cannot be sent twice does not go where the engine may be hanging up
        while True:
            connection = await upstream.open(fresh=fresh)
            try:
                connection.begin(request.method, request.head(upstream, length), _framed(body, length))
                if rest is not None:
                    await self._send_rest(flight, connection, request, len(body), rest)
                await connection.answered()
                return connection
            except UpstreamError as error:
                connection.abort()
                if rest is not None:
                    raise SentInPart(str(error)) from error
                # An idle connection that the engine had closed says nothing about the engine.
                if not error.reused:
                    raise
                fresh = True
            except BaseException:
                connection.abort()
                raise

    async def _send_rest(
        self, flight: Flight, connection: Connection, request: Outgoing, sent: int, receive: Receive
    ) -> None:
        """The body beyond what is kept, as it comes. Stops early where the engine answers before it has read it."""
        length, limit, more = request.length, self.settings.max_body, True
        while more and not connection.has_answered:
            message = await receive()
            if message["type"] == "http.disconnect":
                flight.status = CLIENT_GONE
                raise ResponseCut(GONE)
            chunk, more = message.get("body", b""), message.get("more_body", False)
            sent += len(chunk)
            if sent > limit:
                raise too_large(sent, limit)
            if chunk:
                await connection.write(_framed(chunk, length))
        if not more:
            flight.receive = receive
            if length is None:
                await connection.write(b"0\r\n\r\n")

    async def _relay(self, url: str, flight: Flight, connection: Connection, send: Send) -> None:
        """Status, headers and body. The connection goes back into the pool, or is closed where anything goes wrong."""
        finished = False
        try:
            chunk, more = await connection.read() if connection.ready else (b"", True)
            flight.status = connection.status
            await send({"type": "http.response.start", "status": connection.status, "headers": connection.headers})
            if chunk or not more:
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
            while more:
                chunk, more = await connection.read()
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
            finished = True
        except UpstreamError as error:
            logger.warning("%s %s in the middle of an answer, which is cut", url, error)
            self._failed(url, f"{error} in the middle of an answer")
            raise ResponseCut(f"{url} {error}") from error
        finally:
            if finished:
                connection.upstream.release(connection)
            else:
                connection.abort()

    # ---- engines

    def _failed(self, url: str, error: str) -> None:
        if self.table.failed(url, error, self.settings.failure_threshold):
            logger.warning("%s is quarantined: %s", url, error)

    def changed(self) -> None:
        """Engines came or came back: requests that wait for one look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed.clear()

    def forget(self, url: str) -> None:
        """Close the idle connections to an engine that was removed."""
        upstream = self._upstreams.pop(url, None)
        if upstream is not None:
            upstream.close()

    def stop(self) -> None:
        """End what is in flight: with 503, or cut where an answer has begun."""
        for flight in self._flights:
            flight.stop(STOPPING)

    def close(self) -> None:
        """Close the idle connections to all engines."""
        for url in list(self._upstreams):
            self.forget(url)

    async def _wait_for_worker(self, request: Outgoing) -> str | None:
        """While all engines are held: the first one that comes back in time."""
        assert self._changed is not None
        try:
            async with asyncio.timeout(self.settings.worker_wait_s if self.table.counts else 0):
                while (url := self.table.pick(request.key)) is None:
                    await self._changed.wait()
                return url
        except TimeoutError:
            return None

    def _nobody(self, tried: dict[str, str]) -> Refused:
        """503, with the workers and the last error of each."""
        table = self.table
        if not table.counts:
            message = "No worker is registered. POST /add_worker?url=http://HOST:PORT adds one."
            return Refused(503, message, retry_after_s=1)
        if tried:
            what = "; ".join(f"{url} {error}" for url, error in tried.items())
            others = len(table.counts) - len(tried)
            more = f" ({others} more were not asked)" if others > 0 else ""
            return Refused(503, f"No worker answered: {what}{more}.", retry_after_s=1)
        states = "; ".join(
            f"{url} is {table.state(url)}" + (f" ({error})" if (error := table.errors.get(url)) else "")
            for url in table.counts
        )
        waited = f"within {self.settings.worker_wait_s:g} s"
        return Refused(503, f"No healthy workers available in the pool {waited}: {states}.", retry_after_s=1)

    # ---- the sweep, and ends that are not answers of an engine

    def _sweep_later(self) -> None:
        assert self._loop is not None
        self._sweeping = True
        self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Runs while there are requests in flight."""
        self._sweeping = False
        now, limit = time.monotonic(), self.settings.timeout_s
        for flight in self._flights:
            age = now - flight.began
            if limit is not None and age > limit:
                flight.stop(TIMEOUT)
            elif flight.receive is not None and flight.watcher is None and age > WATCH_AFTER_S:
                flight.watcher = asyncio.create_task(_watch(flight), name="miles-router-watch")
        if self._flights:
            self._sweep_later()

    async def _stopped(self, flight: Flight, send: Send) -> None:
        if flight.why == GONE:
            flight.status = CLIENT_GONE
            raise ResponseCut(GONE)
        if flight.status:
            raise ResponseCut(flight.why or "")
        if flight.why == STOPPING:
            refused = Refused(503, "The router is stopping.")
        else:
            limit = f"{self.settings.timeout_s:g} s (--miles-router-timeout)"
            refused = Refused(504, f"The request took longer than {limit}.")
        await self._refuse(flight, refused, send)

    async def _refuse(self, flight: Flight, refused: Refused, send: Send) -> None:
        flight.status = refused.status
        await send_error(send, refused.status, refused.message, retry_after_s=refused.retry_after_s)


class SentInPart(UpstreamError):
    """It failed after a part of the body that is not kept had been sent: no other engine can be asked."""


def too_large(size: int, limit: int) -> Refused:
    return Refused(413, f"The body has {size} bytes, at most {limit} are allowed (--max-body-mb of the router).")


async def _first_part(receive: Receive) -> tuple[bytes, bool]:
    """The body up to REPLAY bytes and a bit, and whether more follows. CancelledError where the client is gone."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False):
        return body, False
    parts, size = [body], len(body)
    while True:
        if message["type"] == "http.disconnect":
            raise Refused(CLIENT_GONE, GONE)
        if not message.get("more_body", False):
            return b"".join(parts), False
        if size > REPLAY:
            return b"".join(parts), True
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])


def _framed(data: bytes, length: int | None) -> bytes:
    """A chunk of chunked encoding where the length of the whole is not known."""
    return data if length is not None else b"%x\r\n%b\r\n" % (len(data), data)


async def _watch(flight: Flight) -> None:
    assert flight.receive is not None
    while (await flight.receive())["type"] != "http.disconnect":
        pass
    flight.stop(GONE)
