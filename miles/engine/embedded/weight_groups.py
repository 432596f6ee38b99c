"""The process groups over which trainers broadcast weights to an engine (`/update_weights_from_distributed`).

The engine is one of the receivers; rank 0 of each group is the trainer's. Everything here blocks, until the group's
timeout at the latest, and runs beside the engine's thread: the engine goes on generating from the weights that it has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from miles.engine.protocol import BadRequestError
from miles.errors import EngineError
from miles.weights.process_group import init_process_group


class WeightGroups:
    """Groups by name. A group on which a broadcast failed is gone: its members are no longer in step."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._device, self._timeout_s = device, timeout_s
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._lock = threading.Lock()

    def join(self, name: str, *, host: str, port: int, rank: int, size: int, backend: str) -> None:
        """Wait for the other members. EngineError where they do not come, BadRequestError for a backend that cannot
        work here."""
        if backend == "nccl" and self._device.type != "cuda":
            raise BadRequestError(
                f"init_weights_update_group: nccl needs a GPU, and this engine is on {self._device}. Use gloo."
            )
        if not dist.is_backend_available(backend):
            raise BadRequestError(f"init_weights_update_group: this PyTorch has no backend {backend!r}.")
        if not 0 <= rank < size:
            raise BadRequestError(f"init_weights_update_group: rank_offset {rank} is outside world_size {size}.")
        with self._lock:
            if name in self._groups:
                raise BadRequestError(f"init_weights_update_group: this engine is in a group {name!r} already.")
            address = f"[{host}]" if ":" in host else host
            try:
                self._groups[name] = init_process_group(
                    backend,
                    f"tcp://{address}:{port}",
                    timedelta(seconds=self._timeout_s),
                    size,
                    rank,
                    group_name=name,
                )
            except Exception as error:  # of the store, the sockets or the backend: each has its own
                raise EngineError(
                    f"this engine waited {self._timeout_s:g} s at most for the {size} members of group {name!r} at "
                    f"{host}:{port}, and there is none: {_first_line(error)}",
                    status=400,
                ) from error

    def leave(self, name: str) -> None:
        with self._lock:
            group = self._groups.pop(name, None)
            if group is None:
                raise BadRequestError(f"destroy_weights_update_group: this engine is in no group {name!r}.")
            dist.destroy_process_group(group)

    def leave_all(self) -> None:
        for name in list(self._groups):
            self.leave(name)

    def receive(
        self, name: str, shapes: dict[str, tuple[list[int], torch.dtype]], *, flattened: bool
    ) -> dict[str, Tensor]:
        """The tensors that rank 0 broadcasts now, one by one in this order, or (`flattened`) as one row of bytes."""
        with self._lock:
            group = self._groups.get(name)
            if group is None:
                known = ", ".join(map(repr, self._groups)) or "none"
                raise BadRequestError(
                    f"update_weights_from_distributed: this engine is in no group {name!r} (but: {known}). Call "
                    "/init_weights_update_group first."
                )
            device = self._device if dist.get_backend(group) == "nccl" else torch.device("cpu")
            try:
                return _row(group, shapes, device) if flattened else _each(group, shapes, device)
            except Exception as error:
                del self._groups[name]
                raise EngineError(
                    f"this engine waited {self._timeout_s:g} s at most for the broadcast of {len(shapes)} tensors from "
                    f"rank 0 of group {name!r}: {_first_line(error)} The group is gone: make a new one.",
                    status=400,
                ) from error


def _each(
    group: dist.ProcessGroup, shapes: dict[str, tuple[list[int], torch.dtype]], device: torch.device
) -> dict[str, Tensor]:
    received = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    works = [dist.broadcast(tensor, group_src=0, group=group, async_op=True) for tensor in received.values()]
    for work in works:
        work.wait()
    return received


def _row(
    group: dist.ProcessGroup, shapes: dict[str, tuple[list[int], torch.dtype]], device: torch.device
) -> dict[str, Tensor]:
    """SGLang's flattened bucket: the bytes of all tensors one after the other."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()]
    row = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.broadcast(row, group_src=0, group=group)
    parts: Sequence[Tensor] = row.split(sizes)
    # A part may begin where its dtype cannot: each gets memory of its own.
    return {name: part.clone().view(dtype).view(shape) for (name, (shape, dtype)), part in zip(shapes.items(), parts)}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
