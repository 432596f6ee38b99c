"""Trainer to engines: one file per transport, all with the two methods of `WeightTransport`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

Bucket = dict[str, Tensor]
"""Whole tensors by name; empty on ranks that do not collect them."""

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Weights(Protocol):
    """A trainer's weights under the names of the Hugging Face model, wherever their parts are."""

    def layout(self) -> Shapes:
        """Shape and dtype of every whole tensor, the same on every rank."""

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """The whole tensors on rank 0, in the order of `layout`, at most `bucket_bytes` at a time (a larger one comes
        alone). Every rank must run it to its end. Tensors may be views of live parameters."""


class WeightTransport(Protocol):
    def suspend(self) -> None:
        """The trainer's tensors change from now on. Engines that read these very tensors stop until `update`."""

    def update(self, weights: Weights, version: int) -> None:
        """Make every engine serve `weights` as `version`; returns when all of them do.

        A transport between processes pauses generation, flushes caches, sends buckets of `--update-weight-buffer-size`,
        and continues; an engine that misses an update must not serve the next version.
        """


class Receiver(Protocol):
    """Who generates from weights that somebody else writes: an engine of this process, or a fleet."""

    def suspend(self) -> None:
        """The tensors change from now on, until `update_weights`."""

    def update_weights(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Generate from `tensors` as `version`; returns when everybody does who still serves."""
