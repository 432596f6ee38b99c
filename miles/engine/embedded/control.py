"""What may be done to an embedded engine while it runs: abort, pause, flush, other weights, memory given back.

All of it may be called from any thread and takes effect between two steps (`EngineControl._call`). How requests come in
and results go out is `engine.py`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from miles.engine.embedded.checker import WeightsChecker
from miles.engine.embedded.memory import Memory, Source
from miles.engine.embedded.model import DecoderModel, flat_names, load_tensors
from miles.engine.embedded.scheduler import Running, Scheduler
from miles.engine.protocol import BadRequestError

T = TypeVar("T")

PAUSE_MODES = ("abort", "retract", "in_place")


class EngineControl:
    """The control half of `EmbeddedEngine`."""

    model: DecoderModel
    checker: WeightsChecker
    """For `submit`: its methods run in the engine's thread."""
    last_error: str | None = None
    """Of a step or a weight update; for whoever wonders why nothing comes."""
    weight_shapes: dict[str, tuple[int, ...]]
    """Of every parameter, by its name in checkpoints."""
    _scheduler: Scheduler
    _memory: Memory
    _dtype: torch.dtype | None  # None: that of the weights
    _paused = _suspended = False

    def _call(self, command: Callable[[], T]) -> T:
        """Run a command between two steps and wait for its value."""
        raise NotImplementedError

    def _post_control(self, command: Callable[[], None]) -> None:
        """Put a command behind everything that was submitted before it, by any loop."""
        raise NotImplementedError

    def abort(self, rid: str | None = None, *, abort_all: bool = False) -> None:
        """End one request (with the `<rid>_<i>` of a batch) or all: they return what they have, finished by `abort`."""
        if not abort_all and not rid:
            raise BadRequestError("abort_request: give 'rid', or 'abort_all': true.")

        def matches(running: Running) -> bool:
            own = running.request.rid
            return abort_all or own == rid or own.startswith(f"{rid}_")

        self._post_control(lambda: self._scheduler.abort(matches, "Aborted"))

    def flush_cache(self) -> bool:
        """Forget shared prefixes. False, with nothing done, while requests run."""
        return self._call(self._scheduler.flush)

    def pause(self, mode: str = "abort") -> None:
        """Stop generating: `abort` ends requests, `retract` computes their caches anew later, `in_place` keeps them.

        Requests that arrive while the engine is paused wait for `resume`.
        """
        if mode not in PAUSE_MODES:
            raise BadRequestError(f"pause_generation: mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}.")

        def pause() -> None:
            self._paused = True
            if mode == "abort":
                self._scheduler.abort(lambda _: True, "Aborted by pause_generation")
            elif mode == "retract":
                self._scheduler.retract()

        self._call(pause)

    def resume(self) -> None:
        """Go on after `pause`."""

        def resume() -> None:
            self._paused = False

        self._call(resume)

    @property
    def paused(self) -> bool:
        return self._paused or self._suspended

    def suspend(self) -> None:
        """No step until `update_weights`: whoever owns the tensors is about to change them in place.

        Running requests keep their caches and go on under the new weights.
        """

        def suspend() -> None:
            self._suspended = True

        self._call(suspend)

    @property
    def weight_version(self) -> str:
        return self._scheduler.weight_version

    @property
    def max_running_requests(self) -> int:
        return self._scheduler.max_running_requests

    @property
    def max_total_tokens(self) -> int:
        return self._scheduler.max_total_tokens

    def update_weights(self, tensors: Mapping[str, Tensor], version: str, *, copy: bool = False) -> None:
        """Generate from these tensors (Hugging Face names) from the next step on.

        The tensors are referred to, not copied: a trainer that changes them in place must call this again after each
        change, and must `suspend` the engine before it, unless it passes `copy=True`. CheckpointError for names or
        shapes that do not fit; the old weights then stay.
        """
        taken = {name: tensor.detach().clone() for name, tensor in tensors.items()} if copy else tensors
        self._replace(lambda: taken, version, again=not copy)

    def update_weights_from_disk(self, model_dir: str | Path, version: str | None = None) -> None:
        """Load the safetensors of a folder of the same architecture; `version` None keeps the version's name."""
        read = self._folder(model_dir)
        tensors = read()  # here: the engine goes on meanwhile
        self._replace(lambda: tensors, version, source=read)

    def update_weights_from(self, read: Source, version: str | None = None) -> None:
        """The same for tensors that `read` gives, now and after they were released. It runs in the engine's thread."""
        self._replace(read, version, source=read)

    def update_some_weights(self, tensors: Mapping[str, Tensor], version: str | None = None) -> None:
        """The same for a part of the weights, all at once between two steps; the others stay as they are.

        The tensors are taken over, in the dtype and on the device of the engine's. CheckpointError for shapes that do
        not fit, and for parameters that nobody has sent since the weights were released.
        """

        def merged() -> dict[str, Tensor]:
            new = flat_names(self.model, tensors)
            return self.model.named | {name: t.to(self.model.device, self.model.dtype) for name, t in new.items()}

        self._replace(merged, version)

    def _replace(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        version: str | None,
        *,
        source: Source | None = None,
        again: bool = False,
    ) -> None:
        """`again`: the tensors can be had a second time, because they belong to somebody else."""

        def update() -> None:
            self._memory.check_takes_weights()
            new = tensors()
            name = self.weight_version if version is None else version
            self._scheduler.set_weights(lambda: self.model.load(cast(new, self._dtype)), name)
            self._memory.weights_taken((lambda: new) if again else source)
            self._suspended = False

        self._call(update)

    def rename_weights(self, version: str) -> None:
        """The weights in use have this version from now on."""
        self._call(lambda: self._scheduler.set_weights(lambda: None, version))

    def release_memory(self, tags: Iterable[str] | None = None) -> None:
        """Give memory back (`memory.MEMORY_TAGS`; None: all). BadRequestError while requests run."""
        self._call(lambda: self._memory.release(tags))

    def resume_memory(self, tags: Iterable[str] | None = None) -> None:
        """Take it again. Weights that came over the network are missing until the next update."""
        self._call(lambda: self._memory.resume(tags))

    @property
    def released(self) -> frozenset[str]:
        """What has been given back."""
        return frozenset(self._memory.released)

    @property
    def weights_missing(self) -> bool:
        return self._memory.weights_missing

    def _folder(self, model_dir: str | Path) -> Source:
        dtype, device = self._dtype or self.model.dtype, str(self.model.device)
        return lambda: load_tensors(model_dir, dtype=dtype, device=device)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    if dtype is None or all(tensor.dtype == dtype for tensor in tensors.values()):
        return tensors
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
