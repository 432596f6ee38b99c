"""Workers without an engine: HTTP servers of a few lines that answer, or misbehave, as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Request:
    """One request as it came over the wire. Example: `Request("POST", "/generate?x=1", {...}, b"{}")`"""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    head: str = ""  # as it came, with headers that are there twice


Writer = asyncio.StreamWriter
Answer = Callable[[Request, Writer], Awaitable[None]]


def response(body: bytes = b"{}", status: int = 200, headers: str = "content-type: application/json\r\n") -> bytes:
    return b"HTTP/1.1 %d Whatever\r\n%bcontent-length: %d\r\n\r\n%b" % (status, headers.encode(), len(body), body)


async def answer_ok(request: Request, writer: Writer) -> None:
    writer.write(response(b'{"ok": true}'))


@dataclass
class Worker:
    """A worker that runs. `answer` takes every path but /health and /get_model_info; all of them may be changed."""

    answer: Answer = answer_ok
    healthy: bool = True
    version: str | None = None
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    server: asyncio.Server | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)  # a client hung up before it had its answer

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (request := await read_request(reader)) is not None:
                if not await self._answered(request, reader, writer):
                    break
        writer.close()

    async def _answered(self, request: Request, reader: asyncio.StreamReader, writer: Writer) -> bool:
        path = request.target.partition("?")[0]
        if path == "/health":
            writer.write(response(b"", 200 if self.healthy else 503))
        elif path == "/get_model_info":
            known = self.version is not None
            writer.write(response(json.dumps({"weight_version": self.version}).encode(), 200 if known else 404))
        else:
            self.requests.append(request)
            answering = asyncio.ensure_future(self.answer(request, writer))
            hung_up = asyncio.ensure_future(reader.read(1)) if not reader.at_eof() else None
            # Nothing more comes before the answer, unless the client goes.
            await asyncio.wait({answering, *([hung_up] if hung_up else [])}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
                self.lost.set()
                return False
            answering.result()
            if hung_up is not None:
                hung_up.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await hung_up
        await writer.drain()
        return not writer.is_closing()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """None where the client has closed the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while (size := int(await reader.readline(), 16)) > 0:
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, target, headers, body, head.decode("latin-1"))


@contextlib.asynccontextmanager
async def worker(answer: Answer = answer_ok, *, version: str | None = None, port: int = 0) -> AsyncIterator[Worker]:
    """A worker at a free port for the length of the block."""
    made = Worker(answer, version=version)
    made.server = await asyncio.start_server(made.serve, "127.0.0.1", port, limit=2**20)
    made.url = f"http://127.0.0.1:{made.server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        made.server.close()
