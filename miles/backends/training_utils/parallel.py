"""Published import path of `ParallelState`."""

from miles.loss.parallel_state import ParallelState

__all__ = ["ParallelState"]
