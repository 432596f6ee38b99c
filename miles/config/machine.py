"""What this machine has, found out without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def local_gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs this process may use.

    Counts the device files (`dev/nvidia0`, ...) or, where a container hides them, the driver's own list;
    `CUDA_VISIBLE_DEVICES` narrows that down. `root` is the file system to look at.
    """
    devices = [p for p in (root / "dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()]
    listed = list((root / "proc/driver/nvidia/gpus").glob("*"))
    present = len(devices) or len(listed)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    chosen = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return min(present, len(chosen))
