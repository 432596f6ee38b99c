"""Trainer processes to an engine in another process of this machine: one piece of memory that both map.

    rank 0     gathers bucket by bucket and writes    ──►  memory  ◄──  driver: the engine's own weights lie in it

The memory has no name: it is a file descriptor that the driver opens and rank 0 inherits, so that nothing is left
behind however the processes end. It holds every weight once, and the engine reads it in place. Whoever drives must
suspend the engine before the ranks write, and call `EmbeddedEngine.update_weights` after it. An engine in a process of
its own inherits the descriptor, too, and finds the layout in a JSON file (`layout_to_json`).
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from miles.weights import Shapes, Weights

# Where a tensor may begin: a line of the processor's cache.
ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies.

    Example: `Slot(offset=27136, dtype=torch.float32, shape=(128, 128))`
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Layout = dict[str, Slot]


def anonymous_file() -> int:
    """A file descriptor of memory without a name; on systems that have no such thing, of a file without one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("miles-weights")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def layout_of(shapes: Shapes) -> tuple[Layout, int]:
    """A place for each tensor, and how many bytes all of them take."""
    layout, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        layout[name] = slot = Slot(end, dtype, shape)
        end += -(-slot.bytes // ALIGNMENT) * ALIGNMENT
    return layout, end


def views(fd: int, layout: Layout, size: int) -> dict[str, Tensor]:
    """The tensors in the memory of `fd`, which are the same ones in every process that maps it."""
    memory = torch.frombuffer(mmap.mmap(fd, max(size, ALIGNMENT)), dtype=torch.uint8)
    return {
        name: memory[slot.offset : slot.offset + slot.bytes].view(slot.dtype).view(slot.shape)
        for name, slot in layout.items()
    }


def layout_to_json(layout: Layout, size: int) -> dict[str, Any]:
    """For a process that does not read pickles.

    Example: `{"size": 512, "tensors": {"model.norm.weight": {"offset": 0, "dtype": "float32", "shape": [128]}}}`
    """
    tensors = {
        name: {"offset": slot.offset, "dtype": str(slot.dtype).removeprefix("torch."), "shape": list(slot.shape)}
        for name, slot in layout.items()
    }
    return {"size": size, "tensors": tensors}


def layout_from_json(body: object) -> tuple[Layout, int]:
    """The reverse. ValueError says what is wrong with it."""
    if not isinstance(body, dict) or not isinstance(body.get("tensors"), dict) or not _is_count(body.get("size")):
        raise ValueError("expected an object with 'size' (bytes) and 'tensors'")
    layout = {str(name): _slot_from_json(str(name), entry, body["size"]) for name, entry in body["tensors"].items()}
    return layout, body["size"]


def _slot_from_json(name: str, entry: object, size: int) -> Slot:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected an object with 'offset', 'dtype' and 'shape'")
    offset, shape = entry.get("offset"), entry.get("shape")
    if not _is_count(offset) or not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name}: expected 'offset' and 'shape' in whole numbers >= 0, got {offset!r} and {shape!r}")
    slot = Slot(offset, dtype_named(entry.get("dtype")), tuple(shape))
    if slot.offset % slot.dtype.itemsize:
        raise ValueError(f"{name}: offset {slot.offset} is no multiple of {slot.dtype.itemsize}, an element's bytes")
    if slot.offset + slot.bytes > size:
        raise ValueError(f"{name}: ends at byte {slot.offset + slot.bytes} of a memory of {size}")
    return slot


def dtype_named(name: object) -> torch.dtype:
    """`float32` or `torch.float32`; ValueError for what is no dtype."""
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype, like 'float32' or 'bfloat16'")
    return dtype


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


class SharedMemory:
    """Implements `WeightTransport` on the ranks; `fd` is None on all but rank 0."""

    def __init__(self, fd: int | None, bucket_bytes: int) -> None:
        self.fd, self.bucket_bytes = fd, bucket_bytes
        self._views: dict[str, Tensor] | None = None

    def share(self, weights: Weights) -> tuple[Layout, int]:
        """Make room, write the weights for the first time, and say where they are."""
        layout, size = layout_of(weights.layout())
        if self.fd is not None:
            os.ftruncate(self.fd, max(size, ALIGNMENT))
            self._views = views(self.fd, layout, size)
        self._write(weights)
        return layout, size

    def suspend(self) -> None:
        """The engine reads other memory than the optimizer writes: it may go on until `update`."""

    def update(self, weights: Weights, version: int) -> None:
        """Write all weights; on return they are there. The driver tells the engine, and knows the version itself."""
        self._write(weights)

    def _write(self, weights: Weights) -> None:
        for bucket in weights.buckets(self.bucket_bytes):
            if self._views is not None:
                for name, tensor in bucket.items():
                    self._views[name].copy_(tensor)
