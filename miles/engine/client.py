"""Talking to engines: one interface, over HTTP or into an engine of this process, and the `post` that plug-ins call.

Payloads and answers are SGLang's JSON in both cases (`protocol.py`), so a caller cannot tell the two apart. An engine
that serves its API in this process registers its address (`register_local_engine`); `/generate` and `/abort_request`
requests of this process to that address then skip the socket.

Whoever waits gets a result or an EngineError. An engine that answers with an error status is not asked again; one that
cannot be reached is, a bounded number of times. There is no read time-out, because a long answer is no failure; a
connection that breaks is one.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from miles.engine.protocol import BadRequestError, GenerateRequest, GenerateResult, Json, is_batch
from miles.errors import EngineError

logger = logging.getLogger(__name__)

CONNECT_RETRIES = 3
"""How often a request is sent again when the engine could not be reached."""

RETRY_PAUSE_S = 1.0
"""Pause before a request is sent again."""

MAX_CONNECTIONS = 4096
"""Connections of one event loop to all engines together, until `set_max_connections` says otherwise."""


class EngineClient(Protocol):
    """What the rollout side asks of an engine. Payloads are those of SGLang's endpoints of the same name."""

    base_url: str

    async def generate(self, payload: Json) -> Any:
        """POST /generate: an object for one prompt, a list for a batch."""

    async def abort(self, rid: str) -> None:
        """End one request; whoever waits for it gets what it has so far."""

    async def abort_all(self) -> None:
        """End all requests."""

    async def flush_cache(self) -> None:
        """Forget prefixes; EngineError while requests run."""

    async def pause(self, mode: str = "abort") -> None:
        """Stop generating: abort, retract or in_place."""

    async def resume(self) -> None:
        """Go on after `pause`."""

    async def weight_version(self) -> str:
        """The version that new tokens are sampled under."""

    async def update_weights_from_disk(self, model_path: str, version: str | None = None) -> None:
        """Load a Hugging Face folder that the engine can read."""

    async def healthy(self) -> bool:
        """Whether the engine answers."""


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


class LocalEngineClient:
    """An engine of this process. Control calls wait for a step to end in a thread, never in the event loop."""

    def __init__(self, engine: LocalEngine, base_url: str = "local") -> None:
        self.engine, self.base_url = engine, base_url

    async def generate(self, payload: Json) -> Any:
        return await generate_json(self.engine, payload)

    async def abort(self, rid: str) -> None:
        self.engine.abort(rid)

    async def abort_all(self) -> None:
        self.engine.abort(abort_all=True)

    async def flush_cache(self) -> None:
        if not await asyncio.to_thread(self.engine.flush_cache):
            raise BadRequestError("flush_cache: requests are running. Abort them or wait, then flush.")

    async def pause(self, mode: str = "abort") -> None:
        await asyncio.to_thread(self.engine.pause, mode)

    async def resume(self) -> None:
        await asyncio.to_thread(self.engine.resume)

    async def weight_version(self) -> str:
        return self.engine.weight_version

    async def update_weights_from_disk(self, model_path: str, version: str | None = None) -> None:
        await asyncio.to_thread(self.engine.update_weights_from_disk, model_path, version)

    async def healthy(self) -> bool:
        return True


async def generate_json(engine: LocalEngine, payload: Json) -> Any:
    """Answer one /generate body: an object, or a list for a batch. If one of a batch fails, the others are aborted."""
    requests = GenerateRequest.from_payload(payload)
    if payload.get("stream"):
        raise BadRequestError("stream: this call returns one answer. Post to the engine's address to read a stream.")
    if not is_batch(payload):
        return (await engine.generate(requests[0])).to_json()
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    try:
        return [result.to_json() for result in await asyncio.gather(*tasks)]
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class HttpEngineClient:
    """An engine behind an address, for instance `http://127.0.0.1:30000`."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")

    async def generate(self, payload: Json) -> Any:
        return await self._call("post", "/generate", payload)

    async def abort(self, rid: str) -> None:
        await self._call("post", "/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        await self._call("post", "/abort_request", {"abort_all": True})

    async def flush_cache(self) -> None:
        await self._call("post", "/flush_cache", {})

    async def pause(self, mode: str = "abort") -> None:
        await self._call("post", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._call("post", "/continue_generation", {})

    async def weight_version(self) -> str:
        info = await self._call("get", "/get_model_info", None)
        return str(info["weight_version"])

    async def update_weights_from_disk(self, model_path: str, version: str | None = None) -> None:
        payload = {"model_path": model_path} | ({} if version is None else {"weight_version": version})
        await self._call("post", "/update_weights_from_disk", payload)

    async def healthy(self) -> bool:
        try:
            response = await _http_client().get(f"{self.base_url}/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        return response.is_success

    async def _call(self, action: str, path: str, payload: Json | None) -> Any:
        return await request_json(action, f"{self.base_url}{path}", payload, retries=CONNECT_RETRIES)


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


def _http_client() -> httpx.AsyncClient:
    """The client of the running event loop (connections belong to one loop)."""
    loop = asyncio.get_running_loop()
    client = _http_clients.get(loop)
    if client is None:
        limits = httpx.Limits(max_connections=_max_connections, max_keepalive_connections=_max_connections)
        client = _http_clients[loop] = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
    return client


async def request_json(action: str, url: str, payload: Any = None, *, retries: int = 0) -> Any:
    """One HTTP call: decoded JSON, or text where the body is not JSON.

    `action` is an httpx method name. EngineError carries the status of an answer that is not a success, and names the
    address where there was no answer after `retries` more attempts.
    """
    local = await _short_cut(action, url, payload)
    if local is not None:
        return local
    for attempt in range(retries + 1):
        try:
            response = await _send(action, url, payload)
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


async def _send(action: str, url: str, payload: Any) -> httpx.Response:
    client = _http_client()
    if action in ("get", "delete"):
        if payload:
            raise ValueError(f"{action} {url}: a {action} request carries no payload, got {payload!r}")
        return await client.request(action.upper(), url)
    return await client.request(action.upper(), url, json=payload or {})


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
