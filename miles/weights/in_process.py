"""Trainer and engine in one process: the engine reads the trainer's own tensors, nothing is copied or sent.

Safe because the driver alternates: while the optimizer changes the tensors no request runs, and after it the engine
drops what it cached under the old weights and takes the new version number. A run whose engine generates during
training needs a transport that copies.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from miles.engine.embedded.engine import EmbeddedEngine


class InProcess:
    """Implements `WeightTransport` for one embedded engine."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine

    def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.engine.update_weights(weights, str(version))
