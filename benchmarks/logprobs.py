"""The log-prob pass of the trainer beside the plain way, which writes float32 logits down: peak memory and time.

    python benchmarks/logprobs.py [--tokens 32768] [--vocabulary 32000] [--hidden 256] [--threads 2] [--rounds 3]

8 x 4096 response tokens by default: log-probs of given tokens from the last hidden states and the output projection,
alone and with the gradients of both. The plain side is `(hidden @ weight.T).float()` and `cross_entropy`; the other is
`miles.loss.linear_log_probs`. Every figure comes from processes of their own, which take turns: `memory` is the growth
of the peak resident set (Linux) over what the process held before the first pass, `time` the better of two more.
Ratios are medians over the rounds. Threads wait for each other after every chunk, so on a machine that does other work
give --threads 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.loss.logprobs import linear_log_probs
from miles.run.host import keep_freed_memory

GOALS = {"memory": 0.1, "time": 1.1}
PASSES = ("forward", "forward and backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return -F.cross_entropy(logits, targets, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_log_probs(hidden, weight, targets).log_probs


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "miles": chunked}


def measure(side: str, which: str, given: argparse.Namespace) -> dict[str, float]:
    """One side in this process."""
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as in a training process
    torch.manual_seed(0)
    dtype = DTYPES[given.dtype]
    hidden = torch.randn(given.tokens, given.hidden, dtype=dtype, requires_grad=True)
    weight = (torch.randn(given.vocabulary, given.hidden) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(given.vocabulary, (given.tokens,))
    before = forget_peak()

    def once() -> float:
        begin = time.perf_counter()
        if which == "forward":
            with torch.no_grad():
                SIDES[side](hidden, weight, targets)
        else:
            SIDES[side](hidden, weight, targets).mean().backward()
            hidden.grad = weight.grad = None
        return time.perf_counter() - begin

    once()
    grown = status_kib("VmHWM") - before
    return {"memory": grown / 1024, "time": min(once(), once())}


def forget_peak() -> int:
    """Resident KiB of this process, from which its peak counts anew; what was freed goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_kib("VmRSS")


def status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_process(side: str, which: str, given: argparse.Namespace) -> dict[str, float]:
    flags = [f"--{name}={getattr(given, name)}" for name in ("tokens", "vocabulary", "hidden", "threads", "dtype")]
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--which", which, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * 4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--which", choices=PASSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        print(json.dumps(measure(given.side, given.which, given)))
        return 0
    print(f"{given.tokens} tokens, vocabulary {given.vocabulary}, hidden {given.hidden}, {given.dtype}")
    print(f"{'':<32}{'plain':>10}{'miles':>10}{'ratio':>8}{'goal':>9}")
    for which in PASSES:
        rounds = [{side: in_process(side, which, given) for side in SIDES} for _ in range(given.rounds)]
        for figure, unit in (("memory", "MiB"), ("time", "s")):
            a, b = (median(r[side][figure] for r in rounds) for side in SIDES)
            ratio = median(r["miles"][figure] / r["plain"][figure] for r in rounds)
            print(f"{f'{which}, {figure} ({unit})':<32}{a:>10.1f}{b:>10.1f}{ratio:>8.3f}{f'<= {GOALS[figure]}':>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
