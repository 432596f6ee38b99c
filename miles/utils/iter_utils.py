"""Published import path of two helpers over iterables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["chunk_named_params_by_size", "group_by"]

T = TypeVar("T")


def group_by(iterable: Iterable[Any], key: Callable[[Any], Hashable] | None = None) -> dict[Any, list[Any]]:
    """Entries by key, in order of appearance; without `key` the entries are (key, value) pairs.

    Examples: `group_by([1, 2, 3], key=lambda x: x % 2)` is `{1: [1, 3], 0: [2]}`; `group_by([("a", 1), ("a", 2)])` is
    `{"a": [1, 2]}`.
    """
    groups: dict[Any, list[Any]] = {}
    for entry in iterable:
        name, value = entry if key is None else (key(entry), entry)
        groups.setdefault(name, []).append(value)
    return groups


def chunk_named_params_by_size(
    named_params: Iterable[tuple[str, torch.Tensor]], chunk_size: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive parameters in lists of at most `chunk_size` bytes; a larger parameter has a list of its own."""
    chunk: list[tuple[str, torch.Tensor]] = []
    used = 0
    for name, param in named_params:
        size = param.numel() * param.element_size()
        if chunk and used + size > chunk_size:
            yield chunk
            chunk, used = [], 0
        chunk.append((name, param))
        used += size
    if chunk:
        yield chunk
