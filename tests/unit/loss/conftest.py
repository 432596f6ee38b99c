"""Hypothesis without a deadline: the first call of a tensor operation may take longer than any sensible limit."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
