"""Whole tensors from the shards of several processes, a bucket at a time, on rank 0.

Only rank 0 holds more than its shards, and of those never more than one bucket (`--update-weight-buffer-size`) and the
largest tensor. Every rank must run the loop to its end: each bucket is one collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from miles.weights import Bucket, Shapes


class Held(Mapping[str, Tensor]):
    """Implements `Weights` for tensors in memory, which are whole or shards (DTensor) over ranks. In one process, an
    engine may read them in place."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def layout(self) -> Shapes:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.items()}

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        return gathered(self, bucket_bytes)


def gathered(weights: Mapping[str, Tensor], bucket_bytes: int) -> Iterator[Bucket]:
    """The tensors of `weights`, whole: on rank 0 in its order; other ranks get as many empty buckets.

    Tensors that are not cut are given as they are, also where there is only one process.
    """
    for names in buckets(weights, bucket_bytes):
        cut = {name: t for name in names if isinstance(t := weights[name], DTensor)}
        whole = _gather(cut) if cut else {}
        if whole is not None:
            yield {name: whole[name] if name in whole else weights[name] for name in names}
        else:
            yield {}


def buckets(weights: Mapping[str, Tensor], bucket_bytes: int) -> Iterator[list[str]]:
    """Consecutive names of one dtype whose whole tensors fit `bucket_bytes`; a larger tensor gets its own."""
    names: list[str] = []
    filled, dtype = 0, None
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        if names and (filled + size > bucket_bytes or tensor.dtype != dtype):
            yield names
            names, filled = [], 0
        names.append(name)
        filled, dtype = filled + size, tensor.dtype
    if names:
        yield names


def rows_of(num_rows: int, size: int, rank: int) -> tuple[int, int]:
    """The rows [begin, end) of a tensor that `rank` holds: equal parts rounded up, what is left at the end."""
    each = -(-num_rows // size)
    return min(rank * each, num_rows), min((rank + 1) * each, num_rows)


def _gather(cut: Mapping[str, DTensor]) -> Bucket | None:
    """One collective for all of them; None on other ranks than 0."""
    mesh = next(iter(cut.values())).device_mesh
    size, group = mesh.size(), mesh.get_group()
    padded = []
    for tensor in cut.values():
        assert tensor.placements == (Shard(0),), tensor.placements
        local = tensor.to_local().detach().reshape(-1)
        room = _part(tensor, size)
        padded.append(torch.nn.functional.pad(local, (0, room - local.numel())))
    own = torch.cat(padded)
    parts = [torch.empty_like(own) for _ in range(size)] if mesh.get_rank() == 0 else None
    dist.gather(own, parts, group=group, group_dst=0)
    if parts is None:
        return None
    whole, begin = {}, 0
    for name, tensor in cut.items():
        room, row = _part(tensor, size), tensor.numel() // max(tensor.shape[0], 1)
        pieces = []
        for rank, part in enumerate(parts):
            first, last = rows_of(tensor.shape[0], size, rank)
            pieces.append(part[begin : begin + (last - first) * row])
        whole[name] = torch.cat(pieces).view(tensor.shape)
        begin += room
    return whole


def _part(tensor: DTensor, size: int) -> int:
    """Elements of the largest shard."""
    rows = tensor.shape[0]
    return -(-rows // size) * (tensor.numel() // rows) if rows else 0
