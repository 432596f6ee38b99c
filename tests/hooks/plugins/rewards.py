"""Rewards in every form that is accepted, and in several that are not."""

from __future__ import annotations

import asyncio
import math
import threading
from argparse import Namespace
from typing import Any

from miles.types import Sample


async def annotated(args: Namespace, sample: Sample) -> float:
    return float(sample.response == sample.label)


def in_thread(args: Namespace, sample: Sample) -> float:
    return float(threading.current_thread() is not threading.main_thread())


async def plain(args, sample, **kwargs):
    if isinstance(sample, list):
        return [float(s.index) for s in sample]
    return float(sample.index)


async def many(args: Namespace, samples: list[Sample]) -> list[float]:
    return [float(s.index) for s in samples]


def many_in_thread(args, samples):
    return tuple(float(s.index) for s in samples)


def makes_coroutine(args, sample):
    return plain(args, sample)


class AsyncObject:
    async def __call__(self, args: Namespace, sample: Sample) -> float:
        return 2.0


class SyncObject:
    def __call__(self, args, sample):
        return 3.0


instance = AsyncObject()


class Stateful:
    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        self.calls += 1
        return float(self.calls)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class NeedsArgument:
    def __init__(self, model) -> None:
        self.model = model

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        return 0.0


class RaisesWhenMade:
    def __init__(self) -> None:
        raise OSError("no such server")

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        return 0.0


class StateWithoutLoad:
    def state_dict(self) -> dict[str, int]:
        return {}

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        return 0.0


def trl_prompts(prompts, completions, **kwargs):
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions)]


def trl_columns(completions: list[str], answer: list[str], difficulty: list[int], **kwargs: Any) -> list[float]:
    return [d * float(c == a) for c, a, d in zip(completions, answer, difficulty)]


async def trl_async(prompts, completions, completion_ids, **kwargs):
    assert completions[0][0] == {"role": "assistant", "content": "4"}
    return [float(len(ids)) for ids in completion_ids]


def trl_none(completions, **kwargs):
    return [None if i == 1 else 1.0 for i in range(len(completions))]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "gsm8k" and extra_info["level"] == 3
    return {"score": float(solution_str == ground_truth), "acc": True}


def compute_score_short(solution_str, ground_truth, method="strict"):
    return float(solution_str == ground_truth)


# ---- failures ----------------------------------------------------------------------------------------------------


async def divides(args: Namespace, sample: Sample) -> float:
    wrong = 0
    return 1 / wrong  # the line that the card must name


def divides_in_thread(args: Namespace, sample: Sample) -> float:
    return helper(sample)


def helper(sample: Sample) -> float:
    raise ValueError(f"cannot parse {sample.response!r}")


def library_call(args: Namespace, sample: Sample) -> float:
    import json

    return json.loads("{not json")


async def slow(args: Namespace, sample: Sample) -> float:
    await asyncio.sleep(30)
    return 1.0


def stops_iteration(args: Namespace, sample: Sample) -> float:
    return next(iter([]))


async def odd_fails(args: Namespace, sample: Sample) -> float:
    if sample.index % 2:
        raise RuntimeError("odd")
    return 1.0


def batch_with_holes(args, samples):
    return [1.0, None, math.nan][: len(samples)]


def short_batch(args, samples):
    return [1.0]


def batch_fails(args, samples):
    raise KeyError("verdict")


FLAKY = {"calls": 0}


async def flaky(args: Namespace, sample: Sample) -> float:
    FLAKY["calls"] += 1
    if FLAKY["calls"] < 3:
        raise ConnectionError("busy")
    return 7.0


async def from_metadata(args: Namespace, sample: Sample) -> Any:
    return sample.metadata["value"]


async def reads_verdict(args: Namespace, sample: Sample) -> float:
    return sample.metadata["verdict"]


# ---- arity -------------------------------------------------------------------------------------------------------


async def one_argument(sample):
    return 0.0


async def three_arguments(args, sample, extra):
    return 0.0


not_callable = 3
