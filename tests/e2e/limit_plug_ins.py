"""Plug-ins of tests/e2e/test_hook_limits.py: they hang, block, fail for ever, remember, and change the directory."""

from __future__ import annotations

import os
import re
import time
from argparse import Namespace
from typing import Any

from miles.types import Group, RolloutFnConstructorInput, RolloutFnInput, Sample

BAD_SAMPLE = 5


def good(sample: Sample) -> float:
    """A score that differs between the answers to one problem."""
    return sum(map(ord, sample.response)) % 7 / 7


async def scores(args: Namespace, sample: Sample) -> float:
    return good(sample)


async def one_raises(args: Namespace, sample: Sample) -> float:
    if sample.index == BAD_SAMPLE:
        raise ValueError("no score for this one")
    return good(sample)


async def loops(args: Namespace, sample: Sample) -> float:
    while True:
        sample.metadata["n"] = sample.metadata.get("n", 0) + 1


async def stuck_in_c(args: Namespace, sample: Sample) -> float:
    time.sleep(600)  # stuck
    return 1.0


async def explodes(args: Namespace, sample: Sample) -> float:
    return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))  # explodes


async def raises(args: Namespace, sample: Sample) -> float:
    raise ConnectionError("the grader is gone")


def moves(args: Namespace, sample: Sample) -> float:
    os.chdir("/")
    return good(sample)


def endless_filter(args: Namespace, samples: list[Sample]) -> bool:
    while True:
        samples[0].metadata["n"] = 1


def endless_loss(args: Namespace, batch: Any, logits: Any, reduce: Any) -> Any:
    while True:
        batch["n"] = 1


def endless_log(rollout_id: int, args: Namespace, samples: list[Sample], extra: Any, seconds: float) -> bool:
    while True:
        samples.clear()


class CountedLoss:
    """A loss that remembers its calls; the number is in the metrics."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, args: Namespace, batch: Any, logits: Any, reduce: Any) -> Any:
        self.calls += 1
        zero = logits.sum() * 0.0
        return zero, {"calls": zero.detach() + self.calls}

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


counted_loss = CountedLoss()
# What a new process finds: tests run in one.
counted_loss_anew = CountedLoss()


class WithoutOne:
    """The shipped rollout, without the sample that has no score and in one optimizer step of the others."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = input.args, input.data_source

    def __call__(self, input: RolloutFnInput) -> list[Group]:
        from miles.rollout.sglang_rollout import generate_rollout

        groups: list[Group] = generate_rollout(self.args, input.rollout_id, self.data_source).samples
        return [[s for s in group if s.index != BAD_SAMPLE] for group in groups]
