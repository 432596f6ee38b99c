"""How long the command line takes to answer: help, and a check that finds a broken plug-in.

    python benchmarks/startup.py [--runs 5]

Whole processes, from start to exit; the median of the runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
CARRY = ["--config", "examples/quickstart/carry.yaml"]


def timed(command: list[str], status: int) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "miles", *command], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == status, done.stderr
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder, "broken.py")
        broken.write_text("def reward(sample):\n    return 1.0\n")
        cases = [
            ("miles --help", ["--help"], 0, 0.5),
            ("miles train --help", ["train", "--help"], 0, 0.5),
            ("miles check, broken plug-in", ["check", *CARRY, "--custom-rm-path", f"{broken}:reward"], 2, 3.0),
        ]
        print(f"{'':<30}{'seconds':>9}{'goal':>9}")
        for name, command, status, goal in cases:
            seconds = median(timed(command, status) for _ in range(given.runs))
            print(f"{name:<30}{seconds:>9.2f}{'<= ' + str(goal):>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
