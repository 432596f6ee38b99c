"""For the tests of the examples: a whole `miles train` in this process, from the repository's root, as a reader would.

    def test_it(train, metrics):
        run = train("examples/DAPO/dapo.yaml", "--num-rollout", 2)
        assert metrics(run, "train/loss")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.__main__ import main
from miles.observe.record import read_metrics

ROOT = Path(__file__).resolve().parents[2]

Train = Callable[..., Path]
Metrics = Callable[[Path, str], list[float]]


@pytest.fixture
def miles() -> Callable[..., int]:
    """`miles ...` with one computing thread; its exit status."""

    def call(*argv: object) -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with contextlib.chdir(ROOT):
                return main([*map(str, argv)])
        finally:
            torch.set_num_threads(threads)

    return call


@pytest.fixture
def train(tmp_path: Path, miles: Callable[..., int]) -> Train:
    """`train(config, *flags)` runs to its end and gives the run directory; `status` is the exit status to expect."""
    count = 0

    def run(config: object, *flags: object, status: int = 0) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        got = miles("train", "--config", config, "--run-dir", folder, "--progress", "none", *flags)
        assert got == status, f"exit status {got}, expected {status}"
        return folder

    return run


@pytest.fixture
def metrics() -> Metrics:
    """`metrics(run, "train/loss")`: every value of one metric, in order."""

    def read(run: Path, key: str) -> list[float]:
        lines: list[dict[str, Any]] = read_metrics(run)
        return [line[key] for line in lines if key in line]

    return read
