"""A program of these tests in as many processes as it has ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
