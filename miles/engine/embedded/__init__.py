"""miles' own small engine: continuous batching on one device, in the trainer's process or behind SGLang's HTTP API."""

from miles.engine.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
