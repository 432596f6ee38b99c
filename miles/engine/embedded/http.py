"""What all endpoints of the engine's server share: bounded bodies, JSON in and out, errors, clients that hang up.

Bodies are read piece by piece and refused (413) where they grow beyond the limit of their endpoint, whatever their
header says. Every error is `{"error": {"message", "type", "code"}}`. Nothing here knows about engines.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from miles.engine.protocol import BadRequestError, Json
from miles.errors import EngineError, UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

CLIENT_GONE = 499
"""Status that nobody reads: the client hung up."""

DRAIN_BYTES = 1 << 30
"""How much of a body that is too large is still taken in, so that its sender comes to read the answer."""


@dataclass(frozen=True)
class Limits:
    """What the server bears. Example: `Limits(body_bytes=1 << 20, queued_requests=100)`"""

    body_bytes: int = 64 << 20  # of a request; weights have no limit
    queued_requests: int = 8192  # inside the server at a time, those that the engine runs included
    body_patience_s: float = 60.0  # without another byte of a body
    weights_timeout_s: float = 300.0  # for each step of a weight update that waits for somebody else


class TooLargeError(EngineError):
    """A body beyond the limit (HTTP 413)."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the body is larger than {limit} bytes. Send fewer prompts at a time, or start the server with a larger "
            "--max-body-bytes.",
            status=413,
        )


# ---- in --------------------------------------------------------------------------------------------------------------


async def read_body(request: Request, limit: int | None, patience_s: float) -> bytes:
    """The whole body. `limit` None: as large as it comes. EngineError (413, 408) where it is too large or stops."""
    announced = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size, too_large = 0, limit is not None and announced.isdigit() and int(announced) > limit
    while True:
        try:
            async with asyncio.timeout(patience_s):
                message = await request.receive()
        except TimeoutError as error:
            raise EngineError(f"the body stopped: no byte came for {patience_s:g} s.", status=408) from error
        if message["type"] == "http.disconnect":
            raise EngineError("the client hung up before it had sent its body.", status=CLIENT_GONE)
        part: bytes = message.get("body", b"")
        size += len(part)
        too_large = too_large or (limit is not None and size > limit)
        if too_large:
            parts.clear()
        else:
            parts.append(part)
        if not message.get("more_body") or (too_large and size > DRAIN_BYTES):
            break
    if too_large:
        assert limit is not None
        raise TooLargeError(limit)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_object(request: Request, limits: Limits, *, half_characters: bool = False) -> Json:
    """The JSON object of a request; nothing at all counts as `{}`. `half_characters`: the endpoint can take them."""
    raw = await read_body(request, limits.body_bytes, limits.body_patience_s)
    return decoded(raw, half_characters=half_characters)


def decoded(raw: bytes, *, half_characters: bool = False) -> Json:
    """BadRequestError says what is wrong with the JSON; one half of a surrogate pair is wrong unless it may come."""
    if not raw:
        return {}
    try:
        text = raw.decode()
        body = json.loads(text, parse_constant=_no_constant)
        if not half_characters and ("\\ud" in text or "\\uD" in text):
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadRequestError("the body is not usable: its JSON is nested too deeply.") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}.")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


async def read_model(request: Request, model: type[B], limits: Limits) -> B:
    """A body of fixed fields. BadRequestError names the field that is wrong."""
    return checked(model, await read_object(request, limits))


def checked(model: type[B], body: Json) -> B:
    try:
        return model.model_validate(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = get_close_matches(name[:100], list(model.model_fields), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise BadRequestError(f"unknown field {name[:100]!r}.{hint}") from error
        if first["type"] == "missing":
            raise BadRequestError(f"{name}: this field must be given.") from error
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise BadRequestError(f"{name}: expected {expected}, got {_short(first['input'])}.") from error


def _short(value: object) -> str:
    text = json.dumps(value, default=repr)[:2000] if isinstance(value, str | int | float | bool | None) else ""
    text = text or f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


# ---- out -------------------------------------------------------------------------------------------------------------


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(body), status, headers, media_type="application/json")


def encoded(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def error_body(message: str, status: int) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def status_of(error: Exception) -> int:
    if isinstance(error, EngineError):
        return error.status or 500
    if isinstance(error, HTTPException):
        return error.status_code
    return 400 if isinstance(error, UsageError) else 500


def add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        status = status_of(error)
        message = str(error)
        headers: dict[str, str] = {}
        if isinstance(error, HTTPException):
            message = f"{request.method} {request.url.path}: {error.detail}."
            headers = dict(error.headers or {})
        elif isinstance(error, TooLargeError):
            headers = {"connection": "close"}
        elif not isinstance(error, EngineError | UsageError):
            logger.error("%s failed", request.url.path, exc_info=error)
            message = f"{request.url.path} failed: {type(error).__name__}: {error}"
        return json_response(error_body(message, status), status, headers)

    for kind in (UsageError, EngineError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


# ---- clients that hang up --------------------------------------------------------------------------------------------


async def while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """The value of `work`; None, and `work` cancelled, where the client hangs up first. Its body has been read."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. The generator is closed as soon as the client hangs up.

    What fails before the first event is an ordinary error with its status, what fails later an event of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Json, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await self._events.aclose()
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send_all(self, send: Send) -> None:
        try:
            first = await anext(self._events)
        except StopAsyncIteration:
            first = None
        # What an event costs is one send: headers wait for the first one.
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        if first is not None:
            await send(_event(encoded(first)))
            try:
                async for event in self._events:
                    await send(_event(encoded(event)))
            except (EngineError, UsageError) as error:
                await send(_event(encoded(error_body(str(error), status_of(error)))))
        await send(_event(b"[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: bytes) -> Message:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
