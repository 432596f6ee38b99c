"""Timers add up, one set per process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from miles.utils.timer import Timer, inverse_timer, timer


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    Timer().reset()
    yield
    Timer().reset()
    Timer().start_time.clear()


def test_one_timer_per_process() -> None:
    assert Timer() is Timer()
    assert isinstance(Timer(), Timer)


def test_times_add_up_until_reset() -> None:
    Timer().add("train", 1.0)
    Timer().add("train", 0.5)
    Timer().add("save", 2.0)
    assert Timer().log_dict() == {"train": 1.5, "save": 2.0}
    Timer().reset("train")
    assert Timer().log_dict() == {"save": 2.0}
    Timer().reset("unknown")
    Timer().reset()
    assert Timer().log_dict() == {}


def test_contexts_and_decorators_measure() -> None:
    @timer
    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert work(0.02) == 0.02 and work.__name__ == "work"
    with timer("block"), Timer().context("inner"):
        time.sleep(0.01)
    assert 0.02 <= Timer().log_dict()["work"] < 0.5
    assert 0.01 <= Timer().log_dict()["inner"] <= Timer().log_dict()["block"] < 0.5


def test_a_block_that_raises_is_timed() -> None:
    with pytest.raises(ZeroDivisionError), timer("boom"):
        raise ZeroDivisionError
    assert "boom" in Timer().log_dict() and not Timer().start_time


def test_inverse_timer_leaves_its_block_out() -> None:
    Timer().start("train_wait")
    with inverse_timer("train_wait"):
        time.sleep(0.05)
    Timer().end("train_wait")
    assert Timer().log_dict()["train_wait"] < 0.04


def test_misuse_is_asserted() -> None:
    with pytest.raises(AssertionError, match="'a' was not started"):
        Timer().end("a")
    Timer().start("a")
    with pytest.raises(AssertionError, match="'a' is running already"):
        Timer().start("a")
