"""The parts of a run as awaitable handles, here each with a thread of its own in this process.

    driver (event loop of the main thread)
      ├── RolloutRole ── thread "rollout" ── RolloutManager: data source, rollout function, conversion
      └── TrainRole ──── the engine's thread ─ TrainActor: log-probs, advantages, optimizer steps

The driver sees only these methods, each awaitable, each running its role's calls one after the other. On a cluster the
same two classes hold Ray actors instead of objects and nothing else changes; a critic and a reference model are further
`TrainRole`s. Values handed over are the manager's shards (there: references to them).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from miles.engine.embedded.engine import EmbeddedEngine
    from miles.run.manager import EvalReport, RolloutManager, RolloutReport
    from miles.trainer.actor import TrainReport
    from miles.trainer.heldout import LossSums
    from miles.trainer.trainer import Trainer

P = ParamSpec("P")
T = TypeVar("T")


class RoleThread:
    """A thread that runs calls one after the other. A daemon: an impatient Ctrl-C must not wait for a long step."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    async def call(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        future: Future[T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """No more calls; returns at once, the call in progress goes on."""
        self._calls.put(None)


class EngineThread:
    """The embedded engine's thread, for a trainer that shares the cores with it (see `EmbeddedEngine.submit`)."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine

    async def call(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._engine.submit(lambda: fn(*args, **kwargs)))

    def close(self) -> None:
        """The engine's own `close` ends it."""


class RolloutRole:
    """Whoever makes batches."""

    def __init__(self, manager: RolloutManager) -> None:
        self.manager, self._thread = manager, RoleThread("rollout")

    async def generate(self, rollout_id: int) -> RolloutReport:
        return await self._thread.call(self.manager.generate, rollout_id)

    async def evaluate(self, done: int) -> EvalReport | None:
        """Evaluate the model after `done` rollouts."""
        return await self._thread.call(self.manager.eval, done)

    async def add_losses(self, report: EvalReport, losses: Mapping[str, LossSums]) -> EvalReport:
        """The report with what the trainer said of its conversations."""
        return await self._thread.call(self.manager.add_losses, report, losses)

    async def save(self, rollout_id: int) -> None:
        await self._thread.call(self.manager.save, rollout_id)

    async def load(self, rollout_id: int) -> None:
        await self._thread.call(self.manager.load, rollout_id)

    def close(self) -> None:
        self._thread.close()


class TrainRole:
    """Whoever turns batches into weights: an actor in this process, or a group of ranks; each call waits for all."""

    def __init__(self, trainer: Trainer, thread: RoleThread | EngineThread) -> None:
        self.trainer, self._thread = trainer, thread

    async def train(self, rollout_id: int, rollout: RolloutReport) -> TrainReport:
        """Train on a rollout; every data-parallel rank takes its shard."""
        return await self._thread.call(
            self.trainer.train_shards, rollout_id, rollout.shards, rollout.global_batch_size
        )

    async def evaluate(self, report: EvalReport) -> dict[str, LossSums]:
        """The loss of the report's conversations, by evaluation set."""
        return await self._thread.call(self.trainer.evaluate_shards, report.conversations)

    async def update_weights(self) -> int:
        """Hand the weights to the engines; the version that they serve from now on."""
        return await self._thread.call(self.trainer.update_weights)

    async def call(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn` where this role's calls run, after those before it (saving, exporting)."""
        return await self._thread.call(fn, *args, **kwargs)

    def close(self) -> None:
        self._thread.close()
