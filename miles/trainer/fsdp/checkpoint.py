"""Named tensors to a folder of safetensors files and back, whole or in shards, by any number of processes.

    one process       model/model.safetensors, a plain file
    several           model/shard-00001-model-00001-of-00001.safetensors, ...: each rank writes its own rows

Both are read by `torch.distributed.checkpoint`, which finds in the headers where each piece belongs, so that every
number of processes goes on from the files of every other. Nothing in such a folder is executed when it is read: there
is no pickle among them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from miles.errors import CheckpointError
from miles.trainer.ranks import Ranks

SUFFIX = ".safetensors"


Parts = Mapping[str, Mapping[str, Tensor]]
"""Folder -> its tensors.

Example: `{"model": {"lm_head.weight": ...}, "optimizer": {"exp_avg.lm_head.weight": ...}}`
"""


class Saver:
    """Writes checkpoints, one after the other, at once or in a thread while training goes on."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._group: Any = None
        self._writing: Future[None] | None = None

    def save(self, folder: Path, parts: Parts, *, background: bool) -> None:
        """Every rank calls this. In the background a copy is written, which takes the memory of one; `finish` ends it.

        Threads of several ranks meet in a process group of their own, apart from that of training.
        """
        self.finish()
        if not background:
            write_parts(folder, parts, self.ranks)
            return
        copies = {part: {name: t.detach().clone() for name, t in tensors.items()} for part, tensors in parts.items()}
        if self.ranks.mesh is not None and self._group is None:
            self._group = dist.new_group(backend="gloo")
        done = self._writing = Future()

        def write() -> None:
            try:
                done.set_result(write_parts(folder, copies, self.ranks, self._group))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=write, name="miles-save", daemon=True).start()

    def finish(self) -> None:
        """Wait for what is being written. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def write_parts(folder: Path, parts: Parts, ranks: Ranks, group: Any = None) -> None:
    for part, tensors in parts.items():
        write(folder / part, tensors, ranks, group)


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks, group: Any = None) -> None:
    """Every rank calls this. `folder` must not exist yet."""
    folder.mkdir(exist_ok=ranks.size > 1)
    if ranks.mesh is None or not tensors:  # of nothing (moments before the first step) there is nothing to cut
        if ranks.rank == 0:
            save_file(contiguous(tensors), plain_file(folder))
        return
    from torch.distributed import checkpoint as dcp

    with _quiet():
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def read_into(folder: Path, tensors: Mapping[str, Tensor], *, flag: str = "--load") -> None:
    """Fill `tensors`, whole or cut, from whatever `write` has written. Every rank reads only its own rows.

    CheckpointError, which names `flag`, where a file is damaged or missing, or where names or shapes are others.
    """
    check(shapes(folder, flag), tensors, f"{flag} {folder.parent}")
    plain = plain_file(folder)
    if plain.is_file() and not any(isinstance(t, DTensor) for t in tensors.values()):
        with _readable(plain, flag), torch.no_grad():
            stored = load_file(plain)
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])
        return
    from torch.distributed import checkpoint as dcp

    with _quiet(), _readable(folder, flag), torch.no_grad():
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def plain_file(folder: Path) -> Path:
    """What one process writes, and what is missed where there is nothing at all."""
    return folder / f"{folder.name}{SUFFIX}"


def shapes(folder: Path, flag: str = "--load") -> dict[str, tuple[int, ...]]:
    """Name -> shape of the whole tensor, of everything that `folder` holds. Raises CheckpointError."""
    files = sorted(folder.glob(f"*{SUFFIX}")) or [plain_file(folder)]
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _readable(path, flag), safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found if files == [plain_file(folder)] else _shapes_of_shards(folder, flag)


def _shapes_of_shards(folder: Path, flag: str) -> dict[str, tuple[int, ...]]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, entry in dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise CheckpointError(
                f"{flag}: {folder} cannot be read (rows of {name} are in none of its files). Expected one file of each "
                "process that saved it; an older checkpoint can be named through latest_checkpointed_iteration.txt."
            )
        found[name] = tuple(entry.size)
    return found


def check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError, which begins with `where`, lists the names and shapes in `found` that are not `expected`."""
    problems = [f"{n}: not in the checkpoint" for n in expected if n not in found]
    problems += [f"{n}: not in the model" for n in found if n not in expected]
    problems += [
        f"{n}: {list(found[n])} in the checkpoint, {list(t.shape)} in the model"
        for n, t in expected.items()
        if n in found and found[n] != tuple(t.shape)
    ]
    if problems:
        shown = "\n  ".join(problems[:6]) + (f"\n  and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(
            f"{where}: the checkpoint is of another architecture than --hf-checkpoint:\n  {shown}\n"
            f"Give the model folder that it was trained from, or leave out {where.split()[0]}."
        )


@contextlib.contextmanager
def _readable(path: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{flag}: {path} cannot be read ({error}). Expected a file that `--save` wrote; an older checkpoint can be "
            "named through latest_checkpointed_iteration.txt in the folder above."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of `torch.distributed.checkpoint` about what is meant to be so."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
