"""Checks that every column of a batch fits its rows; each error names the column, the row, both lengths.

Used where columns come from outside: samples (`convert`), a custom conversion (`convert`), writes to the view (`view`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from miles.batch.ragged import FloatArray, IntArray, Scalar, flatten_rows, offsets_of, shown
from miles.errors import UsageError

NameOf = Callable[[int], str]
"""How messages call row i: see `TrainBatch.name_of`."""


def one_per_row(key: str, value: Any, num_rows: int) -> list[Any]:
    """`value` as a list with one entry per row."""
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__len__"):
        raise UsageError(f"{key}: expected a list with one entry per sample ({num_rows}), got {shown(value)}.")
    if len(value) != num_rows:
        raise UsageError(f"{key}: expected one entry per sample ({num_rows}), got {len(value)}.")
    return value if isinstance(value, list) else list(value)


def response_column(
    key: str, rows: Sequence[Any], dtype: type[Scalar], response_lengths: IntArray, name_of: NameOf
) -> npt.NDArray[Scalar]:
    """One flat column from rows that hold one number per response token."""
    flat, lengths = flatten_rows(key, rows, dtype)
    for i in np.flatnonzero(lengths != response_lengths)[:1].tolist():
        raise UsageError(
            f"{key} length of {name_of(i)} is {lengths[i]}, its response_length is {response_lengths[i]}. "
            f"Expected one entry per response token."
        )
    return flat


def response_tensor(key: str, rows: Sequence[Any], response_lengths: IntArray, name_of: NameOf) -> torch.Tensor:
    """As `response_column`, for rows that are tensors (their device and dtype stay) or lists of floats."""
    if not rows or not all(isinstance(row, torch.Tensor) for row in rows):
        return torch.from_numpy(response_column(key, rows, np.float32, response_lengths, name_of))
    for i, (row, length) in enumerate(zip(rows, response_lengths.tolist())):
        if tuple(row.shape) != (length,):
            raise UsageError(
                f"{key} of {name_of(i)} has shape {tuple(row.shape)}, its response_length is {length}. "
                "Expected one entry per response token."
            )
    return torch.cat(list(rows))


def whole_numbers(key: str, value: Any, num_rows: int, name_of: NameOf) -> IntArray:
    """int64 [N] from anything that holds one whole number per row; booleans count as 0 and 1."""
    entries = one_per_row(key, value, num_rows)
    for i, entry in enumerate(entries):
        try:
            if int(entry) == entry:
                continue
        except (TypeError, ValueError, OverflowError):
            pass
        raise UsageError(f"{key} of {name_of(i)}: expected a whole number, got {shown(entry)}.")
    return np.array([int(entry) for entry in entries], dtype=np.int64)


def numbers_or_list(key: str, value: Any, num_rows: int) -> FloatArray | list[Any]:
    """float32 [N] where every entry is one number, else the list as it is (a plug-in's tensors or dicts)."""
    entries = one_per_row(key, value, num_rows)
    try:
        return np.array([float(entry) for entry in entries], dtype=np.float32)
    except (TypeError, ValueError, RuntimeError):
        return entries


def check_lengths(total_lengths: IntArray, response_lengths: IntArray, name_of: NameOf) -> None:
    """A response is a non-negative number of tokens at the end, and at least one token stands before it."""
    bad = (response_lengths < 0) | ((response_lengths >= total_lengths) & (response_lengths > 0))
    for i in np.flatnonzero(bad)[:1].tolist():
        raise UsageError(
            f"response_length of {name_of(i)} is {response_lengths[i]}, but it has {total_lengths[i]} tokens. Expected "
            "at least one token before the response: the first response token is predicted from it."
        )


def check_finite(
    key: str, values: FloatArray, loss_masks: npt.NDArray[np.int32], response_lengths: IntArray, name_of: NameOf
) -> None:
    """NaN and infinity are tolerated only where the mask is 0, and become 0 there."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    trained = np.flatnonzero(bad & (loss_masks != 0))
    if len(trained):
        place = int(trained[0])
        offsets = offsets_of(response_lengths)
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        raise UsageError(
            f"{key} of {name_of(row)} is {values[place]} at response token {place - offsets[row]}. "
            "Expected a finite number wherever the loss mask is 1."
        )
    values[bad] = 0.0
