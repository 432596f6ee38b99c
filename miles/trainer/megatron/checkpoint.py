"""Checkpoints of a Megatron trainer with `megatron.core.dist_checkpointing`: any layout goes on from any other.

    <folder>/metadata.json  .metadata  common.pt     what there is, in which pieces
    <folder>/__<rank>_<n>.distcp                     the pieces: weights, and moments of the optimizer by parameter

The optimizer is written in Megatron's format `fully_reshardable`: one tensor per parameter, whoever holds it. Its
settings (rates, decay) are those of the flags and are not taken from a checkpoint; moments and steps are.

Files are written by processes of Megatron's (`writers`) and read here, where they may come from anywhere. Megatron
describes the pieces in a pickle, which can name any function: it is looked through before it is read, and only what
such a description is made of is allowed. Objects beside the tensors, which are pickles too, are not read at all.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import CheckpointError
from miles.observe.files import disk_errors
from miles.trainer.megatron import writers
from miles.trainer.megatron.model import unwrapped

OPTIMIZER = "optimizer"
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

# What is written here and by nobody else: steps of the schedule and of the optimizer, and the optimizer's kind.
OWN = "miles"

DESCRIPTION, MARK, COMMON = ".metadata", "metadata.json", "common.pt"

DEFINED_IN = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
}
"""Modules whose own classes, values without behaviour, a description may name."""

NAMED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    *(("builtins", name) for name in ("set", "frozenset", "dict", "list", "tuple", "slice")),
}
"""(module, name) of everything else that it may name, beside torch's dtypes and layouts."""

# What reading a file that is damaged, or none of ours, leads to in pickle, torch and Megatron.
DAMAGE = (
    OSError, EOFError, RuntimeError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, ImportError,
    AssertionError, pickle.UnpicklingError, CheckpointingException, CheckpointException,
)  # fmt: skip

# Problems that a message lists before it says how many more there are.
SHOWN = 6


# ---- writing -------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints, one after the other, at once or by processes of Megatron's while training goes on."""

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._folder = Path()

    def save(self, folder: Path, chunks: Sequence[Any], optimizer: Any, num_steps: int, *, background: bool) -> None:
        """Every rank calls this. `optimizer` None leaves it out. RunDirError where the disk does not take it."""
        self.finish()
        self._folder = folder
        state = model_state(chunks)
        if optimizer is not None:
            state[OPTIMIZER] = optimizer_state(optimizer, state, is_loading=False)
            state[OWN] = {
                "num_steps": num_steps,
                "optimizer_steps": steps_taken(optimizer),
                "distributed": is_distributed(optimizer),
            }
        with writable(folder), quietly(), writers.of_one_save():
            request = dist_checkpointing.save(
                state, str(folder), async_sharded_save=background, content_metadata=dict(CONTENT)
            )
            if background:
                self._queue.schedule_async_request(request)

    def finish(self) -> None:
        """Wait for what is being written. Raises what went wrong with it."""
        with writable(self._folder), quietly():
            self._queue.maybe_finalize_async_calls(blocking=True)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notices of torch about what Megatron still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """RunDirError for a disk that does not take the files, on the rank that collects what all of them met."""
    with disk_errors(folder, "--save"):
        try:
            yield
        except CheckpointException as error:  # not even an Exception
            met = [str(failure[0]) for failure in error.failures.values()]
            number = re.search(r"\[Errno (\d+)\]", met[0]) if met else None
            if number is not None:
                raise OSError(int(number[1]), met[0]) from error
            raise RuntimeError(met[0] if met else "another rank could not write its part") from error


# ---- reading -------------------------------------------------------------------------------------------------------


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, *, flag: str = "--load") -> int | None:
    """Fill the model in place, and `optimizer` if it is not None and this file's `Saver` has written it. Megatron reads
    into the tensors that describe what is wanted.

    The schedule's step, or None where there is no optimizer to load. CheckpointError, which names `flag`, for what is
    no checkpoint of this model, and for one that would run code.
    """
    refuse_foreign(folder, flag)
    with readable(folder, flag):
        there = dist_checkpointing.load_tensors_metadata(str(folder))
        common = dist_checkpointing.load_common_state_dict(str(folder))
    own = None if optimizer is None else common.get(OWN)
    state = without_objects(model_state(chunks))
    check(state, there, folder, flag, "the checkpoint is of another architecture than --hf-checkpoint")
    if own is None:
        with readable(folder, flag):
            dist_checkpointing.load(state, str(folder))
        return None
    refuse_other_optimizer(own["distributed"], is_distributed(optimizer), folder, flag)
    with own_settings(optimizer):
        state[OPTIMIZER] = optimizer_state(optimizer, state, is_loading=True)
        check(state[OPTIMIZER], there, folder, flag, "the optimizer in the checkpoint is another")
        with readable(folder, flag):
            found = dist_checkpointing.load(state, str(folder))
        use_moments(optimizer, found[OPTIMIZER], own["optimizer_steps"])
    return int(own["num_steps"])


def without_objects(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without what is not a tensor: reading that would run its pickle. Our modules keep nothing in it."""
    return {
        chunk: {name: value for name, value in entries.items() if not isinstance(value, ShardedObject)}
        for chunk, entries in state.items()
    }


def refuse_other_optimizer(theirs: bool, ours: bool, folder: Path, flag: str) -> None:
    if theirs != ours:
        given = "--use-distributed-optimizer" if ours else "--no-use-distributed-optimizer"
        other = "--no-use-distributed-optimizer" if ours else "--use-distributed-optimizer"
        raise CheckpointError(
            f"{flag} {folder}: its optimizer was saved with {other}, which is another form than that of {given}. "
            f"Resume with {other}, or without the optimizer's state: --no-load-optim."
        )


def check(state: Any, there: dict[str, ShardedTensor], folder: Path, flag: str, what: str) -> None:
    """CheckpointError lists the tensors of `state` that the checkpoint has not, or in other shapes. Of a vocabulary,
    which is padded to what the layout needs, the number of rows may differ."""
    problems = []
    for tensor in _tensors(state):
        found = there.get(tensor.key)
        if found is None:
            problems.append(f"{tensor.key}: not in the checkpoint")
            continue
        first = 1 if tensor.allow_shape_mismatch else 0
        theirs, ours = list(found.global_shape), list(tensor.global_shape)
        if theirs[first:] != ours[first:] or len(theirs) != len(ours):
            problems.append(f"{tensor.key}: {theirs} in the checkpoint, {ours} in the model")
    if problems:
        problems = list(dict.fromkeys(problems))
        shown = "\n  ".join(problems[:SHOWN])
        shown += f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{flag} {folder}: {what}:\n  {shown}\n"
            f"Give the model folder that it was trained from, or leave out {flag}."
        )


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
    elif isinstance(state, ShardedTensorFactory):
        yield from _tensors(state.build())
    elif isinstance(state, ShardedTensor):
        yield state


@contextmanager
def readable(folder: Path, flag: str) -> Iterator[None]:
    """CheckpointError for what cannot be read. Inside, `torch.load` takes what Megatron's own training writes."""
    try:
        with torch.serialization.safe_globals(list(SAFE_GLOBALS)), quietly():
            yield
    except DAMAGE as error:
        reason = str(error).strip()
        if isinstance(error, CheckpointException):
            reason = "; ".join(str(failure[0]) or type(failure[0]).__name__ for failure in error.failures.values())
        raise CheckpointError(
            f"{flag}: {folder} cannot be read ({type(error).__name__}: {reason.splitlines()[0] if reason else ''}). "
            "Expected a checkpoint that --save wrote with --train-backend megatron; an older one can be named through "
            "latest_checkpointed_iteration.txt in the folder above."
        ) from error


class Looked(pickle.Unpickler):
    """Reads a description as far as it names nothing that could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAMED:
            return super().find_class(module, name)
        if "." not in name and (module == "torch" or module in DEFINED_IN):
            value = super().find_class(module, name)
            if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
                return value
            if module in DEFINED_IN and isinstance(value, type) and value.__module__ == module:
                return value
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def refuse_foreign(folder: Path, flag: str) -> None:
    """CheckpointError for a description that refers to anything but what descriptions are made of: reading it would
    call that."""
    with readable(folder, flag):
        for name in (MARK, COMMON):
            (folder / name).stat()
        with open(folder / DESCRIPTION, "rb") as file:
            Looked(file).load()


# ---- model and optimizer -------------------------------------------------------------------------------------------


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Chunks under Megatron's names for them: `model`, or `model0`, `model1`, ... of virtual stages."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: unwrapped(chunk).sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}


def is_distributed(optimizer: Any) -> bool:
    return any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def optimizer_state(optimizer: Any, model: dict[str, Any], *, is_loading: bool) -> Any:
    """Masters and moments as sharded tensors."""
    for part in optimizer.chained_optimizers:
        make_moments(part)
    with told_steps(optimizer, steps_taken(optimizer)):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=CONTENT)


def make_moments(part: Any) -> None:
    """What the first step would make; Megatron saves, and reads into, what is there."""
    if part.is_stub_optimizer:
        return
    if not isinstance(part.optimizer, torch.optim.Adam):
        part.init_state_fn(part.optimizer, part.config)
        return
    for group in part.optimizer.param_groups:
        for p in group["params"]:
            if not part.optimizer.state[p]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[p] = {"step": torch.tensor(0.0), **moments}


def steps_taken(optimizer: Any) -> float:
    """Of the parameters, which are stepped together. A rank of the distributed optimizer may hold none, where a buffer
    is smaller than there are ranks: it is told by the others."""
    own = [0.0]
    for part in real_parts(optimizer):
        own += [float(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        own += [float(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    steps = torch.tensor(max(own))
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return float(steps)


def real_parts(optimizer: Any) -> list[Any]:
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


@contextmanager
def told_steps(optimizer: Any, steps: float) -> Iterator[None]:
    """Megatron takes the number of steps from the state of any parameter of a rank. Inside, a rank without one has it
    all the same."""
    inner = [part.optimizer for part in real_parts(optimizer) if isinstance(part.optimizer, torch.optim.Adam)]
    changed = [each for each in inner if not each.state]

    def with_steps(each: Any) -> Any:
        return lambda: {**type(each).state_dict(each), "state": {0: {"step": torch.tensor(steps)}}}

    for each in changed:
        each.state_dict = with_steps(each)
    try:
        yield
    finally:
        for each in changed:
            del each.state_dict


def use_moments(optimizer: Any, found: Any, steps: float) -> None:
    """What `found` holds for the distributed optimizer, whose tensors are parts of it; others have been filled in
    place. And the step of every parameter: a tensor of its own, which Megatron would let them share."""
    parts = optimizer.chained_optimizers
    for number, part in enumerate(parts):
        if part.is_stub_optimizer:
            continue
        states = list(part.optimizer.state.values())
        with_step = [state for state in states if state.pop("step", None) is not None]
        if isinstance(part, DistributedOptimizer):
            own = found if len(parts) == 1 else found[number]
            part.load_parameter_state_from_fully_reshardable(own["param_state"])
        for state in with_step:
            state["step"] = torch.tensor(steps)
        if not with_step and not isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["step"] = int(steps)


@contextmanager
def own_settings(optimizer: Any) -> Iterator[None]:
    """What is changed inside about the settings of parameter groups is changed back, but for a count of steps."""
    parts = real_parts(optimizer)
    before = [[dict(group) for group in part.optimizer.param_groups] for part in parts]
    yield
    for part, groups in zip(parts, before, strict=True):
        counts_there = not isinstance(part.optimizer, torch.optim.Adam)
        for group, own in zip(part.optimizer.param_groups, groups, strict=True):
            count = {"step": group["step"]} if counts_there and "step" in group else {}
            own = {**own, "params": group["params"], **count}
            group.clear()
            group.update(own)
