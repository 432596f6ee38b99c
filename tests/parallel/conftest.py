"""Groups of ranks for the tests of this folder, each started once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miles.trainer.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
RANKS_TIMEOUT_S = 900.0


def ranks_environment() -> dict[str, str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_ranks(program: Path, size: int, *arguments: object) -> None:
    """`program RANK SIZE ARGUMENTS...` in `size` processes; fails with the output of those that failed."""
    started = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(size), *map(str, arguments)],
            env=ranks_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=RANKS_TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    failed = [f"rank {i}:\n{text}" for i, (p, text) in enumerate(zip(started, outputs)) if p.returncode]
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two and four ranks have left a trace of every case, and everybody a checkpoint."""
    from parallel_cases import keep, make_model, save

    folder = tmp_path_factory.mktemp("layouts")
    for tied in (True, False):
        for seed in (0, 1):
            make_model(folder, tied=tied, seed=seed)
    torch.set_num_threads(1)
    keep(save(folder, Ranks.alone()), folder / "saved by 1.pt", 0)
    for size in (2, 4):
        run_ranks(Path(__file__).with_name("parallel_cases.py"), size, folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
