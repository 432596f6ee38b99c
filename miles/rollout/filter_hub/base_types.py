"""Calling a dynamic filter and counting what it drops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from miles.types import DynamicFilterOutput

__all__ = ["DynamicFilterOutput", "MetricGatherer", "call_dynamic_filter"]


def call_dynamic_filter(fn: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """The verdict of `fn`; without a filter everything is kept, and a bare value counts by its truth."""
    if fn is None:
        return DynamicFilterOutput(keep=True)
    output = fn(*args, **kwargs)
    return output if isinstance(output, DynamicFilterOutput) else DynamicFilterOutput(keep=output)


class MetricGatherer:
    """Why groups were dropped, counted over one rollout."""

    def __init__(self) -> None:
        self._dropped_by_reason: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """Count one dropped group; a filter that gives no reason is not counted."""
        if reason:
            self._dropped_by_reason[reason] += 1

    def collect(self) -> dict[str, int]:
        """Example: `{"rollout/dynamic_filter/drop_zero_std_1.0": 3}`."""
        return {f"rollout/dynamic_filter/drop_{reason}": n for reason, n in self._dropped_by_reason.items()}
