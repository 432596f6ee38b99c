"""Plug-ins that fail, each in one way, for test_bad_plug_ins.py."""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch

from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.sglang_rollout import generate_rollout
from miles.types import DynamicFilterOutput, Failure, GenerateFnInput, GenerateFnOutput, Group, Sample

# The sample whose score fails where one alone does, and its group: the second of four samples each.
BAD_SAMPLE = 5


def good(sample: Sample) -> float:
    """A score that differs between the answers to one problem."""
    return sum(map(ord, sample.response)) % 7 / 7


# ---- rewards -------------------------------------------------------------------------------------------------------


def divides(args: Namespace, sample: Sample) -> float:
    return 1 / len(sample.label.strip("0123456789"))  # the line that the card must name


async def returns_none(args: Namespace, sample: Sample) -> None: ...


async def returns_nan(args: Namespace, sample: Sample) -> float:
    return float("nan")


async def returns_inf(args: Namespace, sample: Sample) -> float:
    return float("inf")


async def returns_text(args: Namespace, sample: Sample) -> str:
    return "1.0"


async def returns_dict(args: Namespace, sample: Sample) -> dict[str, float]:
    return {"accuracy": 1.0}


async def returns_too_much(args: Namespace, sample: Sample) -> int:
    return 10**400


async def exits(args: Namespace, sample: Sample) -> float:
    sys.exit(3)


async def cancels_itself(args: Namespace, sample: Sample) -> float:
    raise asyncio.CancelledError


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even its text")


async def unspeakable(args: Namespace, sample: Sample) -> float:
    raise Unspeakable


async def empties_the_sample(args: Namespace, sample: Sample) -> float:
    sample.tokens = []
    return 1.0


async def hangs(args: Namespace, sample: Sample) -> float:
    await asyncio.sleep(600)
    return 1.0


def hangs_in_thread(args: Namespace, sample: Sample) -> float:
    time.sleep(600)
    return 1.0


async def blocks(args: Namespace, sample: Sample) -> float:
    while True:
        time.sleep(0.01)


async def scores(args: Namespace, sample: Sample) -> float:
    return good(sample)


async def one_raises(args: Namespace, sample: Sample) -> float:
    if sample.index == BAD_SAMPLE:
        raise ValueError("no score for this one")
    return good(sample)


async def one_is_none(args: Namespace, sample: Sample) -> float | None:
    return None if sample.index == BAD_SAMPLE else good(sample)


async def one_hangs(args: Namespace, sample: Sample) -> float:
    if sample.index == BAD_SAMPLE:
        await asyncio.sleep(600)
    return good(sample)


async def one_is_zero(args: Namespace, sample: Sample) -> float:
    """What must never happen."""
    return 0.0 if sample.index == BAD_SAMPLE else good(sample)


async def three_of_a_group_raise(args: Namespace, sample: Sample) -> float:
    if sample.group_index == 1 and sample.index % 4 < 3:
        raise ValueError("no score for these")
    return good(sample)


class Flaky:
    """Every sample's first two attempts fail."""

    def __init__(self) -> None:
        self.attempts: dict[int | None, int] = {}

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        self.attempts[sample.index] = self.attempts.get(sample.index, 0) + 1
        if self.attempts[sample.index] < 3:
            raise ConnectionError("the grader is busy")
        return good(sample)


class StateOfFunctions:
    """State that pickle refuses."""

    async def __call__(self, args: Namespace, sample: Sample) -> float:
        return good(sample)

    def state_dict(self) -> dict[str, Any]:
        return {"grade": lambda: 1.0}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StateOfItsOwn(StateOfFunctions):
    """State that pickle takes and a checkpoint, which executes nothing, does not give back."""

    def state_dict(self) -> dict[str, Any]:
        return {"error": Unspeakable()}


class StateThatRaises(StateOfFunctions):
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no state")


class StateThatIsNotTaken(StateOfFunctions):
    def state_dict(self) -> dict[str, Any]:
        return {"scored": 16}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("counted")


# ---- the same by hand: one sample masked, its group's statistics without it ------------------------------------------


def mask_one(args: Namespace, groups: list[Group]) -> None:
    for sample in (s for group in groups for s in group):
        sample.remove_sample = sample.index == BAD_SAMPLE


def statistics_without_one(args: Namespace, samples: list[Sample]) -> tuple[list[Any], list[float]]:
    """GRPO's normalisation with numpy, for groups in order, over all samples but one; that one gets any number."""
    raw = [s.reward for s in samples]
    rewards: list[float] = []
    for start in range(0, len(samples), args.n_samples_per_prompt):
        group = samples[start : start + args.n_samples_per_prompt]
        counted = np.array([s.reward for s in group if s.index != BAD_SAMPLE], dtype=np.float64)
        spread = counted.std(ddof=1)
        rewards += [(s.reward - counted.mean()) / (spread + 1e-6) if spread > 0 else 0.0 for s in group]
    return raw, rewards


def statistics_of_a_smaller_group(args: Namespace, samples: list[Sample]) -> tuple[list[Any], list[float]]:
    """The same where the sample does not count in the mean over its optimizer step, either: 7 instead of 8 samples."""
    raw, rewards = statistics_without_one(args, samples)
    size = args.global_batch_size
    first = (BAD_SAMPLE // size) * size
    return raw, [r * (size / (size - 1) if first <= i < first + size else 1.0) for i, r in enumerate(rewards)]


# ---- generate functions --------------------------------------------------------------------------------------------


def filled(sample: Sample, tokens: list[int], response_length: int = 1, **fields: Any) -> GenerateFnOutput:
    vars(sample).update(tokens=tokens, response_length=response_length, response="x", rollout_log_probs=[-1.0])
    vars(sample).update({"status": Sample.Status.COMPLETED, **fields})
    return GenerateFnOutput(samples=sample)


async def generate_raises(input: GenerateFnInput) -> GenerateFnOutput:
    raise ValueError("the tool is gone")


async def generate_none(input: GenerateFnInput) -> None: ...


async def generate_nothing(input: GenerateFnInput) -> GenerateFnOutput:
    return GenerateFnOutput(samples=[])


async def generate_wrong_length(input: GenerateFnInput) -> GenerateFnOutput:
    return filled(input.sample, [1, 2, 3], response_length=7)


async def generate_unknown_token(input: GenerateFnInput) -> GenerateFnOutput:
    return filled(input.sample, [1, 2, 99_999])


async def generate_nan(input: GenerateFnInput) -> GenerateFnOutput:
    return filled(input.sample, [1, 2, 3], rollout_log_probs=[float("nan")])


async def generate_aborted(input: GenerateFnInput) -> GenerateFnOutput:
    return filled(input.sample, [1, 2, 3], status=Sample.Status.ABORTED)


async def generate_hangs(input: GenerateFnInput) -> GenerateFnOutput:
    await asyncio.sleep(600)
    return GenerateFnOutput(samples=input.sample)


# ---- whole rollouts and data ---------------------------------------------------------------------------------------


def rollout_none(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> None: ...


def rollout_empty(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Any]:
    return []


def rollout_of_dicts(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Any]:
    return [[{"prompt": "1+1=?"}]]


def rollout_too_small(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Group]:
    return generate_rollout(args, rollout_id, data_source).samples[:1]


def rollout_unscored(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Group]:
    groups = generate_rollout(args, rollout_id, data_source).samples
    for sample in (s for group in groups for s in group):
        sample.reward = None
    return groups


class SourceWithoutSamples(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples: int) -> list[Group]:
        return []


class SourceThatRunsDry(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples: int) -> list[Group]:
        return super().get_samples(num_samples) if self.sample_index < 16 else []


class SourceOfSamples(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples: int) -> list[Any]:
        return [s for group in super().get_samples(num_samples) for s in group]


class SourceOfPairs(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples: int) -> list[Group]:
        return [group[:2] for group in super().get_samples(num_samples)]


class SourceThatRaises(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples: int) -> list[Group]:
        raise OSError("the database is gone")


class SourceThatIsNotMade(RolloutDataSourceWithBuffer):
    def __init__(self, args: Namespace) -> None:
        raise OSError("cannot connect")


class SourceThatCannotSave(RolloutDataSourceWithBuffer):
    def save(self, rollout_id: int) -> None:
        raise ValueError("nowhere to save to")


# ---- filters, logging, conversion ----------------------------------------------------------------------------------


class _DropsAtFirst:
    """Drops as many groups as make two warnings, then keeps all."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, args: Namespace, samples: list[Sample]) -> DynamicFilterOutput:
        self.seen += 1
        return DynamicFilterOutput(keep=self.seen > 36, reason="too easy")


drops_at_first = _DropsAtFirst()


def filter_raises(args: Namespace, samples: list[Sample]) -> DynamicFilterOutput:
    raise ValueError("no variance")


def log_raises(rollout_id: int, args: Namespace, samples: list[Sample], extra: Any, seconds: float) -> bool:
    raise ValueError("the logger is gone")


def columns(samples: list[Sample], **changed: Any) -> dict[str, Any]:
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [good(s) for s in samples],
        **changed,
    }


def convert_none(args: Namespace, samples: list[Sample]) -> None: ...


def convert_too_few_tokens(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    return columns(samples, tokens=[s.tokens for s in samples][:3])


def convert_short_masks(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    return columns(samples, loss_masks=[[1] for _ in samples])


def convert_nan(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    return columns(samples, rewards=[float("nan") for _ in samples])


def post_process_short(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    return [1.0], [1.0]


# ---- losses --------------------------------------------------------------------------------------------------------


def loss_of_a_number(args: Namespace, parallel_state: Any, batch: Any, logits: Any, reduce: Any) -> Any:
    return 0.5, {}


def loss_per_token(args: Namespace, parallel_state: Any, batch: Any, logits: Any, reduce: Any) -> Any:
    return logits.sum(-1), {}


def loss_is_nan(args: Namespace, parallel_state: Any, batch: Any, logits: Any, reduce: Any) -> Any:
    return logits.sum() * float("nan"), {"loss": torch.tensor(float("nan"))}


def reducer_of_nothing(total: Any, responses: Any, masks: Any, per_token: bool) -> Any:
    return lambda values: values


def failure_of(sample: Sample) -> Failure | None:
    """What a record keeps of a failed score."""
    return vars(sample).get("failure")
