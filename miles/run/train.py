"""The driver: one loop that turns rollouts into weights, whatever the engine, the backend and the launcher.

    for each rollout
        generate      RolloutRole.generate          consumes prompts, waits for engines, produces shards
        train         TrainRole.train               consumes shards, produces new weights
        save          when due                      trainer, then data position, then the tracker file
        update        TrainRole.update_weights      waits for running requests, produces a weight version
        evaluate      when due

Stopping: Ctrl-C (or SIGTERM) finishes the rollout in progress, saves where `--save` is given and says how to resume; a
second one stops at once and leaves the last checkpoint as it was. Cut short are an evaluation, which a resumed run
makes up for, and the rollout of a run without `--save`, which is lost anyway.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from miles.config import parse
from miles.errors import RunStopped
from miles.hooks import bind
from miles.hooks.source import shown
from miles.run.periodic import should_run_periodic_action

if TYPE_CHECKING:
    from miles.run.launch import Run
    from miles.run.manager import EvalReport, RolloutReport

T = TypeVar("T")

NOTHING_SAVED = "Nothing was saved, because --save is not given."


def main(argv: Sequence[str]) -> int:
    """`miles train`: parse, check every plug-in, then start. Returns the exit status."""
    with terminated_as_interrupted():
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


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM means what Ctrl-C means from the first moment, also while the run is being built and taken apart."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Driver:
    """The loop over rollouts and what has to be known from one to the next."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.stop = StopRequest(run)
        self.per_epoch = run.num_rollout_per_epoch
        self.num_rollout = run.num_rollout

    async def train(self) -> None:
        run = self.run
        with self.stop.listening():
            if run.trainer is not None:
                await run.trainer.update_weights()
            await self._evaluate_at_start()
            try:
                for rollout_id in range(run.start_rollout_id, self.num_rollout):
                    await self._one(rollout_id)
                await run.finish_saving()
            except Exception:
                await self._keep_last_save()
                raise
            await self._finish()

    async def _keep_last_save(self) -> None:
        """What ends the run is told, and not that its last checkpoint went with it."""
        with suppress(Exception):
            await self.run.finish_saving()

    async def _one(self, rollout_id: int) -> None:
        """One rollout: prompts to new weights."""
        run, begin = self.run, time.perf_counter()
        with run.clock.generation():
            report = await self._generate(rollout_id)
        trained, saved, saving_s = None, False, 0.0
        if run.trainer is not None:
            await run.offload_engines()
            with run.clock.training():
                trained = await run.trainer.train(rollout_id, report)
            for notice in trained.notices:
                run.watch.notice(notice)
        run.watch.plug_ins_called(rollout_id)  # before the checkpoint: a resume begins with the next rollout
        if run.trainer is not None:
            before = time.perf_counter()
            saved = await self._save_if_due(rollout_id)
            saving_s = time.perf_counter() - before
            with run.clock.training():
                await run.trainer.update_weights()
        run.watch.rollout_done(report, trained, time.perf_counter() - begin - saving_s)
        if self._evaluation_due(rollout_id):
            await self._evaluate(rollout_id + 1)
        if self.stop.requested:
            await self._stop_after(rollout_id, saved)

    async def _generate(self, rollout_id: int) -> RolloutReport:
        try:
            return await self.stop.cancellable(self.run.rollout.generate(rollout_id), loses=self.stop.can_save)
        except CutShort:
            raise RunStopped(f"stopped in rollout {rollout_id}. {NOTHING_SAVED}") from None

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluation_due(self, rollout_id: int) -> bool:
        return should_run_periodic_action(rollout_id, self.config.eval.eval_interval, self.per_epoch)

    async def _evaluate_at_start(self) -> None:
        """The model before training; with `--num-rollout 0` the model as it is; after a resume what is still due."""
        start, settings = self.run.start_rollout_id, self.config.eval
        if settings.eval_interval is None:
            return
        if self.num_rollout == 0:
            due = True
        elif start == 0:
            due = not settings.skip_eval_before_train
        else:
            due = self._evaluation_due(start - 1) and not self.run.record.has_evaluation(start)
        if due:
            await self._evaluate(start)
        if self.stop.requested:
            last = f" The last checkpoint in {shown(str(self.config.checkpoint.load))} is intact." if start > 0 else ""
            raise RunStopped(f"stopped before rollout {start}; nothing had to be saved yet.{last}")

    async def _evaluate(self, done: int) -> None:
        """Evaluate the model after `done` rollouts, unless a stop request cuts it short."""
        with self.run.clock.excluded():
            try:
                report = await self.stop.cancellable(self._evaluation(done), loses=False)
            except CutShort:
                return
        if report is not None:
            self.run.watch.evaluated(done, report)

    async def _evaluation(self, done: int) -> EvalReport | None:
        """Rewards of what the engines generate, and losses of conversations, for which the trainer has the weights."""
        run = self.run
        report = await run.rollout.evaluate(done)
        if report is None or not report.conversations or run.trainer is None:
            return report
        return await run.rollout.add_losses(report, await run.trainer.evaluate(report))

    # ---- saving --------------------------------------------------------------------------------------------------

    async def _save_if_due(self, rollout_id: int) -> bool:
        """With `--save` the last rollout is always saved, the others by `--save-interval`."""
        await self.run.finish_saving()
        checkpoint = self.config.checkpoint
        due = should_run_periodic_action(rollout_id, checkpoint.save_interval, self.per_epoch, self.num_rollout)
        if checkpoint.save is None or not (due or rollout_id + 1 == self.num_rollout):
            return False
        await self._save(rollout_id, served=False)
        return True

    async def _save(self, rollout_id: int, *, served: bool) -> None:
        with self.run.clock.excluded():
            await self.run.save(rollout_id, served=served)

    async def _stop_after(self, rollout_id: int, saved: bool) -> None:
        if not self.stop.can_save:
            raise RunStopped(f"stopped after rollout {rollout_id}. {NOTHING_SAVED}")
        if not saved:
            await self._save(rollout_id, served=True)
        await self.run.finish_saving()
        save = shown(str(self.config.checkpoint.save))
        raise RunStopped(
            f"stopped after rollout {rollout_id}; everything is saved in {save}. Resume with the same command and "
            f"--load {save}"
        )

    async def _finish(self) -> None:
        run = self.run
        if run.trainer is not None and self.num_rollout > 0:
            await run.export_final()
        run.watch.finished()


class CutShort(Exception):
    """A stop request ended what was being waited for."""


class StopRequest:
    """What Ctrl-C (and SIGTERM) asks for: the first stops at the next safe point, the second at once."""

    def __init__(self, run: Run) -> None:
        self.run, self.requested = run, False
        self._waiting: asyncio.Future[Any] | None = None

    @property
    def can_save(self) -> bool:
        return self.run.trainer is not None and self.run.config.checkpoint.save is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            loop.add_signal_handler(number, self._received)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def _received(self) -> None:
        if self.requested:
            self._stop_at_once()
        self.requested = True
        if self._waiting is not None:
            self._waiting.cancel()
        if self.can_save:
            self.run.watch.notice("stopping after this rollout, with a checkpoint; Ctrl-C again stops at once")
        else:
            self.run.watch.notice("stopping; nothing can be saved, because --save is not given")

    def _stop_at_once(self) -> NoReturn:
        self.run.close_display()
        save = shown(str(self.run.config.checkpoint.save))
        where = f" The last checkpoint in {save} is intact." if self.can_save else ""
        print(f"\nmiles: stopped at once; the rollout in progress is lost.{where}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(RunStopped.exit_status)

    async def cancellable(self, work: Coroutine[Any, Any, T], *, loses: bool) -> T:
        """Await `work`. A stop request ends the wait with CutShort, unless that `loses` something."""
        waiting = asyncio.ensure_future(work)
        if not loses:
            self._waiting = waiting
            if self.requested:
                waiting.cancel()
        try:
            return await waiting
        except asyncio.CancelledError:
            if self.requested:
                raise CutShort from None
            raise
        finally:
            self._waiting = None
