"""Weights to SGLang servers of this machine through shared memory: of the host, or of the GPU that they lie on.

    buffer (one bucket)  ◄── this process copies a bucket in
        │ its name, in a pickle, over HTTP
        ▼
    SGLang maps it, loads the tensors, answers  ──► the buffer takes the next bucket

SGLang reads a pickle from us; nothing here reads one. Its unpickler admits a short list of names, and the payload uses
no others, so that this process needs no SGLang: the description of a bucket is read by attribute names, which a
SimpleNamespace has. The embedded engine takes no pickles; it shares the memory itself (`shared_memory.py`).
"""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from miles.errors import FlagError
from miles.weights.delivery import Failures
from miles.weights.gather import buckets
from miles.weights.round import UPDATE_S, Round, update

if TYPE_CHECKING:
    from miles.engine.member import Member

# Where shared memory of the host lies on Linux.
SHARED = "/dev/shm"


class TensorDelivery:
    """Implements `Delivery` for SGLang servers of this machine.

    `ranks` is the number of processes of one engine (its tensor-parallel size): each maps the buffer by itself and
    takes its part. `flattened` sends a bucket as one piece of memory, which is fast; otherwise every tensor is one.
    """

    def __init__(
        self, bucket_bytes: int, *, ranks: int = 1, flattened: bool = True, timeout_s: float = UPDATE_S
    ) -> None:
        self.bucket_bytes, self.ranks, self.flattened, self.timeout_s = bucket_bytes, ranks, flattened, timeout_s
        self._buffer: Tensor | None = None

    def before_writing(self, members: Sequence[Member]) -> Failures:
        """Servers have copies of their own and may go on until `deliver`."""
        return {}

    def deliver(self, members: Sequence[Member], tensors: Mapping[str, Tensor], version: str) -> Failures:
        """EngineError of those that fail; FlagError where the machine has no room for the buffer."""
        return update(members, version, lambda now: self._send(now, tensors, version), self.timeout_s)

    def _send(self, now: Round, tensors: Mapping[str, Tensor], version: str) -> None:
        parts = list(buckets(tensors, self.bucket_bytes))
        now.begin()
        for names in parts:
            payload = self._payload({name: tensors[name].detach() for name in names})
            body: dict[str, Any] = {"load_format": "flattened_bucket" if self.flattened else None, "flush_cache": False}
            if names is parts[-1]:
                body["weight_version"] = version

            def take(member: Member, body: Mapping[str, Any] = body, payload: Any = payload) -> None:
                # One pickle per reader: each of them counts the memory down once.
                pickles = [serialised(payload) for _ in range(self.ranks)]
                member.call(
                    "/update_weights_from_tensor",
                    {**body, "serialized_named_tensors": pickles},
                    timeout_s=self.timeout_s,
                )

            now.each(take)
        now.end()

    def _payload(self, tensors: Mapping[str, Tensor]) -> Any:
        if not self.flattened:
            return [(name, _shareable(tensor)) for name, tensor in tensors.items()]
        whole = sum(t.numel() * t.element_size() for t in tensors.values())
        device = next(iter(tensors.values())).device
        if self._buffer is None or self._buffer.numel() < whole or self._buffer.device != device:
            self._buffer = None  # the old one goes before there is a new one
            self._buffer = _shared_bytes(max(whole, min(self.bucket_bytes, whole * 2)), device)
        return flattened(tensors, self._buffer)


def flattened(tensors: Mapping[str, Tensor], buffer: Tensor) -> dict[str, Any]:
    """Copy the tensors, all of one dtype, into `buffer` (uint8) one after the other; SGLang's description of that.

    Example: `{"flattened_tensor": buffer, "metadata": [SimpleNamespace(name="model.norm.weight", dtype=torch.float32,
    shape=torch.Size([64]), start_idx=0, end_idx=256, numel=256)]}`
    """
    described, end = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size:
            buffer[end : end + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        described.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=end, end_idx=end + size, numel=size
            )
        )
        end += size
    return {"flattened_tensor": buffer, "metadata": described}


def serialised(payload: Any) -> str:
    """A pickle in base64 in which tensors are names of memory and not their values."""
    data = io.BytesIO()
    with _named_memory():
        ForkingPickler(data).dump(payload)
    return base64.b64encode(data.getvalue()).decode()


_strategy = threading.RLock()


@contextmanager
def _named_memory() -> Iterator[None]:
    """Tensors of the host are shared by the name of their memory: a descriptor, which is the default, cannot be sent to
    a process that is no child of this one."""
    with _strategy:
        before = mp.get_sharing_strategy()
        mp.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            mp.set_sharing_strategy(before)


def _shared_bytes(size: int, device: torch.device) -> Tensor:
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return _shared(buffer) if device.type == "cpu" else buffer


def _shareable(tensor: Tensor) -> Tensor:
    """Alone in its memory, so that nothing else of it is shared."""
    return _shared(tensor.contiguous().clone()) if tensor.device.type == "cpu" else tensor.contiguous()


def _shared(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    if os.path.isdir(SHARED):
        room = os.statvfs(SHARED)
        free = room.f_bavail * room.f_frsize
        if size > free:
            raise FlagError(
                "--update-weight-buffer-size",
                given=f"a bucket of {size} bytes does not fit the {free} bytes that are free in {SHARED}.",
                remedy="Make it smaller, give the machine more shared memory (docker run --shm-size), or use "
                "--update-weight-transport disk.",
            )
    with _named_memory():
        return tensor.share_memory_()
