"""Runs whose trainer is several processes, in this process or with a driver of their own, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rank_programs import ROOT

from miles.__main__ import main
from miles.observe.record import read_metrics

TINY = ROOT / "tests" / "e2e" / "tiny.yaml"
PLUG_INS = Path(__file__).with_name("rank_plug_ins.py")

# Metrics that measure the machine and not the run.
CLOCKED = ("perf/", "hooks/", "_time")
START_TIMEOUT_S = 300.0
# How long processes may outlive what they worked for.
SECONDS_TO_END = 10.0


def flags(run_dir: Path, *more: object) -> list[str]:
    post = f"{PLUG_INS}:{more[0]}"
    return [
        "train", "--config", str(TINY), "--run-dir", str(run_dir), "--rollout-data-postprocess-path", post,
        *map(str, more[1:]),
    ]  # fmt: skip


def train(run_dir: Path, *more: object) -> int:
    """In this process, with ranks of its own; the exit status."""
    with contextlib.chdir(ROOT):
        return main(flags(run_dir, *more))


def lines(run_dir: Path, *, first: int = 0) -> list[dict[str, object]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(CLOCKED)}
        for line in read_metrics(run_dir)
        if line.get("_rollout_id", -1) >= first
    ]


def assert_alike(got: list[dict[str, object]], want: list[dict[str, object]]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def nobody_left(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def wait_until(happened: Callable[[], object], seconds: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"nothing in {seconds} s"
        time.sleep(0.02)


def ranks_left() -> list[psutil.Process]:
    """Processes of trainers that this one has started and that still live (graders of rewards may live on)."""
    return [child for child in psutil.Process().children() if "miles.trainer.worker" in child.cmdline()]


@contextlib.contextmanager
def waiting(run_dir: Path, *more: object) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A run whose ranks are in the middle of rollout 1, with their process ids."""
    command = flags(run_dir, "waits", "--actor-num-gpus-per-node", 2, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(run_dir.with_suffix(".err"), "wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles", *command], cwd=ROOT, env=environment, stderr=err, process_group=0
        )
    files = [run_dir / f"pid_{rank}" for rank in range(2)]
    pids: list[int] = []
    try:
        wait_until(lambda: all(f.is_file() and f.read_text() for f in files) or process.poll() is not None)
        assert process.poll() is None, run_dir.with_suffix(".err").read_text()
        pids += [int(f.read_text()) for f in files]
        yield process, pids
    finally:
        process.kill()
        process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
