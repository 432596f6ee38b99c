"""What a training process does to its own process before the heavy work: allocator and collector."""

from __future__ import annotations

import ctypes
import gc

# mallopt(3): sizes from which glibc maps fresh pages for each block, and free memory from which it returns pages.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BELOW_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: a training step frees and takes the same buffers again and again.

    By default each tensor above 128 KiB is a fresh mapping whose pages the kernel must clear on first touch, which
    costs a small model a tenth of its step. Does nothing where the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, KEEP_BELOW_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BELOW_BYTES)


def forget_imports() -> None:
    """Exempt everything that exists from garbage collection: what imports left is never garbage.

    Without it every full collection walks through a few hundred thousand such objects: a tenth of a second each.
    """
    gc.freeze()
