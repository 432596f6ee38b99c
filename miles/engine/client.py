"""Talking to engines: one interface, over HTTP (`HttpEngineClient`) or into an engine of this process.

Payloads and answers are SGLang's JSON in both cases (`protocol.py`), so a caller cannot tell the two apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from miles.engine.calls import LocalEngine, generate_json, http_client, request_json
from miles.engine.guard import bearer
from miles.engine.protocol import BadRequestError, Json
from miles.errors import EngineError

CONNECT_RETRIES = 3
"""How often a request is sent again when the engine could not be reached."""

CONTROL_TIMEOUT_S = 60.0
"""Within this an engine answers what is no generation and no weight update."""

WEIGHTS_TIMEOUT_S = 600.0
"""Within this it takes a weight update."""

STATE_TIMEOUT_S = 2.0
"""How long an engine that has not answered in time is asked why."""


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
            response = await http_client().get(f"{self.base_url}/health", timeout=5.0)
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
            info = (await http_client().get(url, headers=bearer(), timeout=STATE_TIMEOUT_S)).json()
        except (httpx.HTTPError, ValueError) as error:
            return f"It does not say either how it is ({str(error) or type(error).__name__})."
        last = info.get("last_error") if isinstance(info, dict) else None
        return f"It answers otherwise; its last error: {last or 'none'}."
