"""The processes that train one model together: who is who, and the few numbers that they agree on.

A *rank* is one process. `Ranks.alone()` is the only process of a run that trains in one: no process group, and every
sum is the value itself, so that callers need no case for it. Gradients and weights travel inside of the backend; what
is here are token counts, metrics and the number of passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from miles.loss.parallel_state import ParallelState


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. `mesh` is None where there is no process group.

    Example: `Ranks(rank=1, size=2, mesh=DeviceMesh("cpu", [0, 1]))`
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    # Ranks whose samples are summed; None for all. Those outside of it hold the same samples as some inside.
    sum_group: dist.ProcessGroup | None = None
    # Who tells `gather` of samples that several ranks hold; None for everybody.
    speakers: tuple[int, ...] | None = None

    @staticmethod
    def alone() -> Ranks:
        return Ranks()

    @staticmethod
    def join(
        rank: int, size: int, rendezvous: Path, *, backend: str, cpu_backend: str, timeout_s: float, device: str
    ) -> Ranks:
        """Meet the others over a file that all of them can reach; waits for all.

        Tensors in main memory always travel with `cpu_backend`, so that metrics never wait for a GPU.
        """
        kind = f"cpu:{cpu_backend},cuda:{backend}" if device == "cuda" else backend
        dist.init_process_group(
            kind,
            store=dist.FileStore(str(rendezvous), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        return Ranks(rank, size, init_device_mesh(device, (size,), mesh_dim_names=("dp",)))

    def leave(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()

    def parallel_state(self) -> ParallelState:
        """Pure data parallelism under the published names; tensor- and context-parallel groups hold one rank each."""
        if self.mesh is None:
            return ParallelState.single_process()
        group = self.mesh.get_group()
        own, _ = dist.new_subgroups(group_size=1)
        return ParallelState(
            dp_rank=self.rank,
            dp_size=self.size,
            dp_cp_rank=self.rank,
            dp_cp_size=self.size,
            dp_group=group,
            dp_cp_group=group,
            dp_cp_group_gloo=group,
            cp_group=own,
            tp_group=own,
            dp_mesh=self.mesh,
        )

    # ---- what they agree on; every rank must call these in the same order ----------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks that have samples of their own, the same bits on all of them. `values` stay
        as they are."""
        if self.mesh is None:
            return values
        total = values.detach().clone()
        dist.all_reduce(total, group=self.sum_group)
        return total

    def largest(self, value: int) -> int:
        if self.mesh is None:
            return value
        both = torch.tensor(value)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return int(both)

    def any(self, happened: bool) -> bool:
        """Whether it happened on one of all ranks, those that hold the same samples included."""
        return bool(self.largest(int(happened)))

    def gather(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        """The named numbers of every rank that speaks, in the order of ranks. They travel as JSON, which keeps every
        bit."""
        if self.mesh is None:
            return [values]
        text = torch.frombuffer(bytearray(json.dumps(dict(values)).encode()), dtype=torch.uint8)
        longest = self.largest(len(text))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(text)] = text
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded)
        speakers = range(self.size) if self.speakers is None else self.speakers
        return [json.loads(bytes(received[rank].numpy())) for rank in speakers]


def own_device() -> torch.device:
    """The GPU of this process where there is one (a rank is given its own), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
