"""`--ci-metric-checker-key`: a run is a failure unless an evaluation metric reaches a threshold at least once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from miles.errors import FlagError, MilesError


class MetricNeverReached(MilesError):
    """No evaluation of the run reached `--ci-metric-checker-threshold`."""


class MetricChecker:
    """Told every evaluation; `verdict` is asked once, at the end.

    Example: `MetricChecker("eval/greedy", 0.9)`
    """

    def __init__(self, key: str, threshold: float | None) -> None:
        if threshold is None:
            raise FlagError("--ci-metric-checker-key", given="needs --ci-metric-checker-threshold.")
        self.key, self.threshold, self.best = key, threshold, None

    best: float | None

    def on_eval(self, metrics: Mapping[str, Any]) -> None:
        if self.key not in metrics:
            raise FlagError("--ci-metric-checker-key", given=self.key, expected="one of " + ", ".join(sorted(metrics)))
        value = float(metrics[self.key])
        if not math.isnan(value):
            self.best = value if self.best is None else max(self.best, value)

    def verdict(self) -> None:
        """Raise MetricNeverReached where the threshold was not reached."""
        if self.best is None or self.best < self.threshold:
            found = "no evaluation of the run gave a number" if self.best is None else f"the best was {self.best}"
            raise MetricNeverReached(
                f"--ci-metric-checker-key {self.key}: {found}, expected at least {self.threshold}."
            )
