"""Megatron-Core on a machine without a GPU: the places where it asks for CUDA without need, answered with the CPU.

`install()` must run before anything of `megatron` is imported, and does nothing where CUDA is available. Each patch is
a row of `PATCHES`, and each has a test that fails without it. Every replacement is a function object of its own:
torch._dynamo takes two names of one function for a mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """`owner.name` becomes `make(what it was)`."""

    owner: Any
    name: str
    make: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"


def _returns(make: Callable[[], Any]) -> Callable[[Any], Any]:
    """A function that takes anything and gives `make()`; a new one for each name."""

    def replace(_: Any) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return make()

        return replacement

    return replace


def _on_cpu(factory: Any) -> Any:
    """A tensor factory that makes on the CPU what was asked for on a GPU, and pins nothing."""

    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _stays(_: Any) -> Any:
    """`tensor.cuda(...)` is the tensor."""

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    return cuda


def _cuda_names(original: Any) -> Any:
    """`tensor.type()` says `torch.cuda.FloatTensor`: the optimizer sorts parameters by such names."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        name: str = original(self)
        return name if ".cuda." in name else name.replace("torch.", "torch.cuda.", 1)

    return type_


@contextlib.contextmanager
def _no_stream() -> Iterator[None]:
    yield


class Stream:
    """There is one order of things on a CPU: nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event

    def synchronize(self) -> None:
        pass


class Event:
    """The counterpart of `Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _rng_state(_: Any) -> Any:
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    return get_rng_state


def _set_rng_state(_: Any) -> Any:
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    return set_rng_state


def _seed(_: Any) -> Any:
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    return manual_seed


PATCHES: tuple[Patch, ...] = (
    Patch(torch.cuda, "current_device", _returns(lambda: CPU)),
    Patch(torch.cuda, "synchronize", _returns(lambda: None)),
    Patch(torch.cuda, "current_stream", _returns(Stream)),
    Patch(torch.cuda, "default_stream", _returns(Stream)),
    Patch(torch.cuda, "stream", _returns(_no_stream)),
    Patch(torch.cuda, "Stream", lambda _: Stream),
    Patch(torch.cuda, "Event", lambda _: Event),
    Patch(torch.cuda, "get_rng_state", _rng_state),
    Patch(torch.cuda, "set_rng_state", _set_rng_state),
    Patch(torch.cuda, "manual_seed", _seed),
    Patch(torch.cuda, "default_generators", lambda _: (torch.default_generator,)),
    Patch(torch, "tensor", _on_cpu),
    Patch(torch, "zeros", _on_cpu),
    Patch(torch, "empty", _on_cpu),
    Patch(torch.Tensor, "cuda", _stays),
    Patch(torch.Tensor, "type", _cuda_names),
)


def install(patches: tuple[Patch, ...] = PATCHES) -> None:
    """Apply what is not applied yet. Nothing happens where CUDA is available."""
    if torch.cuda.is_available():
        return
    _device_constructors()  # remembers the factories as they are now: `with torch.device("meta")` goes on to work
    for patch in patches:
        if patch not in _installed:
            setattr(patch.owner, patch.name, patch.make(getattr(patch.owner, patch.name)))
            _installed.add(patch)


_installed: set[Patch] = set()
