"""A run as a test: a metric must reach a threshold once."""

from __future__ import annotations

import pytest

from miles.errors import FlagError
from miles.observe.metric_checker import MetricChecker, MetricNeverReached


@pytest.mark.parametrize(
    ("values", "passes"),
    [([0.9], True), ([0.1, 0.95, 0.2], True), ([0.1, 0.2], False), ([0.8999], False), ([float("nan")], False)],
)
def test_verdict(values: list[float], passes: bool) -> None:
    checker = MetricChecker("eval/greedy", 0.9)
    for value in values:
        checker.on_eval({"eval/greedy": value, "eval/sampled": 1.0})
    if passes:
        checker.verdict()
        return
    with pytest.raises(MetricNeverReached, match=r"eval/greedy: .*, expected at least 0\.9\."):
        checker.verdict()
    assert MetricNeverReached.exit_status == 1


def test_one_nan_does_not_hide_a_good_value() -> None:
    checker = MetricChecker("eval/greedy", 0.9)
    for value in (float("nan"), 0.95, float("nan")):
        checker.on_eval({"eval/greedy": value})
    checker.verdict()


def test_a_run_without_an_evaluation_fails() -> None:
    with pytest.raises(MetricNeverReached, match="no evaluation of the run gave a number"):
        MetricChecker("eval/greedy", 0.9).verdict()


def test_an_unknown_metric_is_named_with_the_known_ones() -> None:
    with pytest.raises(FlagError, match="expected one of eval/a, eval/b, got 'eval/c'"):
        MetricChecker("eval/c", 0.5).on_eval({"eval/b": 1.0, "eval/a": 0.0})


def test_a_threshold_is_needed() -> None:
    with pytest.raises(FlagError, match="--ci-metric-checker-threshold"):
        MetricChecker("eval/greedy", None)
