"""What happens after a plug-in call has failed for good: count it, tell it, keep it, and end the run where it must.

One Guard per run is shared by all its plug-ins; `call.Hook` hands every failure to it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from miles.errors import EngineError, ErrorBudgetExceeded, HookError, MilesError
from miles.hooks.card import FailedCall, card, write_bundle
from miles.types import Failure

logger = logging.getLogger("miles.hooks")

# Bundles per plug point and run: a reward that fails thousands of times says the same in each.
MAX_BUNDLES = 20
# Fewer failures than this in one rollout never exceed the budget: a fraction of a handful of calls means nothing.
MIN_FAILURES = 5


@dataclass
class HookStats:
    """Counts and seconds of one plug-in since the run began. A batch of 8 samples counts as 8 calls.

    Example: `HookStats(calls=640, failures=2, total_s=1.9, max_s=0.07)`
    """

    calls: int = 0
    failures: int = 0
    total_s: float = 0.0
    max_s: float = 0.0
    # Where this rollout began, and how many calls the last one made: what the error budget is measured against.
    calls_before: int = 0
    failures_before: int = 0
    calls_last_rollout: int = 0

    def add(self, seconds: float, calls: int = 1) -> None:
        self.calls += calls
        self.total_s += seconds
        if seconds > self.max_s:
            self.max_s = seconds

    def begin_rollout(self) -> None:
        self.calls_last_rollout = self.calls - self.calls_before
        self.calls_before, self.failures_before = self.calls, self.failures

    def exceeds(self, budget: float) -> bool:
        """At least MIN_FAILURES calls of this rollout failed, and they are more than `budget` of its calls.

        Calls so far or calls of the last rollout, whichever is more: early failures must not weigh more than late ones.
        """
        failures = self.failures - self.failures_before
        calls = max(self.calls - self.calls_before, self.calls_last_rollout, failures)
        return failures >= MIN_FAILURES and failures > budget * calls


class Guard:
    """Policy, error budget and bundles of one run."""

    def __init__(self, error_budget: float) -> None:
        self.error_budget = error_budget
        self.bundle_dir: Path | None = None
        self._bundles: dict[str, int] = {}
        self._number = 0
        self._told: set[tuple[str, str, str]] = set()

    def report(self, failed: FailedCall, stats: HookStats, *, count: int = 1) -> Failure:
        """The failure as data. Raises HookError under `raise`, ErrorBudgetExceeded where too many calls failed.

        `count` samples have failed in this one call.
        """
        stats.failures += count
        bundle = self._bundle(failed)
        failure = failed.failure(bundle)
        text = card(failed, bundle)
        if failed.policy.action == "raise":
            raise HookError(failure, text) from failed.error
        if stats.exceeds(self.error_budget):
            failures = stats.failures - stats.failures_before
            calls = max(stats.calls - stats.calls_before, failures)
            head = (
                f"{failures} of {calls} calls of {failed.point.flag} have failed in this rollout, more than "
                f"--hook-error-budget {self.error_budget:g} tolerates. The last one:"
            )
            raise ErrorBudgetExceeded(failure, f"{head}\n{text}") from failed.error
        self._tell(failure, text)
        return failure

    def _tell(self, failure: Failure, text: str) -> None:
        """The whole card once per place and kind; what follows is in the counters and bundles."""
        key = (failure.flag, failure.location, failure.kind)
        if key not in self._told:
            self._told.add(key)
            logger.warning("%s", text)

    def _bundle(self, failed: FailedCall) -> str | None:
        written = self._bundles.get(failed.point.name, 0)
        if self.bundle_dir is None or written >= MAX_BUNDLES:
            return None
        self._bundles[failed.point.name] = written + 1
        self._number = max(self._number, _last_number(self.bundle_dir)) + 1
        try:
            return str(write_bundle(failed, self.bundle_dir, self._number))
        except Exception as error:  # what is being told is the plug-in's failure; this one must not hide it
            logger.warning("%s: the bundle could not be written to %s: %s", failed.point.flag, self.bundle_dir, error)
            return None


def _last_number(folder: Path) -> int:
    """The number of the last bundle there, which a resumed run continues; 0 without any."""
    numbers = [int(p.name[:6]) for p in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9]-*")]
    return max(numbers, default=0)


def passes(error: BaseException) -> BaseException | None:
    """The error that goes through the door untouched, if `error` is one or holds one (an ExceptionGroup)."""
    if isinstance(error, BaseExceptionGroup):
        return next((p for p in map(passes, error.exceptions) if p is not None), None)
    untouched = isinstance(error, MilesError) and not isinstance(error, EngineError)
    return error if untouched or not isinstance(error, (Exception, SystemExit)) else None


