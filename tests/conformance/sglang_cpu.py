"""Starts a real SGLang server on a machine without a GPU: `python sglang_cpu.py --model-path DIR --port P ...`.

Runs in the environment of `make conformance`, which has SGLang and no miles. Three things stand in SGLang's way there,
and this file removes them at import, because the processes that SGLang spawns import the main file anew:

    torchvision's compiled operators do not load beside a CPU build of PyTorch    the two that are looked up are declared
    there is no CPU build of its kernel package                                   an empty one, whose functions raise
    recorded experts lie in memory that is registered with the CUDA driver        registering does nothing

Everything else is SGLang as published. What it needs to be told about a CPU stands in `CPU_FLAGS`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph", "--disable-overlap-schedule"),
    *("--max-total-tokens", "131072", "--max-running-requests", "128"),
)

KERNELS = "sgl_kernel"


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


class _KernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != KERNELS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"


def _declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_operators"] = library  # they live as long as it does


def _skip_registration_of_host_memory() -> None:
    from sglang.srt.mem_cache.pool_host import common

    common._cuda_host_register = lambda *_, **__: None


sys.meta_path.insert(0, _KernelFinder())
_declare_torchvision_operators()
_skip_registration_of_host_memory()


def main() -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*CPU_FLAGS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
