"""Runs of a second for the end-to-end tests: inside this process, or in one of their own where something is killed.

A run writes into a directory of its own; `weights` and `moments` read its checkpoints, which are float32 (the exported
model is in the base model's bfloat16 and would hide small differences).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from miles.__main__ import main
from miles.observe.record import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = HERE / "tiny.yaml"
QUICKSTART = ROOT / "examples" / "quickstart"
BASE = QUICKSTART / "base"
HELDOUT = QUICKSTART / "data" / "heldout.jsonl"

# A start imports torch and transformers; on a busy machine that takes a while.
START_TIMEOUT_S = 300.0

# Metrics that measure the machine and not the run.
CLOCKED = ("perf/", "hooks/", "_time")


def plug_in(name: str) -> str:
    """The path of a function in plug_ins.py beside this file, as flags take it."""
    return f"{HERE / 'plug_ins.py'}:{name}"


def flags(run_dir: Path, *more: object) -> list[str]:
    return ["--config", str(TINY), "--run-dir", str(run_dir), *map(str, more)]


def miles(*argv: object) -> int:
    """`miles ...` inside this process, from the repository's root, with one computing thread as in `Started`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(ROOT):
            return main([*map(str, argv)])
    finally:
        torch.set_num_threads(threads)


def train(run_dir: Path, *more: object, status: int = 0) -> Path:
    """One run inside this process; the run directory."""
    got = miles("train", *flags(run_dir, *more))
    assert got == status, f"exit status {got}, expected {status}"
    return run_dir


def saving(run_dir: Path, *, every: int = 1) -> tuple[object, ...]:
    """Flags that save into the run directory."""
    return "--save", run_dir / "ck", "--save-interval", every


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def latest(run_dir: Path, iteration: int | None = None) -> Path:
    """The folder of a checkpoint under `<run>/ck`: of `iteration`, or the latest."""
    root = run_dir / "ck"
    number = iteration or int((root / "latest_checkpointed_iteration.txt").read_text())
    return root / f"iter_{number:07d}"


def weights(run_dir: Path, iteration: int | None = None) -> dict[str, Tensor]:
    return load_file(latest(run_dir, iteration) / "model" / "model.safetensors")


def moments(run_dir: Path, iteration: int | None = None) -> dict[str, Tensor]:
    return load_file(latest(run_dir, iteration) / "optimizer" / "optimizer.safetensors")


def exported(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def data_state(run_dir: Path, rollout_id: int) -> dict[str, Any]:
    path = run_dir / "ck" / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def metrics(run_dir: Path, key: str) -> dict[int, float]:
    """Step -> value of one metric: `metrics(run, "train/loss")`."""
    step_key = key.split("/")[0] + "/step"
    return {line[step_key]: line[key] for line in read_metrics(run_dir) if key in line}


def unclocked(run_dir: Path, *, first: int = 0) -> list[dict[str, Any]]:
    """The metrics of rollout `first` and later ones, without what depends on the machine's speed."""
    return [
        {name: value for name, value in line.items() if not name.startswith(CLOCKED)}
        for line in read_metrics(run_dir)
        if line.get("_rollout_id", -1) >= first
    ]


def summary(run_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return loaded


# ---- a process of its own ------------------------------------------------------------------------------------------


class Started:
    """A `miles train` of its own, to be interrupted. `out` and `err` are files."""

    def __init__(self, run_dir: Path, *more: object, command: tuple[str, ...] = ("-m", "miles", "train")) -> None:
        self.run_dir = run_dir
        self.out, self.err = run_dir.with_suffix(".out"), run_dir.with_suffix(".err")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command, *flags(run_dir, *more)], cwd=ROOT, env=environment, stdout=out, stderr=err
            )

    def wait_until(self, happened: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.text()}"
            assert time.monotonic() < deadline, f"nothing in {timeout_s} s: {self.text()}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, timeout_s: float) -> int:
        """The exit status; fails where the process is still there after `timeout_s`."""
        return self.process.wait(timeout_s)

    def text(self) -> str:
        return self.out.read_text() + self.err.read_text()


@contextlib.contextmanager
def started(run_dir: Path, *more: object, **options: Any) -> Iterator[Started]:
    """`Started`, and gone at the end however the test ends."""
    run = Started(run_dir, *more, **options)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
