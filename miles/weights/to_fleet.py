"""A trainer in this process to engines in others: its weights are copied into the memory that the fleet delivers from.

The trainer's own tensors change while it trains; the memory does not, so that an engine can be replaced at any time.
"""

from __future__ import annotations

from miles.engine.fleet import Fleet
from miles.weights import Weights
from miles.weights.memory import Memory
from miles.weights.shared_memory import SharedMemory


class ToFleet:
    """Implements `WeightTransport` for a fleet whose memory this process writes."""

    def __init__(self, writer: SharedMemory, memory: Memory, fleet: Fleet) -> None:
        self._writer, self._memory, self._fleet = writer, memory, fleet

    def suspend(self) -> None:
        """Engines read other memory than the optimizer writes: they may go on until `update`."""

    def update(self, weights: Weights, version: int) -> None:
        self._fleet.suspend()
        self._writer.update(weights, version)
        self._fleet.update_weights(self._memory.tensors, str(version))
