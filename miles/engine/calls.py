"""One HTTP call: JSON out, JSON back; the `post` and `get` that plug-ins call; and the short-cut that skips the socket.

An engine that serves its API in this process registers its address (`register_local_engine`); `/generate` and
`/abort_request` requests of this process to that address go straight to it.

Whoever waits gets a result or an EngineError. A server that answers with an error status is not asked again; one that
cannot be reached is, a bounded number of times. There is no read time-out, because a long answer is no failure; a
connection that breaks is one.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from miles.engine.protocol import BadRequestError, GenerateRequest, GenerateResult, Json, is_batch
from miles.errors import EngineError
from miles.tasks import gather_or_cancel

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 1.0
"""Pause before a request is sent again."""

OCTETS = {"content-type": "application/octet-stream"}

MAX_CONNECTIONS = 4096
"""Connections of one event loop to all engines together, until `set_max_connections` says otherwise."""


class LocalEngine(Protocol):
    """What `LocalEngineClient` needs; `miles.engine.embedded.EmbeddedEngine` has it."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...
    def abort(self, rid: str | None = None, *, abort_all: bool = False) -> None: ...
    def flush_cache(self) -> bool: ...
    def pause(self, mode: str = "abort") -> None: ...
    def resume(self) -> None: ...
    @property
    def weight_version(self) -> str: ...
    def update_weights_from_disk(self, model_dir: str, version: str | None = None) -> None: ...


async def generate_json(engine: LocalEngine, payload: Json) -> Any:
    """Answer one /generate body: an object, or a list for a batch. If one of a batch fails, the others are aborted."""
    requests = GenerateRequest.from_payload(payload)
    if payload.get("stream"):
        raise BadRequestError("stream: this call returns one answer. Post to the engine's address to read a stream.")
    if not is_batch(payload):
        return (await engine.generate(requests[0])).to_json()
    results = await gather_or_cancel(engine.generate(request) for request in requests)
    return [result.to_json() for result in results]


# ---- engines of this process -----------------------------------------------------------------------------------------

_local_engines: dict[tuple[str, int], LocalEngine] = {}


def register_local_engine(base_url: str, engine: LocalEngine) -> None:
    """From now on, requests of this process to `base_url` go straight to `engine`."""
    _local_engines[_address(base_url)] = engine


def unregister_local_engine(base_url: str) -> None:
    _local_engines.pop(_address(base_url), None)


def local_engine_at(url: str) -> LocalEngine | None:
    """The engine of this process that serves `url`, if there is one."""
    return _local_engines.get(_address(url)) if _local_engines else None


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return ("127.0.0.1" if host == "localhost" else host), port


# ---- HTTP ------------------------------------------------------------------------------------------------------------

_http_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()
_max_connections = MAX_CONNECTIONS


def set_max_connections(count: int) -> None:
    """Bound the connections of clients that are made from now on; what is above it queues."""
    global _max_connections
    _max_connections = count


def http_client() -> httpx.AsyncClient:
    """The client of the running event loop (connections belong to one loop)."""
    loop = asyncio.get_running_loop()
    client = _http_clients.get(loop)
    if client is None:
        limits = httpx.Limits(max_connections=_max_connections, max_keepalive_connections=_max_connections)
        client = _http_clients[loop] = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
    return client


async def request_json(
    action: str, url: str, payload: Any = None, *, retries: int = 0, headers: Mapping[str, str] | None = None
) -> Any:
    """One HTTP call: decoded JSON, or text where the body is not JSON.

    `action` is an httpx method name, a payload of bytes is sent as it is. EngineError carries the status of an answer
    that is not a success, and names the address where there was no answer after `retries` more attempts.
    """
    local = await _short_cut(action, url, payload)
    if local is not None:
        return local
    for attempt in range(retries + 1):
        try:
            response = await _send(action, url, payload, headers or {})
            break
        except httpx.TransportError as error:
            if attempt == retries:
                detail = str(error) or type(error).__name__
                tries = "one attempt" if attempt == 0 else f"{attempt + 1} attempts"
                raise EngineError(f"{url}: no answer after {tries}: {detail}") from error
            await asyncio.sleep(RETRY_PAUSE_S)
    if response.is_error:
        raise EngineError(f"{url}: {_error_text(response)}", status=response.status_code)
    try:
        return response.json()
    except ValueError:
        return response.text


async def _short_cut(action: str, url: str, payload: Any) -> Any:
    """The answer of an engine of this process for the two calls that matter for speed; None for anything else."""
    engine = local_engine_at(url)
    path = urlsplit(url).path if engine is not None else ""
    if engine is None or action != "post" or not isinstance(payload, dict):
        return None
    if path == "/generate":
        return await generate_json(engine, payload)
    if path == "/abort_request":
        engine.abort(payload.get("rid"), abort_all=bool(payload.get("abort_all")))
        return ""
    return None


async def _send(action: str, url: str, payload: Any, headers: Mapping[str, str]) -> httpx.Response:
    client = http_client()
    if action in ("get", "delete"):
        if payload:
            raise ValueError(f"{action} {url}: a {action} request carries no payload, got {payload!r}")
        return await client.request(action.upper(), url, headers=headers)
    if isinstance(payload, bytes):
        return await client.request(action.upper(), url, content=payload, headers={**OCTETS, **headers})
    return await client.request(action.upper(), url, json=payload or {}, headers=headers)


def _error_text(response: httpx.Response) -> str:
    """The engine's own sentence where it gave one, else the start of its answer."""
    try:
        body = response.json()
    except ValueError:
        return f"HTTP {response.status_code}: {response.text[:500]}"
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return f"HTTP {response.status_code}: {message}"


# ---- what plug-ins call ----------------------------------------------------------------------------------------------


async def post(url: str, payload: Any, max_retries: int = 60, action: str = "post") -> Any:
    """Send JSON to an engine, a router or a reward service, as published: any failure is tried again after a second.

    `action` names an httpx method; `get` and `delete` carry no payload. After `max_retries` attempts the last error is
    raised. A request that an engine refuses as malformed is not repeated.
    """
    for attempt in range(max(max_retries, 1)):
        try:
            return await request_json(action, url, payload)
        except BadRequestError:
            raise
        except EngineError as error:
            if error.status == 400 or attempt + 1 >= max_retries:
                raise
            if attempt % 10 == 0:
                logger.warning("%s (attempt %d of %d, trying again)", error, attempt + 1, max_retries)
        await asyncio.sleep(RETRY_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


async def get(url: str) -> Any:
    """GET without retries; JSON, or text where the body is not JSON."""
    return await request_json("get", url)
