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
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from miles.errors import CheckpointError
from miles.trainer.ranks import Ranks

SUFFIX = ".safetensors"


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Every rank calls this. `folder` must not exist yet."""
    folder.mkdir(exist_ok=ranks.size > 1)
    if ranks.mesh is None:
        save_file(contiguous(tensors), folder / f"{folder.name}{SUFFIX}")
        return
    from torch.distributed import checkpoint as dcp

    with _quiet():
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, whole or cut, from whatever `write` has written. Every rank reads only its own rows.

    CheckpointError where a file is damaged, or where names or shapes are others.
    """
    _check(shapes(folder), tensors, folder)
    plain = folder / f"{folder.name}{SUFFIX}"
    if plain.is_file() and not any(isinstance(t, DTensor) for t in tensors.values()):
        with _readable(folder):
            stored = load_file(plain)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])
        return
    from torch.distributed import checkpoint as dcp

    with _quiet(), _readable(folder), torch.no_grad():
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the whole tensor, of everything that `folder` holds."""
    with _readable(folder):
        plain = folder / f"{folder.name}{SUFFIX}"
        if plain.is_file():
            with safe_open(plain, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        from torch.distributed import checkpoint as dcp

        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}


def _check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], folder: Path) -> None:
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
            f"--load {folder.parent}: the checkpoint is of another architecture than --hf-checkpoint:\n  {shown}\n"
            "Give the model folder that the run was started from, or leave out --load."
        )


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--load: {folder} cannot be read ({error}). Expected files that `--save` wrote; an older checkpoint can "
            "be named through latest_checkpointed_iteration.txt."
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
