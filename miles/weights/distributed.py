"""Weights to engines by broadcasts in a process group: this process is rank 0, every process of an engine is another.

    this process     /init_weights_update_group ─► all engines join     broadcast ─┬─► engine 0
                     /update_weights_from_distributed: what comes next             └─► engine 1

SGLang's servers and embedded engines take part alike. A group is kept as long as its engines are the same. A collective
has no other outcome than all or none: when it breaks, the engines that caused it drop out, the group is formed anew
without them, and all weights are sent again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.engine.process import free_port
from miles.errors import EngineError
from miles.weights.delivery import Failures, of_each
from miles.weights.gather import buckets
from miles.weights.process_group import init_process_group
from miles.weights.round import UPDATE_S, Round, update

if TYPE_CHECKING:
    from miles.engine.member import Member

# How long the members of a group may keep each other waiting.
COLLECTIVE_S = 60.0


class DistributedDelivery:
    """Implements `Delivery` for engines that reach this process at `host`.

    `ranks`: processes of one engine. `device`: where this process broadcasts from; gloo sends from the host's memory,
    nccl from a GPU that no engine of the group computes on.
    """

    def __init__(
        self,
        bucket_bytes: int,
        *,
        ranks: int = 1,
        host: str = "127.0.0.1",
        backend: str = "gloo",
        device: str = "cpu",
        timeout_s: float = UPDATE_S,
        collective_s: float = COLLECTIVE_S,
    ) -> None:
        self.bucket_bytes, self.ranks, self.host, self.backend = bucket_bytes, ranks, host, backend
        self.device, self.timeout_s, self.collective_s = torch.device(device), timeout_s, collective_s
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        self._joined: list[tuple[Member, str]] = []

    def before_writing(self, members: Sequence[Member]) -> Failures:
        """Engines have copies of their own and may go on until `deliver`."""
        return {}

    def deliver(self, members: Sequence[Member], tensors: Mapping[str, Tensor], version: str) -> Failures:
        """EngineError of those that fail."""
        return update(members, version, lambda now: self._send(now, tensors, version), self.timeout_s)

    def close(self) -> None:
        """Leave the group, if there is one; engines that are gone do not mind."""
        former, self._joined = [m for m, url in self._joined if m.url == url], []
        name = self._name
        of_each(former, lambda m: m.call("/destroy_weights_update_group", {"group_name": name}, timeout_s=10.0))
        self._leave()

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if self.backend == "nccl":
            group.abort()  # what waits for a member that is gone would never end
        dist.destroy_process_group(group)

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _send(self, now: Round, tensors: Mapping[str, Tensor], version: str) -> None:
        """Until all who are left have everything; every attempt that breaks costs at least one engine."""
        while now.members and not self._attempt(now, tensors, version):
            self.close()

    def _attempt(self, now: Round, tensors: Mapping[str, Tensor], version: str) -> bool:
        """Whether nobody dropped out."""
        size = len(now.members)
        if [(m, m.url) for m in now.members] != self._joined:
            self.close()
            self._join(now)
        if len(now.members) == size:
            now.begin()
        parts = list(buckets(tensors, self.bucket_bytes))
        for names in parts:
            if len(now.members) < size:
                return False
            self._broadcast(now, {n: tensors[n] for n in names}, version if names is parts[-1] else None)
        if len(now.members) < size:
            return False
        now.end()
        return True

    def _join(self, now: Round) -> None:
        members, port = list(now.members), free_port(self.host)
        self._name = f"miles-{uuid.uuid4().hex[:12]}"
        world = 1 + len(members) * self.ranks
        body = {
            "master_address": self.host,
            "master_port": port,
            "world_size": world,
            "group_name": self._name,
            "backend": self.backend,
        }

        def join(member: Member) -> None:
            own = body | {"rank_offset": 1 + members.index(member) * self.ranks}
            member.call("/init_weights_update_group", own, timeout_s=2 * self.collective_s)

        def join_here() -> None:
            host = f"[{self.host}]" if ":" in self.host else self.host
            self._group = init_process_group(
                self.backend,
                f"tcp://{host}:{port}",
                timedelta(seconds=self.collective_s),
                world,
                0,
                group_name=self._name,
            )

        self._joined = [(m, m.url) for m in members]
        self._together(now, join, join_here)

    def _broadcast(self, now: Round, tensors: Mapping[str, Tensor], version: str | None) -> None:
        body: dict[str, Any] = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        if version is not None:
            body["weight_version"] = version
        flat = torch.cat([t.detach().reshape(-1) for t in tensors.values()]).view(torch.uint8).to(self.device)

        def receive(member: Member) -> None:
            member.call("/update_weights_from_distributed", body, timeout_s=self.timeout_s)

        self._together(now, receive, lambda: dist.broadcast(flat, 0, group=self._group) and None)

    def _together(self, now: Round, act: Callable[[Member], None], act_here: Callable[[], None]) -> None:
        """The engines' part and ours of one collective.

        Where ours fails, the group is left at once: engines that still wait in it fail too, and without delay. To blame
        are then those that do not answer any more; where all answer, whoever failed; where nobody did, all.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="miles-collective") as pool:
            theirs = pool.submit(of_each, list(now.members), act)
            broken: str | None = None
            try:
                act_here()
            except (RuntimeError, ValueError) as error:  # what torch.distributed raises, time-outs included
                broken = str(error)  # not the error: its traceback keeps the group, and with it the connections
            if broken is not None:
                self._leave()
            failures = theirs.result()
        if broken is not None:
            failures = {m: e for m, e in failures.items() if e.status is None} or failures
        if broken is not None and not failures:
            failures = {
                m: EngineError(f"{m.name} ({m.url}): the broadcast of weights broke: {broken}") for m in now.members
            }
        now.drop(failures)
