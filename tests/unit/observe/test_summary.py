"""The clock of a run and what summary.json says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from miles.observe import summary
from miles.observe.summary import RunClock, build_summary, peak_rss_gb, process_age_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(summary.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(summary, "process_age_s", lambda: 2.0)
    return fake


class FakeTime:
    now = 100.0

    def __call__(self, seconds: float) -> None:
        self.now += seconds


def test_evaluation_and_saving_count_for_nothing(clock: FakeTime) -> None:
    run = RunClock()
    assert run.first_step_s is None and run.wall_s is None
    clock(1.0)  # loading
    with run.excluded():
        clock(10.0)  # evaluation before training
    for rollout_id in range(4):
        with run.generation():
            clock(0.25)
        with run.training():
            clock(0.5)
            run.optimizer_step()
            clock(0.125)
            run.optimizer_step()
        clock(0.125)
        run.weights_updated()
        if rollout_id == 1:
            with run.excluded():
                clock(7.0)
    with run.excluded():
        clock(20.0)
    clock(5.0)
    assert run.first_step_s == pytest.approx(2.0 + 1.0 + 0.25 + 0.5)
    assert run.wall_s == pytest.approx(4 * 1.0)
    assert run.per_rollout() == pytest.approx(
        {"wall_s_per_rollout": 1.0, "generation_s_per_rollout": 0.25, "train_s_per_rollout": 0.625}
    )


def test_time_is_counted_when_a_phase_raises(clock: FakeTime) -> None:
    run = RunClock()
    with pytest.raises(KeyboardInterrupt), run.generation():
        clock(3.0)
        raise KeyboardInterrupt
    assert run.generation_s == 3.0
    assert set(run.per_rollout().values()) == {None}, "no rollout was finished"


def test_the_age_of_a_process_starts_at_its_creation() -> None:
    code = "import time; time.sleep(0.3); from miles.observe.summary import process_age_s; print(process_age_s())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - start + 0.02


def test_age_without_proc_comes_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    precise = process_age_s()
    monkeypatch.setattr(summary, "PROC_STAT", Path("/nowhere"))
    assert process_age_s() == pytest.approx(precise, abs=1.5)


def test_peak_memory_is_in_gb_and_stays() -> None:
    code = (
        "from miles.observe.summary import peak_rss_gb; print(peak_rss_gb());"
        "block = bytearray(b'x') * 100_000_000; del block; print(peak_rss_gb())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.005 < before < 0.1, "its own, however large the process that started it"
    assert 0.09 < after - before < 0.12


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    precise = peak_rss_gb()
    monkeypatch.setattr(summary, "PROC_STATUS", Path("/nowhere"))
    assert peak_rss_gb() >= precise * 0.9


@dataclass
class Stats:
    calls: int = 3
    failures: int = 1


def test_summary(clock: FakeTime) -> None:
    run = RunClock()
    with run.generation():
        clock(0.123456)
    run.optimizer_step()
    run.weights_updated()
    got = build_summary(
        run,
        seed=7,
        eval_before={"sampled": 0.273, "greedy": 0.0},
        hooks={"custom_rm": Stats()},
        notices=["no GPU"],
        extra={"resumed_from": None},
    )
    assert 0 < got.pop("peak_rss_gb") < 100
    assert json.loads(json.dumps(got)) == {
        "eval_before": {"sampled": 0.273, "greedy": 0.0},
        "eval_after": None,
        "first_step_s": 2.1235,
        "wall_s_per_rollout": 0.1235,
        "generation_s_per_rollout": 0.1235,
        "train_s_per_rollout": 0.0,
        "rollouts": 1,
        "seed": 7,
        "hooks": {"custom_rm": {"calls": 3, "failures": 1}},
        "notices": ["no GPU"],
        "resumed_from": None,
    }
    with pytest.raises(ValueError, match=r"expected new names, got \['seed'\]"):
        build_summary(run, seed=7, extra={"seed": 8})
