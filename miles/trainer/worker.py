"""One rank of a trainer in several processes: `python -m miles.trainer.worker FD`, started by `group.RankGroup`.

    main thread      commands, one after the other: the backend and its `TrainActor`, as in a run of one process
    reader thread    takes commands from the pipe; when the pipe closes, the driver has gone, and so does this process

Plug-ins of the trainer's side are bound again here, from the same `args`; they live in every rank. Metrics go to the
driver, which has the trackers and the record. SIGINT and SIGTERM are the driver's business: a rank ends with its pipe.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import queue
import random
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from miles.hooks import Hooks, bind
from miles.hooks.catalog import CATALOG
from miles.hooks.stats import Counts
from miles.hooks.watchdog import Watchdog
from miles.observe.jsonable import as_number
from miles.observe.logging import configure_logger
from miles.observe.timers import timer
from miles.observe.tracking import Tracker
from miles.observe.tracking import install as install_tracker
from miles.trainer.actor import TrainActor, TrainReport
from miles.trainer.commands import Command, Done, Event, Failed, Logged, Save, Saved, Setup, Stepped, receive, send
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks
from miles.weights.shared_memory import SharedMemory

if TYPE_CHECKING:
    from miles.batch import TrainBatch
    from miles.trainer.schedule import Schedule
    from miles.weights.shared_memory import Layout

PR_SET_PDEATHSIG = 1


class Pipe:
    """This rank's end. Commands are read by a thread of its own, events may be sent by any."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._commands: queue.SimpleQueue[Command[Any] | Exception | None] = queue.SimpleQueue()
        self._sending = threading.Lock()

    def setup(self) -> Setup:
        setup = receive(self._connection)
        assert isinstance(setup, Setup)
        threading.Thread(target=self._read, name="miles-commands", daemon=True).start()
        return setup

    def _read(self) -> None:
        while True:
            try:
                command = receive(self._connection)
            except (EOFError, OSError):
                os._exit(1)  # wherever the main thread is: nobody waits for it any more
            except Exception as error:  # something of a plug-in's that this process cannot rebuild
                command = error
            self._commands.put(command)

    def next(self) -> Command[Any] | None:
        """None: the run is over."""
        command = self._commands.get()
        if isinstance(command, Exception):
            raise command
        return command

    def send(self, event: Event) -> None:
        with self._sending:
            send(self._connection, event)


class Recorder(Tracker):
    """The tracker of a rank: rank 0 hands everything to the driver, the others' metrics are the same."""

    def __init__(self, pipe: Pipe, rank: int) -> None:
        super().__init__()
        self._pipe, self._rank = pipe, rank

    def log(self, metrics: Mapping[str, Any], step_key: str | None = None, *, rollout_id: int | None = None) -> None:
        if self._rank == 0:
            plain = {name: value if as_number(value) is None else as_number(value) for name, value in metrics.items()}
            self._pipe.send(Logged(plain, step_key, rollout_id))


class Worker:
    """What commands act on."""

    hooks: Hooks
    actor: TrainActor

    def __init__(self, setup: Setup, pipe: Pipe, stack: ExitStack) -> None:
        self.setup, self.config, self.pipe, self._stack = setup, setup.config, pipe, stack
        # Ranks that hold the same samples draw the same numbers: plug-ins run on each of them.
        seed = self.config.run.seed + self.config.layout.dp_rank(setup.rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(self.config.train.deterministic_mode)
        cluster = self.config.cluster
        self.ranks = Ranks.join(
            setup.rank,
            setup.size,
            setup.rendezvous,
            backend=cluster.distributed_backend,
            cpu_backend=self.config.train.fsdp_cpu_backend,
            timeout_s=60.0 * cluster.distributed_timeout_minutes,
            device=setup.device,
        )
        stack.callback(self.ranks.leave)
        self.transport = SharedMemory(setup.weights_fd, self.config.rollout.update_weight_buffer_size)

    def load(self, args: Namespace) -> tuple[Layout, int]:
        """Bind plug-ins, which may have a part in how the model is made, and make it. `args` are kept for all later
        calls."""
        run = self.config.run
        args.rank = self.setup.rank
        self.args = args
        self.hooks = bind(
            trainer_side(args),
            policies=run.hook_policy,
            forms=run.hook_form,
            timeout_s=run.hook_timeout_s,
            error_budget=run.hook_error_budget,
        )
        self.hooks.set_bundle_dir(self.setup.bundles)
        self._stack.enter_context(Watchdog(self.hooks, [], on_stuck=self._stuck))
        self.models = Models(self.config, args, self.hooks, self.ranks)
        return self.transport.share(self.models.actor.weights())

    def prepare(self, args: Namespace, schedule: Schedule) -> None:
        """The rest; what `args` have become meanwhile is told to plug-ins through the Namespace that they know."""
        vars(self.args).update({**vars(args), "rank": self.setup.rank})
        tracker = Recorder(self.pipe, self.setup.rank)
        install_tracker(tracker)
        self.actor = self.models.trainer(
            self.args, self.hooks, tracker, schedule, transport=self.transport, on_step=self._on_step
        )

    def train(
        self, rollout_id: int, shard: TrainBatch, global_batch_size: int
    ) -> tuple[TrainReport, dict[str, Counts]]:
        """The report, and the calls of plug-ins since the one before: those that made the model are the first's."""
        report = self.actor.train(rollout_id, shard, global_batch_size)
        counts = {hook.point.name: hook.stats.rollout for hook in self.hooks}
        self.hooks.begin_rollout()
        return report, counts

    def save(self, to: Save) -> None:
        with timer("save_model"):
            self.actor.save(
                to.folder, with_optimizer=to.with_optimizer, background=to.background, critic_folder=to.critic_folder
            )

    def saved(self, what: Saved) -> dict[str, Counts]:
        self.hooks.begin_rollout()
        self.actor.saved(what.rollout_id, what.folder, what.hf_folder)
        return {hook.point.name: hook.stats.rollout for hook in self.hooks}

    def _on_step(self) -> None:
        if self.setup.rank == 0:
            self.pipe.send(Stepped())

    def _stuck(self, card: str) -> NoReturn:
        self.pipe.send(Failed("TrainerError", card))
        os._exit(1)


def trainer_side(args: Namespace) -> Namespace:
    """`args` with the plug-ins that the trainer calls, and no others."""
    others = {point.dest: None for point in CATALOG.values() if point.process != "trainer"}
    return Namespace(**{**vars(args), **others})


def die_with(parent: int) -> None:
    """Let the kernel end this process together with its parent. Linux only; elsewhere the pipe alone says so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(fd: int) -> int:
    """Work until there are no more commands, or one fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    pipe = Pipe(fd)
    setup = pipe.setup()
    if setup.dies_with_parent:
        die_with(setup.parent)
    sys.path[:] = setup.import_path
    configure_logger(level=logging.WARNING)
    with ExitStack() as stack:
        try:
            worker = Worker(setup, pipe, stack)
            while (command := pipe.next()) is not None:
                pipe.send(Done(command.run(worker)))
        except Exception as error:
            pipe.send(Failed.of(error, traceback.format_exc()))
            sys.stdout.flush()
            os._exit(1)  # not through the process group's end, which would wait for the others
    return 0


if __name__ == "__main__":
    # Pickles name classes of this module by its import path, which is not `__main__`.
    from miles.trainer.worker import main as imported_main

    sys.exit(imported_main(int(sys.argv[1])))
