"""Published import path of `--save-debug-train-data`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from miles.observe import debug_data

__all__ = ["save_debug_train_data"]


def save_debug_train_data(args: Namespace, *, rollout_id: int, rollout_data: Mapping[str, Any]) -> None:
    """Write `rollout_data` to the template `args.save_debug_train_data`; nothing where that is not set."""
    template = args.save_debug_train_data
    if template is None:
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    data = {"rollout_id": rollout_id, "rank": rank, "rollout_data": dict(rollout_data)}
    debug_data.write_torch(
        Path(template.format(rollout_id=rollout_id, rank=rank)), data, flag="--save-debug-train-data"
    )
