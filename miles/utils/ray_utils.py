"""Published import path of `Box`."""

from __future__ import annotations

from typing import Any

__all__ = ["Box"]


class Box:
    """Holds one value. A Ray object reference inside a box is handed on as it is, instead of being fetched."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def inner(self) -> Any:
        return self._inner
