"""The processor outputs of several samples as one set of tensors: what a multimodal model takes for a micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles.batch.ragged import shown
from miles.errors import UsageError


def joined_media(
    rows: Sequence[dict[str, Any] | None], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(tensors, items): every key of the rows' `multimodal_train_inputs` joined along the first axis, and how many
    entries each row brought (0 for a row without the key).

    Example: `[{"pixel_values": [2, 8]}, None, {"pixel_values": [1, 8]}]` (shapes) gives `{"pixel_values": [3, 8]}` and
    `{"pixel_values": [2, 0, 1]}`. UsageError for what is no tensor, and for shapes that do not go together.
    """
    keys = dict.fromkeys(key for row in rows if row is not None for key in row)
    tensors: dict[str, Tensor] = {}
    items: dict[str, list[int]] = {}
    for key in keys:
        parts = [None if row is None or row.get(key) is None else as_tensor(key, row[key]) for row in rows]
        present = [part.to(device) for part in parts if part is not None]
        shapes = {tuple(part.shape[1:]) for part in present}
        if len(shapes) > 1 or any(part.dim() == 0 for part in present):
            raise UsageError(
                f"multimodal_train_inputs[{key!r}]: the samples' shapes {[tuple(p.shape) for p in present]} cannot be "
                "joined along their first axis. Expected one entry per image or patch, of equal shape."
            )
        if present:
            tensors[key] = torch.cat(present)
            items[key] = [0 if part is None else part.shape[0] for part in parts]
    return tensors, items


def as_tensor(key: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"multimodal_train_inputs[{key!r}]: expected a tensor or an array, got {shown(value)}."
        ) from None
