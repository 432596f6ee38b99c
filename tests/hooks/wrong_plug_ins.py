"""One good plug-in per plug point, and what makes a wrong one of it; the table of both is `wrong_during_run`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from hooks_helpers import answered
from hooks_stage import PER_PROMPT, PROMPTS

from miles.types import DynamicFilterOutput, Group, Sample

# ---- good ones, with the published signatures ------------------------------------------------------------------------


def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> list[Group]:
    groups = data_source.get_samples(PROMPTS)
    return [[answered(s.index, group_index=s.group_index, reward=s.index % 2) for s in g] for g in groups]


def evaluate(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> dict[str, Any]:
    samples = [answered(i, reward=1.0) for i in range(2)]
    return {"held": {"rewards": [1.0, 0.0], "truncated": [False, False], "samples": samples}}


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.tokens, sample.response, sample.response_length = [6, 7, 8, 9], "89", 2
    sample.rollout_log_probs, sample.status = [-0.5, -0.5], Sample.Status.COMPLETED
    return sample


async def score(args: Namespace, sample: Sample) -> float:
    return float((sample.index or 0) % 2)


def keep(args: Namespace, samples: list[Sample]) -> DynamicFilterOutput:
    return DynamicFilterOutput(keep=True)


def take(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    return [buffer.pop() for _ in range(min(len(buffer), num_samples))]


def mark(args: Namespace, samples: list[list[Sample]]) -> None: ...


def look(args: Namespace, all_groups: list[list[Sample]], get_samples: Any) -> None: ...


def process(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    return [s.reward for s in samples], [2.0 * s.reward for s in samples]


def convert(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [float(s.index or 0) for s in samples],
    }


def log(rollout_id: int, args: Namespace, samples: Any, rollout_extra_metrics: Any, rollout_time: float) -> bool:
    return False


def log_eval(rollout_id: int, args: Namespace, data: Any, extra_metrics: Any) -> bool:
    return False


class Prompts:
    """A data source; its subclasses spoil one method."""

    def __init__(self, args: Namespace) -> None:
        self.next = 0

    def get_samples(self, num_samples: int) -> Any:
        return [self.group() for _ in range(num_samples)]

    def group(self) -> Group:
        first, self.next = self.next, self.next + PER_PROMPT
        return [Sample(group_index=first, index=first + i, prompt="1+1=?", label="2") for i in range(PER_PROMPT)]

    def add_samples(self, samples: list[Group]) -> None: ...

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...


def prompts(get_samples: Callable[[Prompts, int], Any]) -> type[Prompts]:
    """A data source whose `get_samples` is that function."""
    return type("Spoilt", (Prompts,), {"get_samples": get_samples, "__module__": __name__})


class Middleware:
    def __init__(self, app: Any, *, router: Any) -> None:
        self.app, self.router = app, router


async def agent(base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None: ...


async def execute(name: str, params: dict[str, Any]) -> str:
    return "done"


def post(args: Namespace, rollout_id: int, rollout_data: Any) -> None: ...


def loss(args: Namespace, parallel_state: Any, batch: Any, logits: torch.Tensor, sum_of_sample_mean: Any) -> Any:
    return logits.sum() * 1e-3, {"mine": torch.tensor(1.0)}


def tis(
    args: Namespace, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, total_lengths: Any,
    response_lengths: Any, parallel_state: Any,
) -> Any:  # fmt: skip
    return pg_loss, loss_masks, {}


def reducer(total_lengths: Any, response_lengths: Any, loss_masks: Any, calculate_per_token_loss: bool = False) -> Any:
    return lambda values: values.sum()


def init(args: Namespace) -> None: ...


def before_log_prob(args: Namespace, model: Any, store_prefix: str) -> None: ...


def before_step(
    args: Namespace, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None: ...


def post_save(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None: ...


def provider(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
    return torch.nn.Linear(1, 1)


GOOD: dict[str, Any] = {
    "rollout_function": rollout,
    "eval_function": evaluate,
    "custom_generate_function": generate,
    "custom_rm": score,
    "dynamic_sampling_filter": keep,
    "buffer_filter": take,
    "rollout_sample_filter": mark,
    "rollout_all_samples_process": look,
    "custom_reward_post_process": process,
    "custom_convert_samples_to_train_data": convert,
    "custom_rollout_log_function": log,
    "custom_eval_rollout_log_function": log_eval,
    "data_source": Prompts,
    "miles_router_middleware": Middleware,
    "custom_agent_function": agent,
    "generate_tool_specs": [{"type": "function", "function": {"name": "add"}}],
    "generate_execute_tool_function": execute,
    "rollout_data_postprocess": post,
    "custom_loss_function": loss,
    "custom_tis_function": tis,
    "custom_pg_loss_reducer_function": reducer,
    "custom_megatron_init": init,
    "custom_megatron_before_log_prob_hook": before_log_prob,
    "custom_megatron_before_train_step_hook": before_step,
    "custom_megatron_post_save_hook": post_save,
    "custom_model_provider": provider,
}

# ---- what makes a wrong one ------------------------------------------------------------------------------------------


def returning(good: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`good`, but what it returns goes through `change`."""

    @functools.wraps(good)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return change(await good(*args, **kwargs))

    @functools.wraps(good)
    def inline(*args: Any, **kwargs: Any) -> Any:
        return change(good(*args, **kwargs))

    return awaited if inspect.iscoroutinefunction(good) else inline


def first(good: Callable[..., Any], spoil: Callable[..., Any]) -> Callable[..., Any]:
    """`good`, after `spoil` has had the same arguments."""

    @functools.wraps(good)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        spoil(*args, **kwargs)
        return await good(*args, **kwargs)

    @functools.wraps(good)
    def inline(*args: Any, **kwargs: Any) -> Any:
        spoil(*args, **kwargs)
        return good(*args, **kwargs)

    return awaited if inspect.iscoroutinefunction(good) else inline


def failing_second_call(good: Any) -> Any:
    """`good`, whose second call raises."""
    calls = count(1)

    def raises(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise ValueError("the second call")

    if inspect.isclass(good):
        return prompts(first(Prompts.get_samples, raises))
    return first(good, raises)


def never_returning(good: Any) -> Any:
    """`good`, but it waits for what never comes: awaiting where it is async, else in a loop of Python's."""

    @functools.wraps(good)
    async def awaits(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(600)

    @functools.wraps(good)
    def loops(*args: Any, **kwargs: Any) -> Any:
        while True:
            time.sleep(0.005)

    return awaits if inspect.iscoroutinefunction(good) else loops
