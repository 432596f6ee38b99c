"""What the driver and the trainer's processes say to each other, over a local pipe between processes of one run.

    driver ── Setup, then one Command after the other ──►  each rank (`worker`)
    driver ◄── Logged and Stepped while it works, then Done or Failed ── each rank

A command says itself what a worker does on it. Only processes of the run hold ends of these pipes; nothing that comes
from a network is read from them.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from miles import errors
from miles.config import RunConfig
from miles.errors import HookError, MilesError, TrainerError
from miles.types import Failure

if TYPE_CHECKING:
    from miles.batch import TrainBatch
    from miles.hooks.stats import Counts
    from miles.trainer.actor import Restoring, TrainReport
    from miles.trainer.heldout import LossSums
    from miles.trainer.schedule import Schedule
    from miles.trainer.worker import Worker
    from miles.weights.shared_memory import Layout

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Setup:
    """What a rank is told first.

    `weights_fd` is the shared memory of the engine's weights, on rank 0. `dies_with_parent`: the driver's thread that
    started this process lives as long as the driver, so that the kernel may watch over it.
    """

    rank: int
    size: int
    rendezvous: Path
    config: RunConfig
    device: str
    weights_fd: int | None
    bundles: Path
    import_path: list[str]
    parent: int
    dies_with_parent: bool


# ---- from the driver -----------------------------------------------------------------------------------------------


class Command(Generic[T_co]):
    """`run` is executed by the worker; what it returns, or raises, comes back to the driver."""

    def run(self, worker: Worker) -> T_co:
        raise NotImplementedError


@dataclass(frozen=True)
class Load(Command["tuple[Layout, int]"]):
    """Bind plug-ins to `args`, build the model and put its weights where the engine can read them."""

    args: Namespace

    def run(self, worker: Worker) -> tuple[Layout, int]:
        return worker.load(self.args)


@dataclass(frozen=True)
class Prepare(Command[None]):
    """Everything else that training needs; `args` as plug-ins are to see it."""

    args: Namespace
    schedule: Schedule

    def run(self, worker: Worker) -> None:
        worker.prepare(self.args, self.schedule)


@dataclass(frozen=True)
class Restore(Command[None]):
    folder: Path
    how: Restoring

    def run(self, worker: Worker) -> None:
        worker.actor.restore(self.folder, self.how)


@dataclass(frozen=True)
class RestoreCritic(Command[None]):
    folder: Path
    with_optimizer: bool

    def run(self, worker: Worker) -> None:
        worker.actor.restore_critic(self.folder, with_optimizer=self.with_optimizer)


@dataclass(frozen=True)
class Train(Command["tuple[TrainReport, dict[str, Counts]]"]):
    """One rollout; `shard` is this rank's. With the report come the counts of plug-in calls, by plug point."""

    rollout_id: int
    shard: TrainBatch
    global_batch_size: int

    def run(self, worker: Worker) -> tuple[TrainReport, dict[str, Counts]]:
        return worker.train(self.rollout_id, self.shard, self.global_batch_size)


@dataclass(frozen=True)
class Evaluate(Command["dict[str, LossSums]"]):
    """The loss of evaluation sets; every rank gets all shards and takes its own."""

    sets: Mapping[str, Sequence[TrainBatch]]

    def run(self, worker: Worker) -> dict[str, LossSums]:
        return worker.actor.evaluate_shards(self.sets)


@dataclass(frozen=True)
class UpdateWeights(Command[int]):
    def run(self, worker: Worker) -> int:
        return worker.actor.update_weights()


@dataclass(frozen=True)
class Save(Command[None]):
    folder: Path
    with_optimizer: bool
    background: bool
    critic_folder: Path | None

    def run(self, worker: Worker) -> None:
        worker.save(self)


@dataclass(frozen=True)
class FinishSaving(Command[None]):
    def run(self, worker: Worker) -> None:
        worker.actor.finish_saving()


@dataclass(frozen=True)
class Saved(Command["dict[str, Counts]"]):
    """A checkpoint is in force. What comes back are the counts of the plug-in that is told."""

    rollout_id: int
    folder: Path
    hf_folder: Path | None

    def run(self, worker: Worker) -> dict[str, Counts]:
        return worker.saved(self)


@dataclass(frozen=True)
class Export(Command[None]):
    folder: Path

    def run(self, worker: Worker) -> None:
        worker.actor.export_hf(self.folder)


@dataclass(frozen=True)
class GetPlugInState(Command[dict[str, Any]]):
    def run(self, worker: Worker) -> dict[str, Any]:
        return worker.hooks.state_dict()


@dataclass(frozen=True)
class SetPlugInState(Command[None]):
    state: Mapping[str, Any]

    def run(self, worker: Worker) -> None:
        worker.hooks.load_state_dict(self.state)


# ---- from a rank ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logged:
    """One call of the tracker on rank 0."""

    metrics: dict[str, Any]
    step_key: str | None
    rollout_id: int | None


@dataclass(frozen=True)
class Stepped:
    """An optimizer step is over."""


@dataclass(frozen=True)
class Done:
    value: Any


@dataclass(frozen=True)
class Failed:
    """An error as text, because not every exception can be sent. `kind` is the name of a class in `miles.errors`; of
    any other exception it is empty and `message` holds the traceback.

    Example: `Failed("HookError", "--custom-loss-function-path my.loss failed at my.py:3 ...", Failure(...))`
    """

    kind: str
    message: str
    failure: Failure | None = None

    @staticmethod
    def of(error: BaseException, trace: str) -> Failed:
        if isinstance(error, MilesError):
            failure = error.failure if isinstance(error, HookError) else None
            return Failed(type(error).__name__, str(error), failure)
        return Failed("", trace)

    def error(self, who: str) -> MilesError:
        """The same error in this process."""
        if not self.kind:
            return TrainerError(f"{who} failed:\n{self.message.rstrip()}", consequence=True)
        cls: type[MilesError] = getattr(errors, self.kind)
        error = cls.__new__(cls, self.message)  # their constructors take what the message was made of
        error.args = (self.message,)
        if isinstance(error, TrainerError):
            error.consequence = False
        if isinstance(error, HookError):
            assert self.failure is not None
            error.failure = self.failure
        return error


Event = Logged | Stepped | Done | Failed


# ---- the pipe ------------------------------------------------------------------------------------------------------


def send(connection: Connection, message: Setup | Command[Any] | Event | None) -> None:
    """Whole values, tensors included: `Connection.send` would pass tensors as descriptors that live on elsewhere."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Raises EOFError or OSError where the other end is gone."""
    return pickle.loads(connection.recv_bytes())
