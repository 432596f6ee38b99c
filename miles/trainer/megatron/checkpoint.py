"""Checkpoints of a Megatron trainer with `megatron.core.dist_checkpointing`: any layout goes on from those of any other.

    <folder>/metadata.json  .metadata  common.pt     what there is, in which pieces
    <folder>/__<rank>_<n>.distcp                     the pieces: weights, and moments of the optimizer by parameter

The optimizer is written in Megatron's format `fully_reshardable`: one tensor per parameter, whoever holds it. Megatron
describes pieces in pickles, which can name any function: they are looked through before they are read, and only the
classes that such a description is made of are allowed (`KNOWN`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from miles.errors import CheckpointError
from miles.trainer.megatron.model import unwrapped

OPTIMIZER, SCHEDULE = "optimizer", "opt_param_scheduler"
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

DESCRIPTION = ".metadata"
MARK = "metadata.json"

KNOWN = {
    "torch": None,
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": None,
    "megatron.core.dist_checkpointing.mapping": None,
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "slice"},
}
"""Modules, and the names in them, that the description of a checkpoint may refer to. None: classes and values alone."""


def is_checkpoint(folder: Path) -> bool:
    return (folder / MARK).is_file() and (folder / DESCRIPTION).is_file()


class Saver:
    """Writes checkpoints, one after the other, at once or by processes of Megatron's while training goes on."""

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()

    def save(self, folder: Path, chunks: Sequence[Any], optimizer: Any, num_steps: int, *, background: bool) -> None:
        """Every rank calls this. `optimizer` None leaves it out."""
        self.finish()
        state = model_state(chunks)
        if optimizer is not None:
            state[OPTIMIZER] = optimizer.sharded_state_dict(state, is_loading=False, metadata=CONTENT)
            state[SCHEDULE] = {"num_steps": num_steps}
        request = dist_checkpointing.save(
            state, str(folder), async_sharded_save=background, content_metadata=dict(CONTENT)
        )
        if background:
            self._queue.schedule_async_request(request)

    def finish(self) -> None:
        """Wait for what is being written. Raises what went wrong with it."""
        self._queue.maybe_finalize_async_calls(blocking=True)


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, *, flag: str = "--load") -> int | None:
    """Fill the model, and `optimizer` if it is not None and the checkpoint has one. The schedule's step, or None where
    there is no optimizer to load. CheckpointError, which names `flag`, for a checkpoint of another model."""
    refuse_foreign(folder, flag)
    with readable(folder, flag):
        there = dist_checkpointing.load_tensors_metadata(str(folder))
        common = dist_checkpointing.load_common_state_dict(str(folder))
    state = model_state(chunks)
    check(state, there, folder, flag)
    with_optimizer = optimizer is not None and SCHEDULE in common
    if with_optimizer:
        state[OPTIMIZER] = optimizer.sharded_state_dict(state, is_loading=True, metadata=CONTENT)
        state[SCHEDULE] = {"num_steps": 0}
    with readable(folder, flag):
        found = dist_checkpointing.load(state, str(folder))
    for name, chunk in named(chunks):
        unwrapped(chunk).load_state_dict(found[name], strict=True)
    if not with_optimizer:
        return None
    optimizer.load_state_dict(found[OPTIMIZER])
    return int(found[SCHEDULE]["num_steps"])


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    return {name: unwrapped(chunk).sharded_state_dict() for name, chunk in named(chunks)}


def named(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Chunks under Megatron's names for them: `model`, or `model0`, `model1`, ... of virtual stages."""
    for number, chunk in enumerate(chunks):
        yield ("model" if len(chunks) == 1 else f"model{number}"), chunk


def check(state: dict[str, Any], there: dict[str, ShardedTensor], folder: Path, flag: str) -> None:
    """CheckpointError lists the tensors of the model that the checkpoint has not, or in other shapes."""
    problems = []
    for tensor in _leaves(state):
        if not isinstance(tensor, ShardedTensor) or tensor.allow_shape_mismatch:
            continue
        found = there.get(tensor.key)
        if found is None:
            problems.append(f"{tensor.key}: not in the checkpoint")
        elif tuple(found.global_shape) != tuple(tensor.global_shape):
            problems.append(f"{tensor.key}: {list(found.global_shape)} there, {list(tensor.global_shape)} in the model")
    if problems:
        shown = "\n  ".join(problems[:6]) + (f"\n  and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(
            f"{flag} {folder}: the checkpoint is of another architecture than --hf-checkpoint:\n  {shown}\n"
            f"Give the model folder that it was trained from, or leave out {flag}."
        )


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _leaves(value)
    elif isinstance(state, ShardedBase):
        yield state


@contextmanager
def readable(folder: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError, CheckpointingException) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{flag}: {folder} cannot be read ({type(error).__name__}: {reason[0] if reason else ''}). Expected a "
            "checkpoint that --save wrote; an older one can be named through latest_checkpointed_iteration.txt in the "
            "folder above."
        ) from error


class _Looked(pickle.Unpickler):
    """Reads a description as far as it consists of what is `KNOWN`."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = KNOWN.get(module, frozenset())
        value = super().find_class(module, name) if allowed is None or name in allowed else None
        if value is None or (allowed is None and not isinstance(value, type | torch.dtype | torch.layout)):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return value


def refuse_foreign(folder: Path, flag: str) -> None:
    """CheckpointError for a description that refers to anything but what descriptions are made of: reading it would
    call that."""
    with readable(folder, flag), open(folder / DESCRIPTION, "rb") as file:
        _Looked(file).load()
