"""Published import path of the trackers; re-exports `miles.observe.tracking`."""

from miles.observe.tracking import init_tracking, log

__all__ = ["init_tracking", "log"]
