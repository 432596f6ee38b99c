"""The clock of a run, and the numbers of summary.json.

Leaves the file to `record` and what was evaluated to the run.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miles.observe.jsonable import to_jsonable

# What Linux tells a process about itself.
PROC_STAT = Path("/proc/self/stat")
PROC_STATUS = Path("/proc/self/status")


def process_age_s() -> float:
    """Seconds since the kernel created this process.

    On Linux from /proc, to a hundredth of a second; elsewhere psutil's creation time, which is good to about a second.
    """
    if sys.platform == "linux" and PROC_STAT.exists():
        # Field 22, counted after the name in parentheses, which may hold spaces: ticks since boot.
        ticks = int(PROC_STAT.read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - float(psutil.Process().create_time())


def peak_rss_gb() -> float:
    """The largest memory of this process so far, in GB of 10^9 bytes.

    On Linux VmHWM from /proc: `ru_maxrss` would start at what the parent process held when it started this one.
    """
    if PROC_STATUS.exists():
        for line in PROC_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunClock:
    """What a run took, with evaluation and saving left out.

    `generation()` and `training()` time the two halves of each rollout; `excluded()` times what counts for neither.
    Generation may overlap training (--max-staleness); excluded time must not overlap itself.

        process start ... [excluded] ... first optimizer step          first_step_s
                 first generation ... [excluded] ... last weight update    wall_s

    Example::

        clock = RunClock()
        with clock.excluded():
            evaluate()
        for rollout_id in range(40):
            with clock.generation():
                samples = generate()
            with clock.training():
                train(samples)      # calls clock.optimizer_step() after each step
            clock.weights_updated()
    """

    def __init__(self) -> None:
        self._process_start = time.perf_counter() - process_age_s()
        self._excluded_s = 0.0
        self._first_generation: tuple[float, float] | None = None  # (time, excluded until then)
        self._last_update: tuple[float, float] | None = None
        self._first_step_s: float | None = None
        self.generation_s = 0.0
        self.train_s = 0.0
        self.rollouts = 0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time that counts neither for the first step nor for the rollouts: evaluation, saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded_s += time.perf_counter() - start

    @contextmanager
    def generation(self) -> Iterator[None]:
        start = time.perf_counter()
        if self._first_generation is None:
            self._first_generation = (start, self._excluded_s)
        try:
            yield
        finally:
            self.generation_s += time.perf_counter() - start

    @contextmanager
    def training(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.train_s += time.perf_counter() - start

    def optimizer_step(self) -> None:
        """Call after each optimizer step; the first one counts."""
        if self._first_step_s is None:
            self._first_step_s = time.perf_counter() - self._process_start - self._excluded_s

    def weights_updated(self) -> None:
        """Call when the weights of a rollout have reached the engines: the rollout is over."""
        self._last_update = (time.perf_counter(), self._excluded_s)
        self.rollouts += 1

    @property
    def first_step_s(self) -> float | None:
        """Process start to the end of the first optimizer step; None before it."""
        return self._first_step_s

    @property
    def wall_s(self) -> float | None:
        """First generation to last weight update; None before the first update."""
        if self._first_generation is None or self._last_update is None:
            return None
        (start, excluded_before), (end, excluded) = self._first_generation, self._last_update
        return (end - start) - (excluded - excluded_before)

    def per_rollout(self) -> dict[str, float | None]:
        """The three numbers per rollout; null before the first weight update.

        Example: `{"wall_s_per_rollout": 0.31, "generation_s_per_rollout": 0.14, "train_s_per_rollout": 0.16}`
        """
        wall_s = self.wall_s
        if wall_s is None:
            return dict.fromkeys(("wall_s_per_rollout", "generation_s_per_rollout", "train_s_per_rollout"))
        return {
            "wall_s_per_rollout": wall_s / self.rollouts,
            "generation_s_per_rollout": self.generation_s / self.rollouts,
            "train_s_per_rollout": self.train_s / self.rollouts,
        }


def build_summary(
    clock: RunClock,
    *,
    seed: int,
    eval_before: Mapping[str, Any] | None = None,
    eval_after: Mapping[str, Any] | None = None,
    hooks: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of summary.json. Seconds are rounded to a tenth of a millisecond.

    `eval_before` and `eval_after` are e.g. `{"sampled": 0.273, "greedy": 0.0}`; `hooks` maps plug points to their
    statistics; `extra` is added under its own names and replaces none of the others (ValueError).

    Example::

        {"eval_before": {"sampled": 0.273, "greedy": 0.0}, "eval_after": {"sampled": 0.887, "greedy": 0.953},
         "first_step_s": 3.1, "wall_s_per_rollout": 0.31, "generation_s_per_rollout": 0.14,
         "train_s_per_rollout": 0.16, "peak_rss_gb": 0.61, "rollouts": 40, "seed": 1234,
         "hooks": {"custom_rm": {"calls": 5120, "failures": 0, "p50_s": 7e-06, "p95_s": 2e-05, "max_s": 0.0001,
         "total_s": 0.05}}, "notices": []}
    """
    seconds = {"first_step_s": clock.first_step_s, **clock.per_rollout()}
    summary = {
        "eval_before": eval_before,
        "eval_after": eval_after,
        **{name: None if value is None else round(value, 4) for name, value in seconds.items()},
        "peak_rss_gb": round(peak_rss_gb(), 4),
        "rollouts": clock.rollouts,
        "seed": seed,
        "hooks": hooks or {},
        "notices": list(notices),
    }
    taken = summary.keys() & (extra or {}).keys()
    if taken:
        raise ValueError(f"extra: expected new names, got {sorted(taken)}")
    plain: dict[str, Any] = to_jsonable({**summary, **(extra or {})})
    return plain
