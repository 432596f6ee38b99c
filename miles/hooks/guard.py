"""What happens after a plug-in call has failed for good: count it, tell it, keep it, and end the run where it must.

One Guard per run is shared by all its plug-ins; `call.Hook` hands every failure to it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from miles.errors import EngineError, ErrorBudgetExceeded, HookError, MilesError
from miles.hooks.blame import innermost
from miles.hooks.card import FailedCall, card, write_bundle
from miles.hooks.limits import Interrupted
from miles.hooks.stats import HookStats
from miles.types import Failure

logger = logging.getLogger("miles.hooks")

# Bundles per plug point and run: a reward that fails thousands of times says the same in each.
MAX_BUNDLES = 20
# Fewer failures than this in one rollout never exceed the budget: a fraction of a handful of calls means nothing.
MIN_FAILURES = 5
# This many calls of one rollout, and not one success among them, end the run under any budget: nothing would ever be
# full of samples without a score.
HOPELESS_CALLS = 64


class Guard:
    """Policy, error budget and bundles of one run."""

    def __init__(self, error_budget: float) -> None:
        self.error_budget = error_budget
        self.bundle_dir: Path | None = None
        self._bundles: dict[str, int] = {}
        self._number = 0
        self._told: set[tuple[str, str, str]] = set()
        # What ends the run after an interrupted call. Others that are about to block the loop as long do not begin.
        self.over: HookError | None = None

    def report(self, failed: FailedCall, stats: HookStats, *, count: int = 1) -> Failure:
        """The failure as data. Raises HookError under `raise`, ErrorBudgetExceeded where too many calls failed.

        `count` samples have failed in this one call.
        """
        stats.rollout.failures += count
        bundle = self._bundle(failed)
        failure = failed.failure(bundle)
        text = card(failed, bundle)
        error: HookError | None = None
        if failed.policy.action == "raise":
            error = HookError(failure, text)
        elif self._exceeds(stats):
            error = ErrorBudgetExceeded(failure, f"{self._over_budget(failed, stats)}\n{text}")
        if error is None:
            self._tell(failure, text)
            return failure
        if innermost(failed.error, Interrupted) is not None:
            self.over = error
        raise error from failed.error

    def stuck(self, failed: FailedCall) -> str:
        """The card of a call that does not end although its time is up."""
        text = card(failed, self._bundle(failed))
        return f"{text}\n  stuck     it cannot be interrupted: it is inside of C code, or catches everything"

    def _exceeds(self, stats: HookStats) -> bool:
        """At least MIN_FAILURES calls of this rollout failed, and they are more than the budget allows of its calls, or
        all of many.

        Measured against the calls of the last rollout where those are more: early failures must not weigh more than
        late ones.
        """
        failures = stats.rollout.failures
        hopeless = failures >= HOPELESS_CALLS and failures == stats.calls_of_rollout
        return failures >= MIN_FAILURES and (failures > self.error_budget * stats.expected_calls or hopeless)

    def _over_budget(self, failed: FailedCall, stats: HookStats) -> str:
        """Example: `7 of 40 calls of --custom-rm-path have failed in this rollout, more than --hook-error-budget 0.05
        tolerates. The last one:`"""
        failures, calls = stats.rollout.failures, stats.calls_of_rollout
        why = f"more than --hook-error-budget {self.error_budget:g} tolerates"
        if failures <= self.error_budget * stats.expected_calls:
            why = "and not one has succeeded"
        return f"{failures} of {calls} calls of {failed.point.flag} have failed in this rollout, {why}. The last one:"

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
    if isinstance(error, MilesError):
        return None if isinstance(error, EngineError) else error
    return error if isinstance(error, (KeyboardInterrupt, GeneratorExit)) else None
