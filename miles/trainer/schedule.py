"""The learning rate as a function of the optimizer step (Megatron's schedule, which the published flags name).

lr ▲        ____ max_lr
   │      ╱      ╲___            constant · linear · cosine · inverse-square-root · WSD
   │    ╱            ╲____ min_lr
   └───┴──────────────┴────────► step
     warmup          decay
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from miles.config import OptimizerConfig
from miles.errors import FlagError


@dataclass(frozen=True)
class Schedule:
    """Settings of one schedule; all lengths in optimizer steps.

    Example: `Schedule(max_lr=2e-3, min_lr=6e-4, warmup=30, decay=240, style="linear")`
    """

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    warmup: int = 0
    decay: int = 0
    style: str = "constant"
    wsd_decay: int = 0
    wsd_style: str = "exponential"

    def __post_init__(self) -> None:
        if self.style not in DECAYS:
            raise FlagError("--lr-decay-style", given=self.style, expected="one of " + ", ".join(sorted(DECAYS)))
        if self.wsd_style not in ANNEALS:
            raise FlagError(
                "--lr-wsd-decay-style", given=self.wsd_style, expected="one of " + ", ".join(sorted(ANNEALS))
            )

    def lr(self, step: int) -> float:
        """The rate that optimizer step number `step` (from 0) uses."""
        if self.warmup > 0 and step < self.warmup:
            return self.init_lr + (self.max_lr - self.init_lr) * (step + 1) / self.warmup
        return DECAYS[self.style](self, step)

    def _progress(self, step: int) -> float:
        """0 at the end of the warm-up, 1 at the end of the decay and after."""
        span = self.decay - self.warmup
        return min(1.0, (step - self.warmup) / span) if span > 0 else 1.0

    def _between(self, share: float) -> float:
        return self.min_lr + (self.max_lr - self.min_lr) * share


def _constant(s: Schedule, step: int) -> float:
    return s.max_lr


def _linear(s: Schedule, step: int) -> float:
    return s._between(1.0 - s._progress(step))


def _cosine(s: Schedule, step: int) -> float:
    return s._between(0.5 * (1.0 + math.cos(math.pi * s._progress(step))))


def _inverse_square_root(s: Schedule, step: int) -> float:
    warm = max(s.warmup, 1)
    return max(s.min_lr, s.max_lr * math.sqrt(warm) / math.sqrt(max(step, warm)))


def _wsd(s: Schedule, step: int) -> float:
    """Warm up, stay, then anneal over the last `wsd_decay` steps."""
    start = s.decay - s.wsd_decay
    if step <= start or s.wsd_decay <= 0:
        return s.max_lr
    return s._between(ANNEALS[s.wsd_style](min(1.0, (step - start) / s.wsd_decay)))


DECAYS = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse-square-root": _inverse_square_root,
    "WSD": _wsd,
}

ANNEALS = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


class ParamScheduler:
    """Sets the rate of every parameter group before each step. Plug-ins receive it as `opt_param_scheduler`."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule, self.num_steps = optimizer, schedule, 0
        self._apply()

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return self.schedule.lr(self.num_steps)

    def step(self, increment: int = 1) -> None:
        """Go on by `increment` optimizer steps."""
        self.num_steps += increment
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = int(state["num_steps"])
        self._apply()


def schedule_of(optimizer: OptimizerConfig, total_steps: int) -> Schedule:
    """The schedule that the flags describe, for a run of `total_steps` optimizer steps."""
    decay = optimizer.lr_decay_iters or total_steps
    warmup = optimizer.lr_warmup_iters
    if optimizer.lr_warmup_fraction is not None:
        warmup = round(optimizer.lr_warmup_fraction * decay)
    return Schedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        init_lr=optimizer.lr_warmup_init,
        warmup=warmup,
        decay=decay,
        style=optimizer.lr_decay_style,
        wsd_decay=optimizer.lr_wsd_decay_iters or 0,
        wsd_style=optimizer.lr_wsd_decay_style or "exponential",
    )
