"""Published import path of the logging set-up; re-exports `miles.observe.logging`."""

from miles.observe.logging import configure_logger

__all__ = ["configure_logger"]
