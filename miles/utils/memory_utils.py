"""Published import path of memory helpers: on a GPU its memory, without one the machine's."""

from __future__ import annotations

import gc
import logging
from typing import Any

import psutil
import torch

__all__ = ["available_memory", "clear_memory", "print_memory"]

logger = logging.getLogger(__name__)
GIB = 1 << 30


def clear_memory(clear_host_memory: bool = False) -> None:
    """Collect garbage and give cached GPU memory back; `clear_host_memory` also the pinned host memory's cache."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if clear_host_memory:
        torch._C._host_emptyCache()


def available_memory() -> dict[str, Any]:
    """GiB of the current device, as strings would be logged.

    Example: `{"gpu": "cpu", "total_GB": 31.3, "free_GB": 20.1, "used_GB": 11.2, "allocated_GB": 0.0,
    "reserved_GB": 0.0}`
    """
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(device)
        name, allocated, reserved = str(device), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    else:
        memory = psutil.virtual_memory()
        name, free, total, allocated, reserved = "cpu", memory.available, memory.total, 0, 0
    return {
        "gpu": name,
        "total_GB": round(total / GIB, 2),
        "free_GB": round(free / GIB, 2),
        "used_GB": round((total - free) / GIB, 2),
        "allocated_GB": round(allocated / GIB, 2),
        "reserved_GB": round(reserved / GIB, 2),
    }


def print_memory(msg: str, clear_before_print: bool = False) -> dict[str, Any]:
    """Log `available_memory()` under `msg`, and return it."""
    if clear_before_print:
        clear_memory()
    memory = available_memory()
    logger.info("memory %s: %s", msg, memory)
    return memory
