"""The messages that the router reads and writes itself: ASGI's types, the head of a request to an engine, refusals.

Where they go is decided in `forward`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from miles.router.upstream import HOP_BY_HOP, Headers, Upstream

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Request headers that are not sent on: those of the connection, and those that are made anew.
_DROPPED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_AFFINITY = frozenset((b"x-miles-session", b"x-session-id", b"x-miles-routing-key"))
_LOOKED_AT = _DROPPED | _AFFINITY
_SESSIONS = "/sessions/"


class Refused(Exception):
    """The router answers itself: status and a sentence."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        super().__init__(message)


class ResponseCut(Exception):
    """An answer broke off after its head had gone out; the connection to the client has to be cut.

    Where a middleware has held the head back, the client gets `status` and the sentence instead.
    """

    def __init__(self, message: str, status: int = 502) -> None:
        self.status = status
        super().__init__(message)


class Outgoing:
    """The head of a request as an engine gets it.

    `length`: the body's, None where the client did not say. `key`: for affinity.
    """

    __slots__ = ("key", "length", "lines", "method", "target")

    def __init__(self, scope: Scope) -> None:
        self.method: str = scope["method"]
        target: bytes = scope.get("raw_path") or scope["path"].encode()
        query: bytes = scope["query_string"]
        self.target = target + b"?" + query if query else target
        self.length: int | None = None
        self.key: bytes | None = None
        self.lines = b""
        lines, named = [], b""
        for name, value in scope["headers"]:
            if name in _LOOKED_AT:
                if name == b"content-length":
                    self.length = int(value)
                elif name in _AFFINITY:
                    self.key = self.key or value
                elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
                    named += b"," + value.lower()
                if name in _DROPPED:
                    continue
            lines.append(name + b": " + value)
        if named:
            also = {token.strip() for token in named.split(b",")}
            lines = [line for line in lines if line.partition(b":")[0] not in also]
        if lines:
            lines.append(b"")
        self.lines = b"\r\n".join(lines)
        path: str = scope["path"]
        if path.startswith(_SESSIONS):
            self.key = path[len(_SESSIONS) :].partition("/")[0].encode()

    def head(self, upstream: Upstream, length: int | None) -> bytes:
        """`length` None: the body follows in chunks."""
        framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
        if length == 0 and self.length is None:
            return b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (
                self.method.encode(), upstream.prefix, self.target, upstream.authority, self.lines,
            )  # fmt: skip
        return b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n\r\n" % (
            self.method.encode(), upstream.prefix, self.target, upstream.authority, self.lines, framing,
        )  # fmt: skip


async def send_error(send: Send, status: int, message: str, *, retry_after_s: int | None = None) -> None:
    """`{"error": {"message": ..., "code": ...}}`."""
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
