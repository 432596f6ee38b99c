"""Trainer to engines: one file per transport, all with the two methods of `WeightTransport`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class WeightTransport(Protocol):
    def suspend(self) -> None:
        """The trainer's tensors change from now on. Engines that read these very tensors stop until `update`."""

    def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Make every engine serve `weights` (Hugging Face names) as `version`; returns when all of them do.

        A transport between processes pauses generation, flushes caches, sends buckets of `--update-weight-buffer-size`,
        and continues; an engine that misses an update must not serve the next version.
        """
