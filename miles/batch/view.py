"""The published dict of lists over a `TrainBatch`: what conversions return and what hooks of the trainer receive.

Reads build one list per column; writes go to the batch at once. A list that was read may also be changed in place:
`write_back()` stores those changes, and whoever handed the view to a plug-in calls it when the plug-in returns. Make
one view per plug-in call: it does not see what others do to the batch meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
import torch

from miles.batch.columns import numbers_or_list, one_per_row, response_column, response_tensor, whole_numbers
from miles.batch.ragged import IntArray, flatten_rows
from miles.batch.types import ROW_COLUMNS, TrainBatch
from miles.errors import UsageError

# Columns over response tokens that the trainer computes, as the published trainer calls them.
RESPONSE_COLUMNS = ("log_probs", "ref_log_probs", "values", "advantages", "returns", "entropy")

# The published order of a conversion's result.
ORDER = (
    "tokens",
    "response_lengths",
    "rewards",
    "raw_reward",
    "truncated",
    "sample_indices",
    "loss_masks",
    "round_number",
    "rollout_log_probs",
    "rollout_routed_experts",
    "metadata",
    "multimodal_train_inputs",
    "teacher_log_probs",
    "group_index",
)
ALWAYS_THERE = ("tokens", "response_lengths", "loss_masks", "total_lengths")


class PublishedView(MutableMapping[str, Any]):
    """A dict of lists, one entry per sample, over the columns of `batch`.

    Example: `view["rewards"] -> [0.7, -0.7]`; `view["rewards"] = [1, 0]` sets `batch.rewards`; a new key becomes an
    extra column; `del view["metadata"]` removes an optional one.
    """

    def __init__(self, batch: TrainBatch, *, tensors: bool) -> None:
        self.batch = batch
        self.tensors = tensors
        self._handed_out: dict[str, Any] = {}

    # ---- reading -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        batch = self.batch
        yield from (name for name in ORDER if getattr(batch, name) is not None)
        yield "total_lengths"
        yield from batch.response_columns
        yield from batch.extras
        yield from batch.shared

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return any(key == name for name in self)

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        if key not in self._handed_out:
            self._handed_out[key] = self._read(key)
        return self._handed_out[key]

    def __repr__(self) -> str:
        return f"PublishedView({len(self.batch)} samples: {', '.join(self)})"

    def _read(self, key: str) -> Any:
        batch = self.batch
        if key == "tokens":
            return self._rows(torch.from_numpy(batch.tokens), batch.total_lengths)
        if key == "loss_masks":
            return self._rows(torch.from_numpy(batch.loss_masks), batch.response_lengths)
        if key == "rollout_log_probs":
            assert batch.rollout_log_probs is not None
            return self._rows(torch.from_numpy(batch.rollout_log_probs), batch.response_lengths)
        if key in batch.response_columns:
            return self._rows(batch.response_columns[key], batch.response_lengths)
        if key in batch.extras:
            return batch.extras[key]
        if key in batch.shared:
            return batch.shared[key]
        value = getattr(batch, key)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def _rows(self, flat: torch.Tensor, lengths: IntArray) -> list[Any]:
        rows = torch.split(flat, lengths.tolist())
        return list(rows) if self.tensors else [row.tolist() for row in rows]

    # ---- writing -------------------------------------------------------------------------------------------------

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(key, value)
        self._handed_out[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        if key in ALWAYS_THERE:
            raise UsageError(f"{key}: a batch cannot do without this column.")
        self._handed_out.pop(key, None)
        for columns in (self.batch.response_columns, self.batch.extras, self.batch.shared):
            if key in columns:
                del columns[key]
                return
        setattr(self.batch, key, None)

    def write_back(self) -> None:
        """Store in-place changes of every list that was read."""
        for key, value in self._handed_out.items():
            self._write(key, value)

    def _write(self, key: str, value: Any) -> None:
        batch, n = self.batch, len(self.batch)
        if key == "tokens":
            flat, lengths = flatten_rows(key, one_per_row(key, value, n), np.int64)
            self._same_lengths(key, lengths, batch.total_lengths)
            batch.tokens = flat
        elif key in ("response_lengths", "total_lengths"):
            self._same_lengths(key, whole_numbers(key, value, n, batch.name_of), getattr(batch, key))
        elif key == "loss_masks":
            rows = one_per_row(key, value, n)
            batch.loss_masks = response_column(key, rows, np.int32, batch.response_lengths, batch.name_of)
        elif key == "rollout_log_probs":
            rows = one_per_row(key, value, n)
            batch.rollout_log_probs = response_column(key, rows, np.float32, batch.response_lengths, batch.name_of)
        elif key == "rewards":
            batch.rewards = numbers_or_list(key, value, n)
        elif key == "truncated":
            batch.truncated = whole_numbers(key, value, n, batch.name_of)
        elif key in ROW_COLUMNS:
            setattr(batch, key, one_per_row(key, value, n))
        elif key in RESPONSE_COLUMNS or key in batch.response_columns:
            rows = one_per_row(key, value, n)
            batch.response_columns[key] = response_tensor(key, rows, batch.response_lengths, batch.name_of)
        else:
            batch.extras.pop(key, None)
            batch.shared.pop(key, None)
            if isinstance(value, list) and len(value) == n:
                batch.extras[key] = value
            else:
                batch.shared[key] = value

    def _same_lengths(self, key: str, given: IntArray, lengths: IntArray) -> None:
        for i in np.flatnonzero(given != lengths)[:1].tolist():
            raise UsageError(
                f"{key} of {self.batch.name_of(i)}: length {given[i]} where the batch has {lengths[i]}. Lengths are "
                "fixed once a batch is made; mask tokens out with loss_masks instead."
            )
