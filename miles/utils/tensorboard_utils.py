"""Published import path of the TensorBoard writer of a process; the work is in `miles.observe.tracking`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from miles.observe.tracking import TensorBoardSink
from miles.rollout.singleton import SingletonMeta


class _TensorboardAdapter(metaclass=SingletonMeta):
    """One writer per process. FlagError where TensorBoard is not installed or no directory is given."""

    def __init__(self, args: Namespace) -> None:
        self._sink = TensorBoardSink(args)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Every number of `data` as a scalar at `step`; what is no number is left out."""
        self._sink.log({**data, "": step}, "")

    def finish(self) -> None:
        self._sink.close()
