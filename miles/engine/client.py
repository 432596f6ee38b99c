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
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from miles.engine.guard import bearer
from miles.engine.protocol import BadRequestError, GenerateRequest, GenerateResult, Json, is_batch
from miles.errors import EngineError

T = TypeVar("T")

logger = logging.getLogger(__name__)

CONNECT_RETRIES = 3
"""How often a request is sent again when the engine could not be reached."""

CONTROL_TIMEOUT_S = 60.0
"""Within this an engine answers what is no generation and no weight update."""

WEIGHTS_TIMEOUT_S = 600.0
"""Within this it takes a weight update."""

STATE_TIMEOUT_S = 2.0
"""How long an engine that has not answered in time is asked why."""

RETRY_PAUSE_S = 1.0
"""Pause before a request is sent again."""

OCTETS = {"content-type": "application/octet-stream"}

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
    results = await gather_or_cancel(engine.generate(request) for request in requests)
    return [result.to_json() for result in results]


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """`asyncio.gather` that leaves nothing running behind: the first error cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class HttpEngineClient:
    """An engine behind an address, for instance `http://127.0.0.1:30000`.

    Generation may take as long as it takes; every other call has a deadline. When it passes, the EngineError says who
    waited for whom and what the engine said last.
    """

    def __init__(
        self,
        base_url: str,
        *,
        who: str = "this process",
        control_timeout_s: float = CONTROL_TIMEOUT_S,
        weights_timeout_s: float = WEIGHTS_TIMEOUT_S,
    ) -> None:
        """`who` waits, for messages: "the driver", "rank 0 of the trainer"."""
        self.base_url, self.who = base_url.rstrip("/"), who
        self.control_timeout_s, self.weights_timeout_s = control_timeout_s, weights_timeout_s

    async def generate(self, payload: Json) -> Any:
        url = f"{self.base_url}/generate"
        return await request_json("post", url, payload, retries=CONNECT_RETRIES, headers=bearer())

    async def abort(self, rid: str) -> None:
        await self._control("/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        await self._control("/abort_request", {"abort_all": True})

    async def flush_cache(self) -> None:
        await self._control("/flush_cache", {})

    async def pause(self, mode: str = "abort") -> None:
        await self._control("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._control("/continue_generation", {})

    async def weight_version(self) -> str:
        info = await self._control("/get_model_info", None)
        return str(info["weight_version"])

    async def server_info(self) -> Json:
        """Settings and state of the engine."""
        info: Json = await self._control("/get_server_info", None)
        return info

    async def healthy(self) -> bool:
        try:
            response = await _http_client().get(f"{self.base_url}/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        return response.is_success

    # ---- memory --------------------------------------------------------------------------------------------------

    async def release_memory(self, tags: Sequence[str] | None = None) -> None:
        """Have the engine give memory back: `kv_cache`, `weights`, `cuda_graph`; None: all. EngineError while it runs
        requests."""
        await self._control("/release_memory_occupation", {} if tags is None else {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        """Have it take the memory again."""
        await self._control("/resume_memory_occupation", {} if tags is None else {"tags": list(tags)})

    # ---- weights -------------------------------------------------------------------------------------------------

    async def update_weights_from_disk(self, model_path: str, version: str | None = None) -> None:
        await self._weights("/update_weights_from_disk", {"model_path": model_path}, version)

    async def update_weights_from_shared_memory(self, version: str | None = None) -> None:
        """The memory that the engine inherited holds other weights now. It must have been paused meanwhile."""
        await self._weights("/update_weights_from_shared_memory", {}, version)

    async def begin_weight_update(self) -> None:
        """Weights follow in parts, of which the engine uses none before `end_weight_update`."""
        await self._weights("/begin_weight_update", {}, None)

    async def end_weight_update(self) -> None:
        await self._weights("/end_weight_update", {}, None)

    async def update_weights_from_safetensors(self, data: bytes, version: str | None = None) -> None:
        """All weights, or a part of them in an update that has begun, as a safetensors file. Embedded engines only:
        SGLang takes pickles."""
        path = "/update_weights_from_tensor" + (f"?weight_version={quote(version, safe='')}" if version else "")
        await self._bounded(path, data, self.weights_timeout_s, retries=0)

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
    ) -> None:
        """Returns when all members are there: the caller joins as rank 0 meanwhile."""
        payload: Json = {"master_address": master_address, "master_port": master_port, "rank_offset": rank_offset}
        payload |= {"world_size": world_size, "group_name": group_name, "backend": backend}
        await self._weights("/init_weights_update_group", payload, None)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group_name: str,
        version: str | None = None,
        flush_cache: bool = True,
    ) -> None:
        """Have the engine receive tensors, which rank 0 broadcasts meanwhile, in this order."""
        payload: Json = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        payload |= {"group_name": group_name, "flush_cache": flush_cache}
        await self._weights("/update_weights_from_distributed", payload, version)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._weights("/destroy_weights_update_group", {"group_name": group_name}, None)

    async def weights_checker(self, action: str, **options: Any) -> Json:
        """`snapshot`, `reset_tensors`, `compare` or `checksum`; EngineError names the parameters that differ."""
        payload = {"action": action, **options}
        answer: Json = await self._bounded("/weights_checker", payload, self.weights_timeout_s, retries=0)
        return answer

    async def get_weights_by_name(self, name: str, truncate_size: int = 100) -> Any:
        """The first values of one parameter, as nested lists."""
        return await self._control("/get_weights_by_name", {"name": name, "truncate_size": truncate_size})

    # ---- waiting -------------------------------------------------------------------------------------------------

    async def _control(self, path: str, payload: Json | None) -> Any:
        return await self._bounded(path, payload, self.control_timeout_s, retries=CONNECT_RETRIES)

    async def _weights(self, path: str, payload: Json, version: str | None) -> None:
        named = payload if version is None else payload | {"weight_version": version}
        # Once only: an engine that got the first of two has begun to wait for a broadcast, or has ended its update.
        await self._bounded(path, named, self.weights_timeout_s, retries=0)

    async def _bounded(self, path: str, payload: Json | bytes | None, timeout_s: float, *, retries: int) -> Any:
        action = "get" if payload is None else "post"
        try:
            async with asyncio.timeout(timeout_s):
                url = f"{self.base_url}{path}"
                return await request_json(action, url, payload, retries=retries, headers=bearer())
        except TimeoutError as error:
            raise EngineError(
                f"{self.who} waited {timeout_s:g} s for {self.base_url}{path}: no answer came. {await self._state()}"
            ) from error

    async def _state(self) -> str:
        """What the engine says about itself, for a message."""
        try:
            url = f"{self.base_url}/get_server_info"
            info = (await _http_client().get(url, headers=bearer(), timeout=STATE_TIMEOUT_S)).json()
        except (httpx.HTTPError, ValueError) as error:
            return f"It does not say either how it is ({str(error) or type(error).__name__})."
        last = info.get("last_error") if isinstance(info, dict) else None
        return f"It answers otherwise; its last error: {last or 'none'}."


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
    client = _http_client()
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
