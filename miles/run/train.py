"""The driver: one loop that turns rollouts into weights, whatever the engine, the backend and the launcher.

    for each rollout
        generate      RolloutRole.generate          consumes prompts, waits for engines, produces shards
        train         TrainRole.train               consumes shards, produces new weights
        save          when due                      trainer, then data position, then the tracker file
        update        TrainRole.update_weights      waits for running requests, produces a weight version
        evaluate      when due

Stopping: Ctrl-C finishes the rollout in progress, saves where `--save` is given and says how to resume; a second one
stops at once and leaves the last checkpoint as it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from miles.config import parse
from miles.errors import RunStopped
from miles.hooks import bind
from miles.run.periodic import should_run_periodic_action

if TYPE_CHECKING:
    from miles.run.launch import Run

T = TypeVar("T")


def main(argv: Sequence[str]) -> int:
    """`miles train`: parse, check every plug-in, then start. Returns the exit status."""
    config, args = parse(list(argv))
    hooks = bind(
        args,
        policies=config.run.hook_policy,
        forms=config.run.hook_form,
        timeout_s=config.run.hook_timeout_s,
        error_budget=config.run.hook_error_budget,
    )
    from miles.run.launch import start  # torch and all that is heavy

    with start(config, args, hooks) as run:
        asyncio.run(Driver(run).train())
    return 0


class Driver:
    """The loop over rollouts and what has to be known from one to the next."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.stop = StopRequest(run)
        self.per_epoch = run.num_rollout_per_epoch
        self.num_rollout = run.num_rollout

    async def train(self) -> None:
        run, config = self.run, self.config
        with self.stop.listening():
            if run.trainer is not None:
                await run.trainer.update_weights()
            if self.num_rollout == 0 and config.eval.eval_interval is not None:
                await self._evaluate(0)
            first = run.start_rollout_id == 0 and self.num_rollout > 0
            if first and config.eval.eval_interval is not None and not config.eval.skip_eval_before_train:
                await self._evaluate(-1)
            for rollout_id in range(run.start_rollout_id, self.num_rollout):
                await self._one(rollout_id)
            await self._finish()

    async def _one(self, rollout_id: int) -> None:
        """One rollout: prompts to new weights."""
        run, begin = self.run, time.perf_counter()
        with run.clock.generation():
            report = await self.stop.cancellable(run.rollout.generate(rollout_id))
        trained, saved, saving_s = None, False, 0.0
        if run.trainer is not None:
            with run.clock.training():
                trained = await run.trainer.train(rollout_id, report)
            before = time.perf_counter()
            saved = await self._save_if_due(rollout_id)
            saving_s = time.perf_counter() - before
            with run.clock.training():
                await run.trainer.update_weights()
        run.watch.rollout_done(report, trained, time.perf_counter() - begin - saving_s)
        if should_run_periodic_action(rollout_id, self.config.eval.eval_interval, self.per_epoch):
            await self._evaluate(rollout_id)
        if self.stop.requested:
            await self._stop_after(rollout_id, saved)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    async def _evaluate(self, rollout_id: int) -> None:
        """Evaluate what `rollout_id` led to; -1 is the model before training, logged at step 0."""
        with self.run.clock.excluded():
            report = await self.stop.cancellable(self.run.rollout.evaluate(max(rollout_id, 0)))
        if report is not None:
            self.run.watch.evaluated(rollout_id + 1, report)

    # ---- saving --------------------------------------------------------------------------------------------------

    async def _save_if_due(self, rollout_id: int) -> bool:
        checkpoint = self.config.checkpoint
        due = should_run_periodic_action(rollout_id, checkpoint.save_interval, self.per_epoch, self.num_rollout)
        if checkpoint.save is None or not due:
            return False
        await self._save(rollout_id)
        return True

    async def _save(self, rollout_id: int) -> None:
        with self.run.clock.excluded():
            await self.run.save(rollout_id)

    async def _stop_after(self, rollout_id: int, saved: bool) -> None:
        checkpoint = self.config.checkpoint
        if self.run.trainer is None or checkpoint.save is None:
            raise RunStopped(f"stopped after rollout {rollout_id}.")
        if not saved:
            await self._save(rollout_id)
        raise RunStopped(
            f"stopped after rollout {rollout_id}; everything is saved in {checkpoint.save}. Resume with the same "
            f"command and --load {checkpoint.save}"
        )

    async def _finish(self) -> None:
        run = self.run
        if run.trainer is not None and self.num_rollout > 0:
            await run.export_final()
        run.watch.finished()


class StopRequest:
    """What Ctrl-C (and SIGTERM) asks for: the first stops at the next safe point, the second at once."""

    def __init__(self, run: Run) -> None:
        self.run, self.requested = run, False
        self._waiting: asyncio.Future[Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._received)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _received(self) -> None:
        save = self._save_folder
        if self.requested:
            self.run.close_display()
            where = f" The last checkpoint in {save} is intact." if save else ""
            print(f"\nmiles: stopped at once; the rollout in progress is lost.{where}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(RunStopped.exit_status)
        self.requested = True
        if save is None:
            self.run.watch.notice("stopping: nothing to save, because --save is not given")
            if self._waiting is not None:
                self._waiting.cancel()
        else:
            self.run.watch.notice("stopping after this rollout, with a checkpoint; Ctrl-C again stops at once")

    @property
    def _save_folder(self) -> str | None:
        return self.run.config.checkpoint.save if self.run.trainer is not None else None

    async def cancellable(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, unless a stop request cuts it short, which it does where nothing could be saved anyway."""
        self._waiting = asyncio.ensure_future(work)
        try:
            return await self._waiting
        except asyncio.CancelledError:
            if self.requested:
                raise RunStopped("stopped. Nothing was saved, because --save is not given.") from None
            raise
        finally:
            self._waiting = None
