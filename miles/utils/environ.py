"""Published import path; see `miles.config.environ`."""

from miles.config.environ import enable_experimental_rollout_refactor

__all__ = ["enable_experimental_rollout_refactor"]
