"""Rows of different lengths as one flat array with offsets: build, gather, put back in order.

A ragged column of n rows is `values` [T] and `offsets` int64 [n + 1]; row i is `values[offsets[i]:offsets[i + 1]]`.

Example: rows [5, 6], [], [7] are values = [5, 6, 7] and offsets = [0, 2, 2, 3].

What the columns mean is `miles.batch.types`; which rows go where is `split`, `micro` and `pack`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from miles.errors import UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)

def offsets_of(lengths: npt.ArrayLike) -> IntArray:
    """Cumulative lengths with a leading 0: int64 [n] -> int64 [n + 1]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def places_of(offsets: IntArray, rows: IntArray) -> IntArray:
    """Flat places of the given rows, row after row: int64 [sum of their lengths]."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    shift = starts - offsets_of(lengths)[:-1]
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(shift, lengths)


def gathered(values: npt.NDArray[Scalar], offsets: IntArray, rows: IntArray) -> npt.NDArray[Scalar]:
    """`values[places_of(offsets, rows)]`, as one copy per row instead of one per value."""
    return sliced(values, offsets[rows], offsets[rows + 1])


def sliced(values: npt.NDArray[Scalar], begins: IntArray, ends: IntArray) -> npt.NDArray[Scalar]:
    """`values[begins[0]:ends[0]]`, `values[begins[1]:ends[1]]`, ... one after another."""
    if len(begins) == 0:
        return values[:0]
    return np.concatenate([values[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())])


def flatten_rows(key: str, rows: Sequence[Any], dtype: type[Scalar]) -> tuple[npt.NDArray[Scalar], IntArray]:
    """One flat array and the length of each row. Rows are lists, tuples, numpy arrays or tensors of one dimension.

    UsageError names `key` and the first row that is no such thing. Whole numbers are expected where dtype is one.
    """
    try:
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    except TypeError:
        raise UsageError(f"{key}: {first_bad_row(rows, dtype)}") from None
    if all(type(row) is list for row in rows):
        with suppress(TypeError, ValueError, OverflowError, struct.error):
            return READERS[dtype](rows, lengths), lengths  # anything unusual is looked at row by row below
    with suppress(TypeError, ValueError, OverflowError):
        arrays = [one_dimensional(row) for row in rows]
        return exactly(np.concatenate(arrays), dtype), lengths
    raise UsageError(f"{key}: {first_bad_row(rows, dtype)}")


def read_ids(rows: Sequence[list[Any]], lengths: IntArray) -> IntArray:
    """Lists of numbers >= 0. The unsigned type of `array` is read at twice the speed of the signed one."""
    flat = array("Q")
    for row in rows:
        flat.fromlist(row)
    values = np.frombuffer(flat, dtype=np.int64)
    if values.min(initial=0) < 0:
        raise OverflowError
    return values


def read_bytes(rows: Sequence[list[Any]], lengths: IntArray) -> npt.NDArray[np.int32]:
    """Lists of numbers from 0 to 255: masks."""
    return np.frombuffer(b"".join(map(bytes, rows)), dtype=np.uint8).astype(np.int32)


def read_floats(rows: Sequence[list[Any]], lengths: IntArray) -> FloatArray:
    values = np.empty(int(lengths.sum()), dtype=np.float32)
    target, place = values.data.cast("B"), 0
    for row in rows:
        struct.pack_into(f"{len(row)}f", target, place, *row)
        place += len(row) * values.itemsize
    return values


READERS: dict[type[Any], Callable[[Sequence[list[Any]], IntArray], npt.NDArray[Any]]] = {
    np.int64: read_ids,
    np.int32: read_bytes,
    np.float32: read_floats,
}
"""The fastest way from lists of Python numbers that the standard library has, by dtype. Each raises for what is odd."""


def one_dimensional(row: Any) -> npt.NDArray[Any]:
    """One row as an array of numbers; ValueError or TypeError where it is no such thing."""
    if not isinstance(row, list | tuple | np.ndarray | torch.Tensor):
        raise TypeError
    values = row.detach().cpu().numpy() if isinstance(row, torch.Tensor) else np.asarray(row)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "biuf"):
        raise ValueError
    return values if values.size else np.empty(0, dtype=np.int64)


def exactly(values: npt.NDArray[Any], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """`values` as `dtype`; ValueError where whole numbers are wanted and one is not."""
    result = values.astype(dtype, copy=False)
    if issubclass(dtype, np.integer) and not bool(np.array_equal(result, values)):
        raise ValueError
    return result


def first_bad_row(rows: Sequence[Any], dtype: type[Scalar]) -> str:
    kind = "whole numbers" if issubclass(dtype, np.integer) else "numbers"
    for i, row in enumerate(rows):
        try:
            exactly(one_dimensional(row), dtype)
        except (TypeError, ValueError, OverflowError):
            return f"row {i} must be a list of {kind}, got {shown(row)}."
    return f"expected one list of {kind} per row."


def shown(value: Any) -> str:
    """A value in an error message: short, with its type."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def put_back(pieces: Sequence[torch.Tensor], rows: Sequence[IntArray], lengths: IntArray) -> torch.Tensor:
    """Flat results of micro batches, in the order of the batch.

    `pieces[k]` holds the rows `rows[k]`, one after another, `lengths[row]` values each; every row of the batch appears
    exactly once. Returns [sum of lengths], row 0 first. This is how results of passes that sort rows by length come
    home.
    """
    order = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows]) if rows else np.empty(0, np.int64)
    assert len(order) == len(lengths) and bool((np.sort(order) == np.arange(len(lengths))).all()), (
        "every row of the batch must appear exactly once"
    )
    flat = torch.cat(list(pieces)) if pieces else torch.empty(0)
    places = torch.from_numpy(places_of(offsets_of(lengths), order)).to(flat.device)
    assert len(places) == len(flat), f"{len(flat)} values came back for rows of {len(places)}"
    result = torch.empty_like(flat)
    result[places] = flat
    return result
