"""What a fleet does with its engines around a weight update; one file per way, all with the methods of `Delivery`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from miles.errors import EngineError

if TYPE_CHECKING:
    from miles.engine.member import Member

Failures = dict["Member", EngineError]
"""Engines that did not take part, and why: none of them may serve the version."""


class Delivery(Protocol):
    def before_writing(self, members: Sequence[Member]) -> Failures:
        """The memory that holds the weights is about to change. Engines that read it in place must stop."""

    def deliver(self, members: Sequence[Member], tensors: Mapping[str, Tensor], version: str) -> Failures:
        """Make every engine generate from `tensors`, which lie in the memory, as `version`."""


def of_each(members: Iterable[Member], act: Callable[[Member], None]) -> Failures:
    """`act` for all of them at the same time; who failed and how."""
    engines = list(members)
    if not engines:
        return {}
    failures: Failures = {}
    with ThreadPoolExecutor(len(engines), thread_name_prefix="miles-fleet-call") as pool:
        for member, done in [(m, pool.submit(act, m)) for m in engines]:
            try:
                done.result()
            except EngineError as error:
                failures[member] = error
    return failures


class SharedMemoryDelivery:
    """Embedded engines of this machine read the memory in place: they stop, it is written once, and they go on."""

    def before_writing(self, members: Sequence[Member]) -> Failures:
        return of_each(members, lambda m: m.call("/pause_generation", {"mode": "in_place"}))

    def deliver(self, members: Sequence[Member], tensors: Mapping[str, Tensor], version: str) -> Failures:
        def take(member: Member) -> None:
            member.call("/update_weights_from_shared_memory", {"weight_version": version, "flush_cache": False})
            member.call("/continue_generation", {})

        return of_each(members, take)
