"""Who trains: the model in this process, or in processes of its own. `launch` sees no difference.

    this process      the engine reads the trainer's own tensors; both compute in the engine's thread
    its own           several, or Megatron's, even if it is one: the engine reads memory that rank 0 writes; the driver
                      only waits for the ranks
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from miles.config import RunConfig
from miles.engine.embedded.engine import EmbeddedEngine, in_passing_thread
from miles.engine.fleet import Fleet
from miles.hooks import Hooks
from miles.observe.tracking import Tracker
from miles.run import host
from miles.run.roles import EngineThread, RoleThread, TrainRole
from miles.trainer.group import RankGroup
from miles.trainer.models import Models
from miles.trainer.schedule import Schedule
from miles.weights import WeightTransport
from miles.weights.in_process import InProcess
from miles.weights.memory import Memory
from miles.weights.shared_memory import SharedMemory, anonymous_file
from miles.weights.to_fleet import ToFleet


@dataclass(frozen=True)
class Surroundings:
    """What a trainer is handed once all of it exists. `target` is None where nothing is generated."""

    args: Namespace
    hooks: Hooks
    tracker: Tracker
    schedule: Schedule
    target: EmbeddedEngine | Fleet | None
    on_step: Callable[[], None]


class LoadedTrainer(Protocol):
    """A model that is loaded, and not ready to train yet."""

    def weights(self) -> Mapping[str, Tensor]:
        """What an engine in this process may read in place."""

    def memory(self) -> Memory:
        """A copy of the weights that other processes may read, brought up to date by every weight update."""

    def role(self, given: Surroundings) -> TrainRole: ...


def load(config: RunConfig, args: Namespace, hooks: Hooks, run_dir: Path, stack: ExitStack) -> LoadedTrainer:
    """Load the model, or start the processes that do; they end with `stack`."""
    if config.cluster.world_size == 1 and config.train.train_backend == "fsdp":
        return OneProcess(config, args, hooks, stack)
    environment = {**os.environ, **host.memory_environment()}
    return OwnProcesses(stack.enter_context(RankGroup.start(config, args, run_dir / "ranks", environment)))


class OneProcess:
    def __init__(self, config: RunConfig, args: Namespace, hooks: Hooks, stack: ExitStack) -> None:
        self.models = in_passing_thread(lambda: Models(config, args, hooks))
        self._stack, self._bucket_bytes = stack, config.rollout.update_weight_buffer_size
        self._shared: tuple[SharedMemory, Memory] | None = None

    def weights(self) -> Mapping[str, Tensor]:
        return self.models.actor.weights()

    def memory(self) -> Memory:
        if self._shared is None:
            fd = anonymous_file()
            self._stack.callback(os.close, fd)
            writer = SharedMemory(fd, self._bucket_bytes)
            self._shared = writer, Memory(fd, *writer.share(self.models.actor.weights()))
        return self._shared[1]

    def role(self, given: Surroundings) -> TrainRole:
        actor = self.models.trainer(
            given.args,
            given.hooks,
            given.tracker,
            given.schedule,
            transport=self._transport(given.target),
            on_step=given.on_step,
        )
        shares_cores = isinstance(given.target, EmbeddedEngine)
        return TrainRole(actor, EngineThread(given.target) if shares_cores else RoleThread("train"))

    def _transport(self, target: EmbeddedEngine | Fleet | None) -> WeightTransport | None:
        if target is None:
            return None
        if isinstance(target, EmbeddedEngine):
            return InProcess(target)
        assert self._shared is not None, "a fleet is started with the memory"
        return ToFleet(*self._shared, target)


class OwnProcesses:
    def __init__(self, group: RankGroup) -> None:
        self.group = group

    def weights(self) -> Mapping[str, Tensor]:
        return self.group.weights()

    def memory(self) -> Memory:
        return self.group.memory()

    def role(self, given: Surroundings) -> TrainRole:
        self.group.prepare(
            given.args, given.hooks, given.tracker, given.schedule, engine=given.target, on_step=given.on_step
        )
        return TrainRole(self.group, RoleThread("train"))
