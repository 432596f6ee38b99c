"""Published import path; see `miles.config.parse`."""

from miles.config.parse import parse_args

__all__ = ["parse_args"]
