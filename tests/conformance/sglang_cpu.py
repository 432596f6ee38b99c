"""Lets real SGLang run on a machine without a GPU; imported by every Python of the environment of `make conformance`.

`make conformance` names this file in a `.pth` file of that environment, so that `python -m sglang.launch_server` and
the processes that it spawns find it. Three things stand in SGLang's way on a CPU; each is removed when it is first
imported:

    torchvision's compiled operators do not load beside a CPU build of PyTorch    those two that are needed are declared
    there is no CPU build of its kernel package                                   an empty one, whose functions raise
    recorded experts lie in memory that is registered with the CUDA driver        registering does nothing

Everything else is SGLang as published. What it must be told about a CPU, miles tells it (`miles/engine/sglang.py`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

KERNELS = "sgl_kernel"
HOST_MEMORY = "sglang.srt.mem_cache.pool_host.common"


class _Kernel:
    """A name of the kernel package, or of something in it: it may be looked up, compared and passed, but not called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self.name}.{name}")

    def __call__(self, *_: object, **__: object) -> None:
        raise NotImplementedError(f"{self.name}: there are no kernels on a machine without a GPU.")


class _Kernels(types.ModuleType):
    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self.__name__}.{name}")


class _KernelLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"


class _HostMemoryLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        module._cuda_host_register = lambda *_, **__: None


class _Finder(importlib.abc.MetaPathFinder):
    """Looks at the names that are imported; all but two are left to the other finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] == KERNELS:
            return importlib.machinery.ModuleSpec(name, _KernelLoader(), is_package=True)
        if name == "torchvision":
            _declare_torchvision_operators()
        if name == HOST_MEMORY:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and spec.origin is not None:
                spec.loader = _HostMemoryLoader(name, spec.origin)
            return spec
        return None


def _declare_torchvision_operators() -> None:
    if "_operators" in globals():
        return  # it is looked up more than once
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_operators"] = library  # they live as long as it does


sys.meta_path.insert(0, _Finder())
