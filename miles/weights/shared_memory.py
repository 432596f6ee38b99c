"""Trainer processes to an engine in another process of this machine: one piece of memory that both map.

    rank 0     gathers bucket by bucket and writes    ──►  memory  ◄──  driver: the engine's own weights lie in it

The memory has no name: it is a file descriptor that the driver opens and rank 0 inherits, so that nothing is left
behind however the processes end. It holds every weight once, and the engine reads it in place. Whoever drives must
suspend the engine before the ranks write, and call `EmbeddedEngine.update_weights` after it.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

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
