"""Trainer and engine in one process: the engine reads the trainer's own tensors, nothing is copied or sent.

Safe because no step of the engine runs from the first change of the tensors to the update: requests of asynchronous
rollouts wait meanwhile and go on under the new weights and version. A run whose engine is to generate while the
optimizer works needs a transport that copies.
"""

from __future__ import annotations

from collections.abc import Mapping

from miles.engine.embedded.engine import EmbeddedEngine
from miles.weights import Weights


class InProcess:
    """Implements `WeightTransport` for one embedded engine."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine

    def suspend(self) -> None:
        self.engine.suspend()

    def update(self, weights: Weights, version: int) -> None:
        assert isinstance(weights, Mapping)  # tensors, and not parts of them elsewhere
        self.engine.update_weights(weights, str(version))
