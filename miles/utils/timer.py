"""Published import path of the timers; re-exports `miles.observe.timers`."""

from miles.observe.timers import Timer, inverse_timer, timer

__all__ = ["Timer", "inverse_timer", "timer"]
