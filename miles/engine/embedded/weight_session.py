"""Weights that reach an engine over the network, whole or bucket by bucket.

    begin -> add, add, ... -> end     buckets wait aside; `end` puts all of them to use at once, between two steps
    add alone                         all weights in one call

The engine generates from the old weights until then, so that no token ever comes from a mixture, and it keeps them, and
their version, where anything fails. A session that nobody goes on with is given up after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from torch import Tensor

from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.model import flat_names
from miles.engine.protocol import BadRequestError
from miles.errors import CheckpointError


class WeightSession:
    """At most one is open. Methods run in the server's event loop, one at a time."""

    def __init__(self, engine: EmbeddedEngine, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self._staged: dict[str, Tensor] | None = None
        self._version: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        return self._staged is not None

    def begin(self) -> None:
        if self._staged is not None:
            raise BadRequestError(
                "begin_weight_update: an update is under way. Call /end_weight_update first, or wait until it is given "
                f"up {self._timeout_s:g} s after its last bucket."
            )
        self._staged, self._version = {}, None
        self._wait()

    async def add(self, tensors: Mapping[str, Tensor], version: str | None) -> str:
        """Returns a sentence about what happened. CheckpointError for tensors that do not fit this model."""
        self.check(tensors)
        if self._staged is None:
            await asyncio.to_thread(self._engine.update_some_weights, tensors, version)
            return f"{len(tensors)} tensors in use, version {self._engine.weight_version}."
        self._staged.update(tensors)
        self._version = self._version if version is None else version
        self._wait()
        return f"{len(self._staged)} tensors wait for /end_weight_update."

    async def end(self) -> str:
        if self._staged is None:
            raise BadRequestError("end_weight_update: no update is under way. Call /begin_weight_update first.")
        staged, version = self._staged, self._version
        self._forget()
        if not staged:
            return "Nothing was sent."
        await asyncio.to_thread(self._engine.update_some_weights, staged, version)
        return f"{len(staged)} tensors in use, version {self._engine.weight_version}."

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """CheckpointError for names or shapes that are not this model's; BadRequestError for a part of the weights
        outside a session. Tensors may be of the meta device, which have shapes alone."""
        expected = self._engine.weight_shapes
        flat = flat_names(self._engine.model, tensors)
        for name, tensor in flat.items():
            if name not in expected:
                raise CheckpointError(f"{name!r} is no weight of this model, which has {len(expected)} others.")
            if tuple(tensor.shape) != expected[name]:
                raise CheckpointError(f"{name}: expected shape {list(expected[name])}, got {list(tensor.shape)}.")
        missing = next((name for name in expected if name not in flat), None)
        if missing is not None and self._staged is None:
            raise BadRequestError(
                f"these are {len(flat)} of {len(expected)} weights ({missing!r} is missing). Send all of them in one "
                "call, or in parts between /begin_weight_update and /end_weight_update."
            )

    def give_up(self) -> None:
        """Forget what has come so far; the engine keeps the weights that it has."""
        if self._staged is not None:
            self._engine.last_error = (
                f"a weight update was given up: nothing came for {self._timeout_s:g} s after {len(self._staged)} "
                "tensors. The old weights are in use."
            )
        self._forget()

    def _forget(self) -> None:
        self._staged, self._version = None, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self.give_up)
