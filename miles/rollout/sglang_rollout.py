"""The published function tree: the default rollout function and the coroutines that plug-ins reuse.

Thin: each name hands over to `loop`, `sample` and `evaluate`. What differs from the class tree
(`miles.rollout.inference_rollout`) is the calling convention: `args` first, one `GenerateState` per process.
"""

from __future__ import annotations

import asyncio
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from miles.rollout import evaluate as _evaluate
from miles.rollout import loop
from miles.rollout import sample as _sample
from miles.rollout import state as _state
from miles.rollout.generate_hub import single_turn
from miles.rollout.loop_thread import run
from miles.rollout.semaphore import Semaphore
from miles.rollout.singleton import SingletonMeta
from miles.types import GenerateFnInput, Group, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample

EVAL_PROMPT_DATASET: _evaluate.DatasetCache = {}


class GenerateState(_state.GenerateState, metaclass=SingletonMeta):
    """One per process: whoever calls first decides its `args`."""

    def __init__(self, args: Namespace) -> None:
        self.dp_counts = [0] * (args.sglang_dp_size or 1)
        self.dp_rank = 0
        self.group_sampling_seeds = (
            [args.rollout_seed + i for i in range(args.n_samples_per_prompt)]
            if args.sglang_enable_deterministic_inference
            else None
        )
        super().__init__(args)

    @property
    def semaphore(self) -> Semaphore:
        return self.generate_fn_semaphore

    def reset(self) -> None:
        super().reset()
        self.remaining_batch_size = 0
        self.pendings: set[asyncio.Task[Group]] = set()

    def submit_generate_tasks(self, samples: list[Group]) -> None:
        self.pendings.update(loop.submit_groups(self, samples))
        self.remaining_batch_size += len(samples)

    @contextmanager
    def dp_rank_context(self) -> Iterator[int]:
        """Choose the least loaded data-parallel rank, at random among equals, for the length of the block."""
        least = min(self.dp_counts)
        rank = random.choice([i for i, count in enumerate(self.dp_counts) if count == least])
        self.dp_counts[rank] += 1
        self.dp_rank = rank
        try:
            yield rank
        finally:
            self.dp_counts[rank] -= 1


def _state_for(args: Namespace) -> _state.GenerateState:
    """The process's state where it was made with these `args`; a state of their own for other `args`."""
    shared = GenerateState(args)
    if shared.args is args:
        return shared
    own = _state.GenerateState(args)
    if args.hf_checkpoint == shared.args.hf_checkpoint:
        own.__dict__["tokenizer"] = shared.tokenizer
    own.generate_fn_semaphore, own.aborted = shared.generate_fn_semaphore, shared.aborted
    return own


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The built-in single-turn generation, for plug-ins that add to it."""
    output = await single_turn.generate(GenerateFnInput(_state_for(args), sample, sampling_params, False))
    assert isinstance(output.samples, Sample)
    return output.samples


async def generate_and_rm(
    args: Namespace, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False
) -> Any:
    return await _sample.generate_and_rm(_state_for(args), sample, sampling_params, evaluation)


async def generate_and_rm_group(
    args: Namespace, group: Group, sampling_params: dict[str, Any], evaluation: bool = False
) -> Group:
    return await _sample.generate_and_rm_group(_state_for(args), group, sampling_params, evaluation)


async def abort(args: Namespace, rollout_id: int) -> list[Group]:
    """Stop the tasks of `GenerateState(args).pendings`; with `--partial-rollout` return their groups."""
    state = GenerateState(args)
    state.aborted = True
    await state.context.client.abort_all()
    groups = list(await asyncio.gather(*state.pendings))
    state.pendings.clear()
    if not args.partial_rollout:
        return []
    loop.mark_started(groups, rollout_id)
    return groups


async def generate_rollout_async(
    args: Namespace, rollout_id: int, data_source: Callable[[int], list[Group]]
) -> tuple[RolloutFnTrainOutput, list[Group]]:
    return await loop.generate_rollout(_state_for(args), rollout_id, data_source)


def load_eval_data(args: Namespace) -> None:
    """Read the evaluation data sets before they are needed. Raises DataError."""
    _evaluate.load_all(_state_for(args), EVAL_PROMPT_DATASET)


async def eval_rollout(args: Namespace, rollout_id: int) -> tuple[RolloutFnEvalOutput, list[Group]]:
    return await _evaluate.evaluate(_state_for(args), EVAL_PROMPT_DATASET), []


async def eval_rollout_single_dataset(args: Namespace, rollout_id: int, dataset_cfg: Any) -> dict[str, dict[str, Any]]:
    return await _evaluate.evaluate_dataset(_state_for(args), dataset_cfg, EVAL_PROMPT_DATASET)


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The default `--rollout-function-path`. Synchronous: it waits for the event loop of this process."""
    assert args.rollout_global_dataset, "--disable-rollout-global-dataset needs a rollout function of your own"
    if evaluation:
        return run(eval_rollout(args, rollout_id))[0]
    output, aborted = run(generate_rollout_async(args, rollout_id, data_source.get_samples))
    loop.give_back(_state_for(args), data_source.add_samples, aborted)
    return output
