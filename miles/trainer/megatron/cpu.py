"""Megatron-Core on a machine without a GPU: the places where it asks for CUDA without need, answered with the CPU.

`install()` runs before anything of `megatron` is imported (`miles.trainer.megatron` begins with it), and does nothing
where CUDA is available. Each patch is a row of a table, and each has a test that fails without it. Every replacement is
a function object of its own: torch._dynamo takes two names of one function for a mistake.

One gap has to do with TransformerEngine and not with the device (`GAPS`), and is filled wherever that is not there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


class Event:
    """Has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Stream:
    """There is one order of things on a CPU: nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return Event() if event is None else event

    def synchronize(self) -> None:
        pass


def _rng_state(_: Any) -> Any:
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    return get_rng_state


def _seed(_: Any) -> Any:
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    return manual_seed


PATCHES: tuple[Patch, ...] = (
    Patch(torch.cuda, "current_device", _returns(lambda: CPU)),
    Patch(torch.cuda, "synchronize", _returns(lambda: None)),
    Patch(torch.cuda, "current_stream", _returns(Stream)),
    Patch(torch.cuda, "Stream", lambda _: Stream),
    Patch(torch.cuda, "get_rng_state", _rng_state),
    Patch(torch.cuda.random, "get_rng_state", _rng_state),
    Patch(torch.cuda, "manual_seed", _seed),
    Patch(torch, "tensor", _on_cpu),
    Patch(torch, "zeros", _on_cpu),
    Patch(torch.Tensor, "cuda", _stays),
    Patch(torch.Tensor, "type", _cuda_names),
)


def _lists(original: Any) -> Any:
    """Sizes for collectives as numbers, also where the tensor is in main memory already."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _set_state(_: Any) -> Any:
    """Megatron would put the state off until CUDA has been initialized, and keep it for that."""

    def _set_cuda_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return _set_cuda_rng_state


IN_MEGATRON: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _lists),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_state),
)
"""The same for functions of Megatron's: module, name, what to make of it."""

GAPS: tuple[tuple[str, str], ...] = (("megatron.core.transformer.moe.moe_utils", "te_general_gemm"),)
"""Names that Megatron asks for being None, and defines only beside TransformerEngine."""


def install() -> None:
    """Apply what is not applied yet."""
    if not torch.cuda.is_available():
        _device_constructors()  # remembers the factories as they are: `with torch.device("meta")` goes on to work
        for patch in PATCHES:
            _apply(patch)
        for module, name, make in IN_MEGATRON:
            _apply(Patch(importlib.import_module(module), name, make))
    for module, name in GAPS:
        owner = importlib.import_module(module)
        if not hasattr(owner, name):
            setattr(owner, name, None)


def _apply(patch: Patch) -> None:
    if patch not in _replaced:
        _replaced[patch] = getattr(patch.owner, patch.name)
        setattr(patch.owner, patch.name, patch.make(_replaced[patch]))


_replaced: dict[Patch, Any] = {}
