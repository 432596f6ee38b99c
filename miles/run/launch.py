"""Everything of a local run, put together in order and taken apart again.

    run directory ── who else is using it is found out first
    trainer ──────── loads the model, here or in processes of its own (`trainers`); for PPO a critic's beside it
    engines ──────── on the same weights, here or in processes of their own (`engines`); plug-ins can post to them
    manager ──────── data source, rollout functions
    actor ────────── losses, optimizer steps, weight updates; restored from --load where there is a checkpoint
    driver ───────── `miles.run.train`

The manager is in this process, and so are an engine and a trainer that are one. On a cluster the same classes
are built inside Ray actors; `Run` is all the driver ever sees.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from miles.config import RunConfig
from miles.config.dump import as_yaml, resolved
from miles.engine.fleet import Fleet
from miles.hooks import Hooks
from miles.hooks.watchdog import Watchdog
from miles.observe.display import Display
from miles.observe.files import disk_errors, temporary_name
from miles.observe.logging import configure_logger
from miles.observe.record import RunRecord
from miles.observe.summary import RunClock
from miles.observe.timers import timer
from miles.observe.tracking import Tracker
from miles.observe.tracking import install as install_tracker
from miles.rollout import context
from miles.rollout.loop_thread import get_async_loop
from miles.rollout.singleton import SingletonMeta
from miles.run import engines, host, resume, trainers
from miles.run.manager import RolloutManager
from miles.run.roles import RolloutRole, TrainRole
from miles.run.watch import Watch
from miles.trainer.actor import Restoring
from miles.trainer.schedule import schedule_of
from miles.trainer.trainer import Trainer


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is not in force yet, and the Hugging Face folder that belongs to it."""

    pending: resume.Pending
    hf_folder: Path | None


@dataclass
class Run:
    """A run that is ready to go. `trainer` is None under `--debug-rollout-only`."""

    config: RunConfig
    args: Namespace
    record: RunRecord
    display: Display
    clock: RunClock
    watch: Watch
    rollout: RolloutRole
    trainer: TrainRole | None
    start_rollout_id: int
    num_rollout: int
    num_rollout_per_epoch: int | None
    # Engines that give their memory back while the trainer works (`--offload-rollout`).
    offloaded: Fleet | None = None
    # A checkpoint whose files are being written while training goes on.
    _unfinished: Unfinished | None = None

    async def offload_engines(self) -> None:
        """Until the next weight update, which brings them back."""
        if self.offloaded is not None:
            await asyncio.to_thread(self.offloaded.release_memory)

    async def save(self, rollout_id: int, *, served: bool) -> None:
        """One checkpoint of everything, and the Hugging Face folder that `--save-hf` names.

        `served` says whether the engines have the weights after `rollout_id` already.
        """
        assert self.trainer is not None and self.config.checkpoint.save is not None
        self.record.flush()
        await self.trainer.call(self._write_checkpoint, rollout_id, served)

    def _write_checkpoint(self, rollout_id: int, served: bool) -> None:
        assert self.trainer is not None and self.config.checkpoint.save is not None
        trainer, checkpoint = self.trainer.trainer, self.config.checkpoint
        meta = resume.new_meta(
            rollout_id,
            steps=trainer.steps_done,
            weight_version=trainer.weight_version if served else trainer.weight_version + 1,
            world_size=self.config.cluster.world_size,
            seed=self.config.run.seed,
            backend=self.config.train.train_backend,
        )
        hf_folder = None if checkpoint.save_hf is None else Path(checkpoint.save_hf.format(rollout_id=rollout_id))
        self._finish_checkpoint()
        folder = Path(checkpoint.save)
        with timer("save_model"), disk_errors(folder / f"iter_{meta.iteration:07d}", "--save"):
            pending = resume.begin(
                folder,
                meta,
                lambda folder: self._write_model(folder, meta),
                lambda: self.rollout.manager.save(rollout_id),
                with_rng=not checkpoint.no_save_rng,
            )
            if checkpoint.async_save:
                self._unfinished = Unfinished(pending, hf_folder)
            else:
                final = self._put_in_force(pending)
        if hf_folder is not None:
            self._export(hf_folder, "--save-hf")
        if not checkpoint.async_save:
            trainer.saved(rollout_id, final, hf_folder)

    async def finish_saving(self) -> None:
        """Wait for a checkpoint that is still being written (`--async-save`), and put it in force."""
        if self._unfinished is not None:
            assert self.trainer is not None
            await self.trainer.call(self._finish_checkpoint)

    def _finish_checkpoint(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        assert self.trainer is not None
        final = self._put_in_force(unfinished.pending)
        self.trainer.trainer.saved(unfinished.pending.meta.rollout_id, final, unfinished.hf_folder)

    def _put_in_force(self, pending: resume.Pending) -> Path:
        """The folder that the checkpoint has from now on."""
        assert self.trainer is not None
        with disk_errors(pending.save / f"iter_{pending.meta.iteration:07d}", "--save"):
            try:
                self.trainer.trainer.finish_saving()
                return pending.finish()
            except BaseException:
                pending.abandon()
                raise

    def _write_model(self, folder: Path, meta: resume.Meta) -> None:
        """The trainer's part of a checkpoint. The critic's is a folder in it, or one in --critic-save, which is
        complete before this checkpoint is."""
        assert self.trainer is not None
        trainer, checkpoint = self.trainer.trainer, self.config.checkpoint
        with_optimizer = not checkpoint.no_save_optim
        if not self.config.algorithm.use_critic or checkpoint.critic_save is None:
            trainer.save(folder, with_optimizer=with_optimizer, background=checkpoint.async_save)
            return
        own = Path(checkpoint.critic_save)
        with disk_errors(own / f"iter_{meta.iteration:07d}", "--critic-save"):
            resume.begin(
                own,
                meta,
                lambda critic: trainer.save(folder, with_optimizer=with_optimizer, critic_folder=critic),
                lambda: None,
            ).finish()

    def _export(self, folder: Path, flag: str) -> None:
        """A Hugging Face folder; files of an earlier export are replaced when the new ones are complete.

        Raises RunDirError, which names `flag`.
        """
        assert self.trainer is not None
        unfinished = temporary_name(folder)
        with disk_errors(folder, flag):
            try:
                self.trainer.trainer.export_hf(unfinished)
                folder.mkdir(exist_ok=True)
                for file in unfinished.iterdir():
                    os.replace(file, folder / file.name)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    async def export_final(self) -> None:
        """The trained model as a Hugging Face folder in the run directory."""
        assert self.trainer is not None
        await self.trainer.call(self._export, self.record.path / "model", "--run-dir")

    def close_display(self) -> None:
        self.display.close()


@contextmanager
def start(config: RunConfig, args: Namespace, hooks: Hooks) -> Iterator[Run]:
    """Build a run; close everything that was opened, in the opposite order, however it ends."""
    with ExitStack() as stack:
        yield _build(config, args, hooks, stack)


def _build(config: RunConfig, args: Namespace, hooks: Hooks, stack: ExitStack) -> Run:
    clock, neighbours = RunClock(), host.BusyCores()
    if config.run.quiet or config.run.progress != "none":
        configure_logger(level=logging.WARNING)
    else:
        configure_logger()
    backend = config.train.train_backend
    by_bridge = backend == "megatron" and config.train.megatron_to_hf_mode == "bridge"
    checkpoint = resume.find(config.checkpoint.load, config.checkpoint.save, backend=backend, or_hf=by_bridge)
    # What a run goes on with; of other checkpoints it takes the weights and begins.
    meta = None if checkpoint is None or config.checkpoint.finetune else checkpoint.meta
    record = stack.enter_context(_open_record(config, resuming=meta is not None))
    record.prepare()
    record.write_config(as_yaml(config), resolved(config, args))
    record.write_versions(hooks.sources())
    hooks.set_bundle_dir(record.path / "failures")
    told, config = config, anchored(config, args)
    tracker = stack.enter_context(Tracker.open(config.tracking, record, config=vars(args)))
    install_tracker(tracker)
    stack.callback(install_tracker, None)
    _prepare_process(config, stack)
    loaded = None if config.debug.debug_rollout_only else trainers.load(config, args, hooks, record.path, stack)
    generators = engines.start(config, args, loaded, record.path, stack, resuming=checkpoint is not None)
    client = generators.client
    if client is not None:
        context.install(context.RunContext(hooks, client, seeds_each_sample=generators.seeds_each_sample))
    stack.callback(context.install, None)
    stack.callback(SingletonMeta.clear_all_instances)  # the next run of this process has settings of its own

    start_rollout_id = config.checkpoint.start_rollout_id
    if start_rollout_id is None:
        anew = checkpoint is None or config.checkpoint.finetune
        start_rollout_id = 0 if anew else checkpoint.next_rollout_id
    args.start_rollout_id = start_rollout_id
    manager = RolloutManager(config, args, hooks, client, tracker, record, dp_size=lambda: config.layout.dp_size)
    per_epoch = manager.num_rollout_per_epoch() if config.data.num_epoch is not None else None
    num_rollout = args.num_rollout = _num_rollout(config, per_epoch)

    trainer = None
    if loaded is not None:
        schedule = schedule_of(config.optimizer, num_rollout * (config.data.steps_per_rollout or 1))
        given = trainers.Surroundings(args, hooks, tracker, schedule, generators.target, clock.optimizer_step)
        trainer = loaded.role(given)
        _restore(trainer.trainer, config, checkpoint, meta)
        stack.callback(trainer.close)
    manager.load(start_rollout_id - 1)
    if checkpoint is not None and meta is not None:
        record.rewind(start_rollout_id)
        if not config.checkpoint.no_load_rng:
            resume.restore_rng(checkpoint.folder)
    rollout = RolloutRole(manager)
    stack.callback(rollout.close)
    display = stack.enter_context(
        Display(num_rollout, config.run.progress, done=start_rollout_id, quiet=config.run.quiet)
    )
    watch = Watch(told, args, hooks, tracker, record, display, clock, num_rollout)
    watch.recall()
    loop_thread = get_async_loop()
    loops = [(loop_thread.loop, loop_thread.thread_id)]
    stack.enter_context(Watchdog(hooks, loops, on_stuck=watch.stuck))
    host.forget_imports()
    crowded = host.crowding(torch.get_num_threads(), len(os.sched_getaffinity(0)), neighbours.others())
    if crowded is not None:
        display.notice(crowded)
    _announce(told, record, display, checkpoint, start_rollout_id, num_rollout)
    offloads = config.cluster.offload_rollout and isinstance(generators.target, Fleet)
    return Run(
        *(config, args, record, display, clock, watch, rollout, trainer, start_rollout_id, num_rollout, per_epoch),
        offloaded=generators.target if offloads else None,
    )


def _num_rollout(config: RunConfig, per_epoch: int | None) -> int:
    if config.data.num_rollout is not None:
        return config.data.num_rollout
    assert per_epoch is not None and config.data.num_epoch is not None
    return per_epoch * config.data.num_epoch


def _restore(
    trainer: Trainer, config: RunConfig, checkpoint: resume.Checkpoint | None, meta: resume.Meta | None
) -> None:
    """What the trainer goes on with; without `meta` the weights alone."""
    with_optimizer = meta is not None and not config.checkpoint.no_load_optim
    if config.algorithm.use_critic:
        backend = config.train.train_backend
        critic_folder = resume.critic_folder(config.checkpoint, checkpoint, backend=backend)
        if critic_folder is not None:
            trainer.restore_critic(critic_folder, with_optimizer=with_optimizer)
    if checkpoint is not None:
        how = Restoring(with_optimizer=with_optimizer, weights_alone=True)
        if meta is not None:
            # The update before the first rollout counts the version up to what it was.
            how = Restoring(meta.weight_version - 1, meta.global_step, with_optimizer=with_optimizer)
        trainer.restore(checkpoint.folder, how)


def anchored(config: RunConfig, args: Namespace) -> RunConfig:
    """The same run with the paths that it still needs later from the root, here and in `args`: a plug-in that changes
    the working directory moves no file of the run."""
    names = {
        "rollout": ("hf_checkpoint",),
        "checkpoint": ("save", "load", "save_hf", "ref_load", "critic_load", "critic_save"),
        "run": ("run_dir",),
        "debug": ("save_debug_rollout_data", "load_debug_rollout_data", "save_debug_train_data"),
    }
    changed: dict[str, Any] = {}
    for section, fields in names.items():
        given = {name: getattr(config.section(section), name) for name in fields}
        paths = {
            name: os.path.abspath(path)
            for name, path in given.items()
            if path is not None and (name != "hf_checkpoint" or os.path.exists(path))
        }
        changed[section] = replace(config.section(section), **paths)  # type: ignore[type-var]
        vars(args).update(paths)
    return replace(config, **changed)


def _prepare_process(config: RunConfig, stack: ExitStack) -> None:
    """What holds for the whole process while the run lasts."""
    host.keep_freed_memory()
    resume.seed_everything(config.run.seed)
    if config.train.deterministic_mode:
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)


def _open_record(config: RunConfig, *, resuming: bool) -> RunRecord:
    """A run that resumes continues its record; any other reads nothing from --load, which may lie inside it."""
    read = (config.rollout.hf_checkpoint, config.data.prompt_data, config.debug.load_debug_rollout_data)
    folder = os.path.abspath(str(config.run.run_dir))
    return RunRecord(folder, resume=resuming, inputs=[path for path in read if path is not None])


def _announce(
    config: RunConfig, record: RunRecord, display: Display, checkpoint: resume.Checkpoint | None, start: int, total: int
) -> None:
    if record.moved_aside is not None:
        display.notice(f"{record.path} held an earlier run, which is now {record.moved_aside}")
    if config.substitutions:
        names = ", ".join("--" + name.replace("_", "-") for name in config.substitutions)
        display.notice(
            f"published defaults replaced on this machine ({record.path.name}/config.json says why): {names}"
        )
    for notice in config.notices:
        if notice not in config.substitutions.values():
            display.notice(notice)
    if checkpoint is not None and (checkpoint.meta is None or config.checkpoint.finetune):
        why = "--finetune" if config.checkpoint.finetune else "it is Megatron's own, without the state of a run"
        display.notice(
            f"weights from {checkpoint.folder}; optimizer, random generators and data begin anew ({why}): rollout "
            f"{start} is next"
        )
    elif checkpoint is not None and start >= total:
        display.notice(f"{checkpoint.folder} has all {total} rollouts already. Raise --num-rollout to train on.")
    elif checkpoint is not None:
        display.notice(f"resuming from {checkpoint.folder}: rollout {start} is next")
    if checkpoint is not None and config.debug.check_weight_update_equal:
        display.notice("--check-weight-update-equal: not done, engines start with other weights than the checkpoint's")
    if checkpoint is None and config.checkpoint.load is not None:
        display.notice(f"--load {config.checkpoint.load} holds no checkpoint yet: starting from --hf-checkpoint")
