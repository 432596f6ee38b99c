"""One plug-in for every plug point that a run calls, each noting its call, for the test of the whole order."""

from __future__ import annotations

import threading
from argparse import Namespace
from typing import Any

import torch

from miles.rollout.data_source import RolloutDataSourceWithBuffer, pop_first
from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn
from miles.rollout.sglang_rollout import generate as built_in_generate
from miles.rollout.sglang_rollout import generate_rollout
from miles.types import DynamicFilterOutput, Sample

# (plug point, what it was about, thread)
CALLS: list[tuple[str, Any, str]] = []


def note(point: str, about: Any = None) -> None:
    CALLS.append((point, about, threading.current_thread().name))


def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    note("eval_function" if evaluation else "rollout_function", rollout_id)
    if rollout_id == 1 and not evaluation:
        data_source.add_samples(data_source.get_samples(1))
    return generate_rollout(args, rollout_id, data_source, evaluation=evaluation)


class Rollout(InferenceRolloutFn):
    def __init__(self, input: Any) -> None:
        note("rollout_function", "built")
        super().__init__(input)

    async def __call__(self, input: Any) -> Any:
        note("eval_function" if input.evaluation else "rollout_function", input.rollout_id)
        return await super().__call__(input)


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    note("custom_generate_function", sample.index)
    return await built_in_generate(args, sample, sampling_params)


async def reward(args: Namespace, sample: Sample) -> float:
    note("custom_rm", sample.index)
    return float((sample.index or 0) % 2)


def dynamic_filter(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    note("dynamic_sampling_filter", samples[0].group_index)
    return DynamicFilterOutput(keep=True)


def buffer_filter(args: Namespace, rollout_id: int | None, buffer: list[Any], num_samples: int) -> list[Any]:
    note("buffer_filter", num_samples)
    return pop_first(args, rollout_id, buffer, num_samples)


def sample_filter(args: Namespace, groups: list[list[Sample]]) -> None:
    note("rollout_sample_filter", len(groups))


def all_samples(args: Namespace, groups: list[list[Sample]], get_samples: Any) -> None:
    note("rollout_all_samples_process", len(groups))


def log(rollout_id: int, args: Namespace, samples: Any, metrics: Any, seconds: float) -> bool:
    note("custom_rollout_log_function", rollout_id)
    return False


def log_eval(rollout_id: int, args: Namespace, data: Any, metrics: Any) -> bool:
    note("custom_eval_rollout_log_function", rollout_id)
    return False


def post_process(args: Namespace, samples: list[Sample]) -> Any:
    note("custom_reward_post_process", len(samples))
    rewards = [s.reward for s in samples]
    return rewards, [r - 0.5 for r in rewards]


def convert(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    note("custom_convert_samples_to_train_data", len(samples))
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [s.reward - 0.5 for s in samples],
        "rollout_log_probs": [s.rollout_log_probs for s in samples],
    }


class Source(RolloutDataSourceWithBuffer):
    def __init__(self, args: Namespace) -> None:
        note("data_source", "built")
        super().__init__(args)

    def get_samples(self, num_samples: int) -> list[Any]:
        note("data_source", ("get", num_samples))
        return super().get_samples(num_samples)

    def add_samples(self, samples: list[Any]) -> None:
        note("data_source", ("add", len(samples)))
        super().add_samples(samples)

    def save(self, rollout_id: int) -> None:
        note("data_source", ("save", rollout_id))
        super().save(rollout_id)

    def load(self, rollout_id: int | None = None) -> None:
        note("data_source", ("load", rollout_id))
        super().load(rollout_id)


def data_postprocess(args: Namespace, rollout_id: int, rollout_data: Any) -> None:
    note("rollout_data_postprocess", rollout_id)


def tis(**given: Any) -> Any:
    note("custom_tis_function", len(given["loss_masks"]))
    return given["pg_loss"], given["loss_masks"], {}


def reducer(total_lengths: Any, response_lengths: Any, loss_masks: Any, calculate_per_token_loss: bool) -> Any:
    note("custom_pg_loss_reducer_function", len(loss_masks))
    return lambda values: values.sum()


def loss(args: Namespace, parallel_state: Any, batch: Any, logits: torch.Tensor, sum_of_sample_mean: Any) -> Any:
    note("custom_loss_function", len(batch["loss_masks"]))
    return logits.sum() * 1e-6, {"mine": 1.0}
