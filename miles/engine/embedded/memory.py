"""Giving memory back while somebody else needs it, and taking it again: `/release_memory_occupation` and its opposite.

    kv_cache    keys and values of all slots; allocated anew as requests come
    weights     all tensors of the model; read again from where they came (folder, shared memory, a trainer's tensors),
                or missing until the next weight update, if they came over the network
    cuda_graph  accepted, because SGLang has it; this engine has none

Until everything is back, requests are answered with 503 and a sentence; those that are inside wait. Everything here
runs in the engine's thread, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from miles.engine.embedded.scheduler import Scheduler
from miles.engine.protocol import BadRequestError
from miles.errors import EngineError

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")

Source = Callable[[], Mapping[str, Tensor]]
"""Reads the weights again."""


class Memory:
    """What the engine has given back."""

    def __init__(self, scheduler: Scheduler, load: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._scheduler, self._load = scheduler, load
        self.released: set[str] = set()
        self.source: Source | None = None  # where the weights in use came from, if they can be had from there again
        self.weights_missing = False

    @property
    def ready(self) -> bool:
        return not (self.released or self.weights_missing)

    def check(self) -> None:
        """Raises EngineError (503) while nothing can be generated."""
        if self.released:
            raise EngineError(
                f"this engine's memory is released ({', '.join(sorted(self.released))}). Call "
                "/resume_memory_occupation first.",
                status=503,
            )
        if self.weights_missing:
            raise EngineError(
                "this engine has no weights since /release_memory_occupation. Send it weights "
                "(/update_weights_from_tensor, _from_distributed, _from_disk or _from_shared_memory).",
                status=503,
            )

    def check_takes_weights(self) -> None:
        """Raises EngineError where there is no room for a weight update."""
        if "weights" in self.released:
            raise EngineError(
                "this engine's weights are released: call /resume_memory_occupation with tags ['weights'] before an "
                "update.",
                status=400,
            )

    def weights_taken(self, source: Source | None) -> None:
        """New weights are in use."""
        self.source, self.weights_missing = source, False

    def release(self, tags: Iterable[str] | None) -> None:
        wanted = _checked(tags, "release_memory_occupation")
        if self._scheduler.running:
            raise BadRequestError(
                f"release_memory_occupation: {len(self._scheduler.running)} requests are running. Wait for them, abort "
                "them, or pause_generation with mode 'retract' first."
            )
        if "kv_cache" in wanted:
            self._scheduler.cache.free()
        if "weights" in wanted:
            self._scheduler.model.forget()
        self.released |= wanted

    def resume(self, tags: Iterable[str] | None) -> None:
        back = _checked(tags, "resume_memory_occupation") & self.released
        if "weights" in back:
            if self.source is None:
                self.weights_missing = True
            else:
                self._load(self.source())
        self.released -= back


def _checked(tags: Iterable[str] | None, endpoint: str) -> set[str]:
    wanted = set(tags or MEMORY_TAGS)
    if unknown := sorted(wanted.difference(MEMORY_TAGS)):
        raise BadRequestError(f"{endpoint}: tags must be among {', '.join(MEMORY_TAGS)}, got {unknown}.")
    return wanted
