"""Published import path of `--ci-metric-checker-key`; the check is `miles.observe.metric_checker`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from miles.observe import metric_checker

__all__ = ["MetricChecker"]


class MetricChecker:
    """Told every evaluation; `dispose` raises unless one of them reached the threshold."""

    @staticmethod
    def maybe_create(args: Namespace) -> MetricChecker | None:
        """None where `args.ci_metric_checker_key` is not set."""
        return None if args.ci_metric_checker_key is None else MetricChecker(args)

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._checker = metric_checker.MetricChecker(args.ci_metric_checker_key, args.ci_metric_checker_threshold)

    def on_eval(self, metrics: Mapping[str, Any]) -> None:
        self._checker.on_eval(metrics)

    def dispose(self) -> None:
        """Raises MetricNeverReached."""
        self._checker.verdict()
