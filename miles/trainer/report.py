"""The trainer's view of a rollout in numbers: the mean of every column of a train batch, under published names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.batch import TrainBatch
from miles.errors import UsageError
from miles.observe.jsonable import as_number
from miles.trainer.advantages import teacher_column

COUNT = ":count"


def means_of(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Column name -> mean over the samples of all ranks, from the `column_sums` of each.

    Example: `{"response_lengths": 30.2, "total_lengths": 38.2, "rewards": 0.0, "raw_reward": 0.27, "log_probs": -0.3}`
    """
    totals: dict[str, float] = {}
    for sums in ranks:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    names = [name.removesuffix(COUNT) for name in totals if name.endswith(COUNT)]
    return {name: totals[name] / totals[name + COUNT] for name in names}


def column_sums(batch: TrainBatch) -> dict[str, float]:
    """What `means_of` adds up: per column the sum, and under `<name>:count` over how many samples; of token columns the
    mean over each sample's trained tokens first.

    Failed rows and tokens that were never computed (NaN) take no part. Columns without numbers are left out.

    Example: `{"raw_reward": 34.0, "raw_reward:count": 128.0, ...}`
    """
    valid = ~batch.failed
    columns: dict[str, Any] = {
        "response_lengths": batch.response_lengths,
        "total_lengths": batch.total_lengths,
        "rewards": batch.rewards,
        "raw_reward": batch.raw_reward,
        "truncated": batch.truncated,
        "round_number": batch.round_number,
    }
    sums: dict[str, float] = {}
    for name, column in columns.items():
        numbers = _numbers(column, valid)
        if numbers is not None and len(numbers):
            sums |= {name: float(numbers.sum()), name + COUNT: float(len(numbers))}
    columns_over_tokens = batch.flat_columns()
    if batch.teacher_log_probs is not None:
        with contextlib.suppress(UsageError):  # of no form that could be trained on, which only some estimators ask for
            columns_over_tokens["teacher_log_probs"] = teacher_column(batch)
    for name, flat in columns_over_tokens.items():
        total, count = _token_means(flat.float(), batch)
        if count:
            sums |= {name: total, name + COUNT: float(count)}
    return sums


def _numbers(column: Any, valid: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, Any] | None:
    """The valid rows of a column of numbers; None for anything else (dict rewards, tensors)."""
    if column is None:
        return None
    kept = [as_number(value) for value, ok in zip(column, valid) if ok]
    if None in kept:
        return None
    return np.asarray(kept, dtype=np.float64)


def _token_means(flat: Tensor, batch: TrainBatch) -> tuple[float, int]:
    """The sum over samples of the mean over the sample's trained tokens, and how many samples have one."""
    mask = torch.from_numpy(batch.loss_masks) != 0
    known = mask & ~flat.isnan()
    lengths = torch.from_numpy(batch.response_lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    counts = torch.zeros(len(lengths)).index_add(0, ids, known.float())
    sums = torch.zeros(len(lengths)).index_add(0, ids, torch.where(known, flat, 0.0))
    counted = counts > 0
    return float((sums[counted] / counts[counted]).sum()), int(counted.sum())
