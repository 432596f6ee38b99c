"""The rollout's way to a fleet: everything that generates goes through the router, what controls goes to each engine.

A request that fails because an engine or the router went away is sent again when there is one that serves; nothing of
the first attempt is used, so a sample comes out once. A request that is refused is not repeated.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from miles.engine.calls import request_json
from miles.engine.client import HttpEngineClient
from miles.engine.fleet import Fleet
from miles.engine.guard import bearer
from miles.engine.member import Member
from miles.engine.protocol import Json
from miles.errors import EngineError

ROUTING_KEY = "x-miles-routing-key"
# Pause before a request is sent again; between two looks at whether anybody serves.
PAUSE_S = 0.2
# Answers that say nothing about the request: nobody serves, the way is broken, too much at once.
COME_BACK = (429, 502, 503, 504)
# How often a request may find everybody serving and fail all the same.
MAX_FAILURES = 20


class FleetClient:
    """Implements `EngineClient` for a fleet and its router."""

    def __init__(self, fleet: Fleet, *, timeout_s: float) -> None:
        """`timeout_s`: how long a request may take, waiting for an engine included."""
        self.fleet, self.base_url, self.timeout_s = fleet, fleet.router_url, timeout_s

    async def generate(self, payload: Json) -> Any:
        """POST /generate through the router."""
        deadline = time.monotonic() + self.timeout_s
        headers = bearer() | _affinity(payload)
        failures = 0
        while True:
            self.fleet.raise_failure()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    return await request_json("post", f"{self.base_url}/generate", payload, headers=headers)
            except TimeoutError:
                raise self._too_late("an answer", "") from None
            except EngineError as error:
                if error.status is not None and error.status not in COME_BACK:
                    raise
                failures += 1
                if failures > MAX_FAILURES:
                    raise
                await self._serving_again(deadline, error)

    async def _serving_again(self, deadline: float, error: EngineError) -> None:
        """Wait until a request may be sent again."""
        self.fleet.suspect()
        await asyncio.sleep(PAUSE_S)
        while not self.fleet.is_ready:
            self.fleet.raise_failure()
            if time.monotonic() > deadline:
                raise self._too_late("an engine", f" The last error of a request: {error}") from error
            await asyncio.sleep(PAUSE_S)
        self.fleet.raise_failure()

    def _too_late(self, what: str, more: str) -> EngineError:
        state = self.fleet.state_of_all()
        return EngineError(
            f"a request waited {self.timeout_s:g} s (--sglang-router-request-timeout-secs) for {what}. {state}.{more}"
        )

    # ---- control: to each engine that serves; one that is away has nothing to stop -------------------------------

    async def _each(self, act: Any) -> None:
        async def one(member: Member) -> None:
            try:
                await act(HttpEngineClient(member.url))
            except EngineError as error:
                if error.status is not None:
                    raise
                self.fleet.suspect()

        await asyncio.gather(*(one(member) for member in self.fleet.serving))

    async def abort(self, rid: str) -> None:
        await self._each(lambda engine: engine.abort(rid))

    async def abort_all(self) -> None:
        await self._each(lambda engine: engine.abort_all())

    async def flush_cache(self) -> None:
        await self._each(lambda engine: engine.flush_cache())

    async def pause(self, mode: str = "abort") -> None:
        await self._each(lambda engine: engine.pause(mode))

    async def resume(self) -> None:
        await self._each(lambda engine: engine.resume())

    async def weight_version(self) -> str:
        return self.fleet.version

    async def update_weights_from_disk(self, model_path: str, version: str | None = None) -> None:
        await self._each(lambda engine: engine.update_weights_from_disk(model_path, version))

    async def healthy(self) -> bool:
        return self.fleet.is_ready


def _affinity(payload: Json) -> dict[str, str]:
    """Answers to the same prompt go to the same engine, which then computes its keys and values once."""
    prompt = payload.get("input_ids") or payload.get("text")
    if isinstance(prompt, list):
        prompt = tuple(prompt)
    try:
        return {ROUTING_KEY: f"{hash(prompt):x}"} if prompt else {}
    except TypeError:  # a batch
        return {}
