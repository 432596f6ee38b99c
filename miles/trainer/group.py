"""A trainer in several processes, as the driver sees it: what `TrainActor` is for one process, for all ranks together.

    driver                                      rank 0 .. n - 1 (`worker`), each a process
      train(shards) ────── a shard each ──────►   TrainActor.train      ranks meet in collectives
      update_weights ─────────────────────────►   rank 0 writes the engine's memory
      save, export ───────────────────────────►   each its own shards

Every command goes to all ranks and waits for all. The first that fails or dies ends the others at once: they may wait
for it in a collective, where nothing else would reach them. The ranks end with the driver, however it ends: their pipes
close.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

import miles
from miles.batch import TrainBatch
from miles.config import RunConfig
from miles.errors import FlagError, MilesError, TrainerError
from miles.hooks import Hooks
from miles.hooks.stats import Counts
from miles.observe.tracking import Tracker
from miles.trainer.actor import Restoring, TrainReport
from miles.trainer.commands import (
    Command,
    Done,
    Evaluate,
    Event,
    Export,
    Failed,
    FinishSaving,
    GetPlugInState,
    Load,
    Logged,
    Prepare,
    Restore,
    RestoreCritic,
    Save,
    Saved,
    SetPlugInState,
    Setup,
    Stepped,
    Train,
    UpdateWeights,
    receive,
    send,
)
from miles.trainer.heldout import LossSums
from miles.trainer.schedule import Schedule
from miles.weights import Receiver
from miles.weights.memory import Memory
from miles.weights.shared_memory import anonymous_file

T = TypeVar("T")

# After the first failure, how long the others may take to tell theirs: a rank that lost its neighbour fails, too.
GRACE_S = 1.0
# The same where the failure has a cause of its own. Another rank's death is known at once, and may be behind it.
MOMENT_S = 0.1
# How long ranks may take to end by themselves once there is nothing left to do.
FAREWELL_S = 5.0
# Lines of a dead rank's output that its epitaph repeats.
LAST_LINES = 12


class Death(TrainerError):
    """A process has ended without saying why."""


class Process:
    """One rank's process, its pipe and its output, which goes to a file and, of rank 0, to the driver's stderr."""

    def __init__(self, rank: int, size: int, log: Path, environment: Mapping[str, str], fds: Sequence[int]) -> None:
        self.rank, self.size, self.log = rank, size, log
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "miles.trainer.worker", str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno(), *fds],
                process_group=0,  # Ctrl-C is for the driver
            )
        self.connection = Connection(ours.detach())
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, name=f"miles-rank-{rank}", daemon=True)
        self._reader.start()

    @property
    def name(self) -> str:
        return f"rank {self.rank} of the trainer's {self.size} processes"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode(errors="backslashreplace")
                self._last.append(text.rstrip())
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a") as file:
                    file.write(text)
                if self.rank == 0:
                    sys.stderr.write(text)

    def epitaph(self) -> Death:
        """How the process ended, and what it said last."""
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            how = "has closed its pipe"
        else:
            how = f"ended with exit status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ", by somebody or by the system for want of memory"
        self._reader.join(GRACE_S)
        said = "\n  ".join(self._last)
        return Death(f"{self.name} {how}. " + (f"Its last output:\n  {said}" if said else "It printed nothing."))

    def ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(GRACE_S)


@dataclass
class RankGroup:
    """Start with `start`; leave to end every process.

    `weight_version` and `steps_done` are those of the ranks, which count alike.
    """

    config: RunConfig
    args: Namespace
    processes: list[Process]
    weights_fd: int
    rendezvous: Path
    weight_version: int = 0
    steps_done: int = 0
    tracker: Tracker | None = None
    hooks: Hooks | None = None
    engine: Receiver | None = None
    on_step: Callable[[], None] = lambda: None
    _memory: Memory | None = None
    _resumed: bool = False

    @staticmethod
    def start(config: RunConfig, args: Namespace, folder: Path, environment: Mapping[str, str]) -> RankGroup:
        """Start the processes and give them the model to load; does not wait for it. Their output goes to `folder`."""
        size = config.cluster.world_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        group = RankGroup(config, args, [], anonymous_file(), Path(tempfile.mkdtemp(prefix="miles-ranks-")))
        try:
            for rank in range(size):
                fds = [group.weights_fd] if rank == 0 else []
                own = rank_environment(environment, rank, size, device) | config.train.train_env_vars
                log = folder / f"rank_{rank}.log"
                group.processes.append(Process(rank, size, log, {k: str(v) for k, v in own.items()}, fds))
            for process in group.processes:
                send(process.connection, group._setup(process.rank, size, device, folder))
        except BaseException:
            group.close()
            raise
        return group

    def _setup(self, rank: int, size: int, device: str, folder: Path) -> Setup:
        return Setup(
            rank=rank,
            size=size,
            rendezvous=self.rendezvous / "store",
            config=self.config,
            device=device,
            weights_fd=self.weights_fd if rank == 0 else None,
            bundles=folder.parent / "failures" / f"rank_{rank}",
            import_path=list(sys.path),
            parent=os.getpid(),
            dies_with_parent=threading.current_thread() is threading.main_thread(),
        )

    # ---- as TrainActor -------------------------------------------------------------------------------------------

    def weights(self) -> Mapping[str, Tensor]:
        """The weights in the memory that rank 0 writes to, after the model has been loaded."""
        return self.memory().tensors

    def memory(self) -> Memory:
        if self._memory is None:
            layout, size = self._all(Load(portable(self.args)))[0]
            self._memory = Memory(self.weights_fd, layout, size)
        return self._memory

    def prepare(
        self,
        args: Namespace,
        hooks: Hooks,
        tracker: Tracker,
        schedule: Schedule,
        *,
        engine: Receiver | None,
        on_step: Callable[[], None],
    ) -> None:
        """Bind plug-ins and build the actors. `args` is handed over as it is now."""
        self.tracker, self.hooks, self.engine, self.on_step = tracker, hooks, engine, on_step
        self.weights()
        self._all(Prepare(portable(args), schedule))

    def restore(self, folder: Path, how: Restoring) -> None:
        self._all(Restore(folder, how))
        self.weight_version, self.steps_done, self._resumed = how.weight_version, how.steps_done, True

    def restore_critic(self, folder: Path, *, with_optimizer: bool) -> None:
        self._all(RestoreCritic(folder, with_optimizer))

    def train_shards(self, rollout_id: int, shards: Sequence[TrainBatch], global_batch_size: int) -> TrainReport:
        """Train on a rollout, one shard per rank; the report is rank 0's."""
        assert self.hooks is not None
        if self._resumed:
            self._all(SetPlugInState({hook.point.name: hook.save_state() for hook in self._with_state()}))
            self._resumed = False
        of_rank = [shards[self.config.layout.dp_rank(process.rank)] for process in self.processes]
        report, counts = self._each([Train(rollout_id, shard, global_batch_size) for shard in of_rank])[0]
        self._count(counts)
        self.steps_done += report.steps
        return report

    def evaluate_shards(self, sets: Mapping[str, Sequence[TrainBatch]]) -> dict[str, LossSums]:
        return self._all(Evaluate(sets))[0]

    def update_weights(self) -> int:
        """The engine does not step while its memory is written."""
        if self.engine is not None:
            self.engine.suspend()
        self.weight_version = self._all(UpdateWeights())[0]
        if self.engine is not None:
            self.engine.update_weights(self.weights(), str(self.weight_version))
        return self.weight_version

    def save(
        self, folder: Path, *, with_optimizer: bool, background: bool = False, critic_folder: Path | None = None
    ) -> None:
        """The model; and the driver's copies of the trainer's plug-ins, which write checkpoints, get rank 0's state."""
        self._all(Save(folder, with_optimizer, background, critic_folder))
        states = self._all(GetPlugInState())[0]
        for hook in self._with_state():
            if hook.point.name in states:
                hook.load_state(states[hook.point.name])

    def finish_saving(self) -> None:
        self._all(FinishSaving())

    def saved(self, rollout_id: int, folder: Path, hf_folder: Path | None) -> None:
        assert self.hooks is not None
        if self.hooks.custom_megatron_post_save_hook is not None:
            self._count(self._all(Saved(rollout_id, folder, hf_folder))[0])

    def _count(self, counts: Mapping[str, Counts]) -> None:
        """Calls of plug-ins on rank 0, which the driver reports."""
        assert self.hooks is not None
        for hook in self.hooks:
            if hook.point.name in counts:
                hook.stats.rollout.merge(counts[hook.point.name])

    def export_hf(self, folder: Path) -> None:
        self._all(Export(folder))

    def _with_state(self) -> list[Any]:
        assert self.hooks is not None
        return [hook for hook in self.hooks if hook.point.process == "trainer" and hook.has_state]

    # ---- commands ------------------------------------------------------------------------------------------------

    def _all(self, command: Command[T]) -> list[T]:
        return self._each([command] * len(self.processes))

    def _each(self, commands: Sequence[Command[T]]) -> list[T]:
        """One command per rank, and what each returned. Raises what the first of them raised; all are gone then."""
        if not self.processes:
            raise TrainerError("the trainer's processes have ended.")
        for process, command in zip(self.processes, commands, strict=True):
            try:
                send(process.connection, command)
            except OSError:
                self._fail({process.rank: process.epitaph()})
        results: dict[int, T] = {}
        while len(results) < len(commands):
            waiting = [p for p in self.processes if p.rank not in results]
            failures = self._receive(waiting, results, None)
            if failures:
                self._fail(failures)
        return [results[rank] for rank in range(len(commands))]

    def _receive(
        self, waiting: list[Process], results: dict[int, Any], timeout_s: float | None
    ) -> dict[int, MilesError]:
        """Take what has come from `waiting`: results are filed, events handled, failures returned by rank."""
        by_connection = {process.connection: process for process in waiting}
        failures: dict[int, MilesError] = {}
        for connection in wait(list(by_connection), timeout_s):
            process = by_connection[connection]  # type: ignore[index]
            try:
                event: Event = receive(process.connection)
            except (EOFError, OSError):
                failures[process.rank] = process.epitaph()
                continue
            if isinstance(event, Done):
                results[process.rank] = event.value
            elif isinstance(event, Failed):
                failures[process.rank] = event.error(process.name)
            elif isinstance(event, Logged):
                assert self.tracker is not None
                self.tracker.log(event.metrics, event.step_key, rollout_id=event.rollout_id)
            elif isinstance(event, Stepped):
                self.on_step()
        return failures

    def _fail(self, failures: dict[int, MilesError]) -> None:
        """End all ranks and raise the likeliest cause (`_likelihood`)."""
        begin = time.monotonic()
        while True:
            waiting = [p for p in self.processes if p.rank not in failures]
            grace = GRACE_S if all(_is_consequence(e) for e in failures.values()) else MOMENT_S
            left = begin + grace - time.monotonic()
            if not waiting or left <= 0 or any(isinstance(e, Death) for e in failures.values()):
                break
            failures |= self._receive(waiting, {}, left)
        self.close(at_once=True)
        raise min(failures.items(), key=lambda entry: (_likelihood(entry[1]), entry[0]))[1]

    # ---- the end -------------------------------------------------------------------------------------------------

    def close(self, *, at_once: bool = False) -> None:
        """No process is left when this returns."""
        deadline = time.monotonic() + (0.0 if at_once else FAREWELL_S)
        for process in self.processes:
            try:
                if not at_once:
                    send(process.connection, None)
                else:
                    process.connection.close()
            except OSError:
                continue
        for process in self.processes:
            if not process.ended_within(max(0.0, deadline - time.monotonic())):
                process.kill()
            process.connection.close()
        if self.processes or self.rendezvous.exists():
            shutil.rmtree(self.rendezvous, ignore_errors=True)
            os.close(self.weights_fd)
        self.processes = []

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(at_once=error is not None)


def _likelihood(error: MilesError) -> int:
    """Causes of a failure in order: a process that is gone, what miles says on purpose, what may be a consequence. A
    plug-in that waits for a process that is gone fails, too, and would get a card for it."""
    return 0 if isinstance(error, Death) else 2 if _is_consequence(error) else 1


def _is_consequence(error: MilesError) -> bool:
    return isinstance(error, TrainerError) and error.consequence


def rank_environment(environment: Mapping[str, str], rank: int, size: int, device: str) -> dict[str, str]:
    """What a rank's process finds: its share of the cores, its GPU, the loopback interface, and where miles is."""
    root = str(Path(miles.__file__).parents[1])
    path = environment.get("PYTHONPATH")
    own = {
        **environment,
        "PYTHONPATH": root if not path else f"{root}{os.pathsep}{path}",
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size)),
    }
    own.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if device == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    return own


def portable(args: Namespace) -> Namespace:
    """`args` as other processes get it. FlagError names an attribute that cannot be handed over."""
    for name, value in vars(args).items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise FlagError(
                "--actor-num-gpus-per-node",
                given=f"args.{name} ({type(value).__name__}) cannot be handed to the trainer's processes: {error}.",
                remedy="Let plug-ins keep such objects elsewhere, or train in one process.",
            ) from error
    return args
