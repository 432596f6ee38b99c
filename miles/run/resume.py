"""Checkpoints of a whole run: one folder per save, complete or absent, and how a run continues from one.

    <save>/iter_0000020/                     20 rollouts are done (fsdp); after rollout 20 (megatron)
        model/ optimizer/ lr_scheduler/      the trainer's share: safetensors of fsdp,
        metadata.json  *.distcp  ...         or what Megatron-Core writes
        rng.pt  meta.json                    random generators; counters and versions
    <save>/rollout/global_dataset_state_dict_19.pt    data position and buffer after rollout 19
    <save>/rollout/plug_ins_19.pt            what plug-ins with `state_dict` returned
    <save>/latest_checkpointed_iteration.txt the number of the last complete checkpoint

A save writes into a folder with another name, syncs, renames it, and moves the tracker file last: a crash at any
moment leaves the previous checkpoint in force. What such a crash left half written goes with the next save. One run at
a time saves into a folder.

A folder of Megatron-Core's that has no meta.json was written by Megatron's own training or conversion: its weights can
be gone on from, and nothing else of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miles.config import CheckpointConfig
from miles.errors import CheckpointError
from miles.observe import debug_data
from miles.rollout.data_state import replace_file, sync
from miles.trainer.checkpoints import RELEASE, TRACKER, is_hf, is_megatrons, named, refuse_other

OUTDATED = ".outdated"

FIRST_ITERATION = {"fsdp": 1, "megatron": 0}
"""`--train-backend` -> number of the checkpoint after rollout 0, as published."""


@dataclass(frozen=True)
class Meta:
    """What `meta.json` holds. `weight_version` is the one under which engines serve the weights of the checkpoint.

    Example: `{"iteration": 20, "rollout_id": 19, "next_rollout_id": 20, "global_step": 40, "micro_step": 40,
    "world_size": 1, "timestamp": 1763879000.5, "weight_version": 21, "seed": 1234, "backend": "fsdp"}`
    """

    iteration: int
    rollout_id: int
    next_rollout_id: int
    global_step: int
    micro_step: int
    world_size: int
    timestamp: float
    weight_version: int
    seed: int
    backend: str = "fsdp"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `meta` is None for one of Megatron's own."""

    folder: Path
    meta: Meta | None
    next_rollout_id: int


def find(load: str | None, save: str | None = None, *, backend: str = "fsdp", or_hf: bool = False) -> Checkpoint | None:
    """The latest complete checkpoint under `--load`; None where the folder has none yet.

    None is no error for a folder that `--save` names as well: scripts name one for both, and the first run finds it
    empty. Any other folder without a checkpoint is a mistake, and so is a checkpoint of another `--train-backend`:
    CheckpointError. With `or_hf`, a Hugging Face folder is weights to start from, and no checkpoint.
    """
    if load is None:
        return None
    tracker = Path(load) / TRACKER
    if not tracker.is_file():
        if or_hf and is_hf(Path(load)):
            return None
        if save is not None and Path(save).absolute() == Path(load).absolute():
            return None
        found = f"it has no {TRACKER}" if Path(load).is_dir() else "there is no such folder"
        raise CheckpointError(
            f"--load {load}: no checkpoint to go on from: {found}. Expected a folder that --save wrote. To start anew, "
            "leave out --load, or name the same folder with --save."
        )
    text = tracker.read_text().strip()
    if not text.isdecimal() and text != RELEASE:
        raise CheckpointError(f"--load {load}: {tracker} holds {text!r}, expected the number of a checkpoint.")
    folder = Path(load) / named(text)
    if not folder.exists() and _outdated(folder).exists():  # a crash between the two renames of `write`
        _outdated(folder).rename(folder)
    meta = folder / "meta.json"
    if not meta.is_file() and is_megatrons(folder):
        refuse_other("megatron", backend, folder, "--load")
        return Checkpoint(folder, None, 0 if text == RELEASE else int(text) + 1)
    if not meta.is_file():
        there = sorted(p.name for p in Path(load).glob("iter_*"))
        raise CheckpointError(
            f"--load {load}: {tracker.name} says {text}, but {meta} does not exist. Folders there: "
            f"{', '.join(there) or 'none'}. Write the number of a complete one into {tracker}."
        )
    try:
        read = Meta(**json.loads(meta.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"--load {load}: {meta} is damaged: {error}") from error
    refuse_other(read.backend, backend, folder, "--load")
    return Checkpoint(folder, read, read.next_rollout_id)


def critic_folder(
    settings: CheckpointConfig, checkpoint: Checkpoint | None, *, backend: str = "fsdp"
) -> Path | None:
    """Where PPO's critic continues from; None for a new one.

    It is a part of the run's checkpoint, or lies where an earlier run's --critic-save put it: then --critic-load names
    that folder, and beside an actor that resumes the iteration is the actor's.
    """
    given, load = settings.critic_load, settings.load
    if given is None or given == load:
        if checkpoint is None:
            return None
        inside = checkpoint.folder / "critic"
        if not inside.is_dir():
            raise CheckpointError(
                f"--load {load}: {checkpoint.folder.name} holds no critic. Give --critic-load with the folder that "
                "--critic-save wrote, or start from --hf-checkpoint without --load."
            )
        return inside
    found = find(given, settings.critic_save, backend=backend)
    if found is None:
        if checkpoint is None:
            return None
        raise CheckpointError(
            f"--critic-load {given}: no critic there for the actor that resumes from {checkpoint.folder}. Give the "
            "folder that --critic-save wrote, or start from --hf-checkpoint without --load."
        )
    folder = found.folder if checkpoint is None else Path(given) / checkpoint.folder.name
    if not folder.is_dir():
        raise CheckpointError(
            f"--critic-load {given}: expected {folder.name}, the iteration that the actor resumes from, found "
            f"{', '.join(sorted(p.name for p in Path(given).glob('iter_*')))}."
        )
    return folder / "critic" if (folder / "critic").is_dir() else folder


@dataclass(frozen=True)
class Pending:
    """A checkpoint that lacks nothing but, perhaps, files of the model that are still being written."""

    save: Path
    unfinished: Path
    meta: Meta

    def finish(self) -> Path:
        """Put it in force, once all files are there."""
        sync_tree(self.unfinished)
        final = self.save / f"iter_{self.meta.iteration:07d}"
        outdated = _outdated(final)
        if final.exists():
            shutil.rmtree(outdated, ignore_errors=True)
            final.rename(outdated)
        self.unfinished.rename(final)
        sync(self.save)
        shutil.rmtree(outdated, ignore_errors=True)
        replace_file(self.save / TRACKER, f"{self.meta.iteration}\n".encode())
        return final

    def abandon(self) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)


def begin(
    save: Path,
    meta: Meta,
    write_model: Callable[[Path], None],
    write_rollout: Callable[[], None],
    *,
    with_rng: bool = True,
) -> Pending:
    """One checkpoint. `write_model(folder)` fills the model's part, or starts to; `write_rollout()` the data source's.

    It counts only after `Pending.finish`.
    """
    unfinished = save / f".iter_{meta.iteration:07d}.{os.getpid()}"
    for left_over in save.glob(".iter_*"):
        if left_over.suffix != OUTDATED:
            shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir(parents=True)
    pending = Pending(save, unfinished, meta)
    try:
        write_model(unfinished)
        if with_rng:
            torch.save(rng_state(), unfinished / "rng.pt")
        (unfinished / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")
        write_rollout()
    except BaseException:
        pending.abandon()
        raise
    return pending


def write(save: Path, meta: Meta, write_model: Callable[[Path], None], write_rollout: Callable[[], None]) -> Path:
    """`begin` and `finish` in one."""
    pending = begin(save, meta, write_model, write_rollout)
    try:
        return pending.finish()
    except BaseException:
        pending.abandon()
        raise


def _outdated(folder: Path) -> Path:
    """Where a checkpoint of the same number waits until its successor is in place."""
    return folder.with_name(f".{folder.name}{OUTDATED}")


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


# ---- random generators -------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators of this process, as tensors and plain numbers."""
    import numpy as np

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "python": [version, list(words), gauss_next],
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }


def restore_rng(folder: Path) -> None:
    """Put the generators back to where `rng_state` found them. CheckpointError where the file is missing or damaged."""
    import numpy as np

    state = debug_data.read_torch(folder / "rng.pt", flag="--load")
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])


def seed_everything(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def new_meta(
    rollout_id: int, *, steps: int, weight_version: int, world_size: int, seed: int, backend: str = "fsdp"
) -> Meta:
    """Of a checkpoint after `rollout_id`."""
    number, done = rollout_id + FIRST_ITERATION[backend], rollout_id + 1
    return Meta(number, rollout_id, done, steps, steps, world_size, time.time(), weight_version, seed, backend)
