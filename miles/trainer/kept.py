"""The samples of an optimizer step that failed, as a file that `--load-debug-rollout-data` trains on again.

The file also holds the step's train batch under the key `rollout_data`, in the form of `--save-debug-train-data`: with
the advantages and log-probs that the loss has read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from miles.batch import TrainBatch
from miles.observe import debug_data
from miles.types import Sample


def keep_step(path: Path, rollout_id: int, rank: int, batch: TrainBatch) -> None:
    """Write the rows of `batch`."""
    data = {
        "rollout_id": rollout_id,
        "rank": rank,
        "samples": [sample_of(batch, row).to_dict() for row in range(len(batch))],
        "rollout_data": dict(batch.as_dict(tensors=True)),
    }
    if debug_data.unreadable(data) is not None:  # columns of a plug-in's own making
        del data["rollout_data"]
        data["samples"] = [sample_of(batch, row, plain=True).to_dict() for row in range(len(batch))]
    debug_data.write_torch(path, data, flag="--run-dir")


def sample_of(batch: TrainBatch, row: int, *, plain: bool = False) -> Sample:
    """A row as the sample it came from, without its texts. `plain` leaves out what a plug-in put there."""
    tokens = slice(*batch.token_offsets[row : row + 2].tolist())
    places = slice(*batch.response_offsets[row : row + 2].tolist())

    def of(column: Any) -> Any:
        return None if column is None else column[row]

    raw, index = of(batch.raw_reward), of(batch.sample_indices)
    rollout_log_probs = batch.rollout_log_probs
    truncated = batch.truncated is not None and bool(batch.truncated[row])
    sample = Sample(
        index=index,
        group_index=of(batch.group_index),
        tokens=batch.tokens[tokens].tolist(),
        response_length=int(batch.response_lengths[row]),
        loss_mask=batch.loss_masks[places].tolist(),
        reward=number_or_none(raw) if plain else raw,
        rollout_log_probs=None if rollout_log_probs is None else rollout_log_probs[places].tolist(),
        status=Sample.Status.TRUNCATED if truncated else Sample.Status.COMPLETED,
        remove_sample=bool(batch.failed[row]),
    )
    teacher = of(batch.teacher_log_probs)
    if teacher is not None and not plain:
        sample.teacher_log_probs = teacher
    return sample


def number_or_none(value: Any) -> float | None:
    is_number = isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return float(value) if is_number else None


def listed(names: list[str], most: int = 4) -> str:
    """Example: `sample 3, sample 4 and 2 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
