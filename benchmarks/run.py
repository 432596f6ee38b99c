"""All benchmarks of the documentation, one after the other. Run them on a machine that does nothing else.

    make bench
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "startup.py",
    "hooks_door.py",
    "conversion.py",
    "packing.py",
    "megatron_train.py",
    "megatron_weights.py",
    "logprobs.py",
    "engine_decode.py",
    "router.py",
    "engine_http.py",
    "quickstart.py",
)


def main() -> int:
    worst = 0
    for name in BENCHMARKS:
        print(f"\n=== {name}\n", flush=True)
        worst = max(worst, subprocess.run([sys.executable, str(HERE / name)], cwd=HERE.parent).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
