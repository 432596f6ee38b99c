"""Evaluation: every prompt of every evaluation data set, `n` samples each, with the data set's own sampling parameters.

The same generate function and reward as in training are used, with `evaluation=True`. Prompts are never shuffled, so
the samples of two evaluations correspond one to one.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.config.evaluation import EvalDatasetConfig
from miles.errors import FlagError
from miles.hooks.values import BadReturn
from miles.rollout.data_source import copy_sample, open_dataset
from miles.rollout.dataset import Dataset
from miles.rollout.sample import flat, generate_and_rm, valid
from miles.rollout.state import GenerateState, compute_sampling_params
from miles.tasks import gather_or_cancel
from miles.types import RolloutFnEvalOutput, Sample

DatasetCache = dict[Any, Dataset]


async def evaluate(state: GenerateState, cache: DatasetCache) -> RolloutFnEvalOutput:
    """All evaluation data sets at once. `cache` keeps their prompts between calls."""
    if state.args.group_rm:
        raise FlagError(
            "--group-rm",
            given="evaluation scores samples one by one.",
            remedy="Leave out --eval-interval, or --group-rm.",
        )
    results = await gather_or_cancel(evaluate_dataset(state, cfg, cache) for cfg in state.args.eval_datasets)
    data: dict[str, dict[str, Any]] = {}
    for result in results:
        data |= result
    return RolloutFnEvalOutput(data=data)


async def evaluate_dataset(
    state: GenerateState, dataset: EvalDatasetConfig, cache: DatasetCache
) -> dict[str, dict[str, Any]]:
    """One data set: `{name: {"rewards": [...], "truncated": [...], "samples": [...], "prompt_indices": [...]}}`.

    All four lists are in the order of the file, one entry per scored sample; `prompt_indices` says which prompt it
    answers, which is what pass@k groups by. Samples without a score (it failed under a tolerant policy, or generation
    was aborted) are left out: they are no zeros.
    """
    prompts = load_prompts(state, dataset, cache)
    base = sampling_params_of(state.args, dataset)
    size = dataset.n_samples_per_eval_prompt or 1
    samples: list[tuple[int, Sample]] = []
    for prompt in prompts.samples:
        for position in range(size):
            sample = copy_sample(prompt)
            sample.index = len(samples)
            sample.metadata = dataset.inject_metadata(sample.metadata)
            samples.append((position, sample))
    produced = await gather_or_cancel(
        generate_and_rm(state, sample, state.params_for(sample, position, base), evaluation=True)
        for position, sample in samples
    )
    scored = [(i, s) for i, entry in enumerate(produced) for s in flat(valid([entry])) if s.reward is not None]
    return {
        dataset.name: {
            "rewards": [_reward(state, s) for _, s in scored],
            "truncated": [s.status == Sample.Status.TRUNCATED for _, s in scored],
            "samples": [s for _, s in scored],
            "prompt_indices": [i // size for i, _ in scored],
        }
    }


def sampling_params_of(args: Namespace, dataset: EvalDatasetConfig) -> dict[str, Any]:
    """The training run's sampling parameters with all that the evaluation set says otherwise."""
    params = compute_sampling_params(
        args,
        temperature=dataset.temperature,
        top_p=dataset.top_p,
        top_k=dataset.top_k,
        max_new_tokens=dataset.max_response_len,
    )
    own = {"stop": dataset.stop, "stop_token_ids": dataset.stop_token_ids, "min_new_tokens": dataset.min_new_tokens}
    return {**params, **{name: value for name, value in own.items() if value is not None}}


def _reward(state: GenerateState, sample: Sample) -> Any:
    """The number that counts in evaluation. Raises HookError where a dict has none under the key."""
    key = state.args.eval_reward_key or state.args.reward_key
    if not key:
        return sample.reward
    if not isinstance(sample.reward, dict) or key not in sample.reward:
        given = ", ".join(map(repr, sample.reward)) if isinstance(sample.reward, dict) else repr(sample.reward)
        problem = BadReturn("type", f"returned no {key!r}, which --eval-reward-key names, but {given}")
        state.context.reward(state.args).reject(problem, state.args, sample, sample=sample)
    return sample.reward[key]


def load_all(state: GenerateState, cache: DatasetCache) -> None:
    """Read every evaluation data set now, so that what is wrong with one is said before any training."""
    for dataset in state.args.eval_datasets:
        load_prompts(state, dataset, cache)


def load_prompts(state: GenerateState, dataset: EvalDatasetConfig, cache: DatasetCache) -> Dataset:
    args: Namespace = state.args
    key = (*dataset.cache_key, args.hf_checkpoint, args.apply_chat_template)
    if key not in cache:
        cache[key] = open_dataset(
            args,
            dataset.path,
            state.tokenizer,
            state.processor,
            max_length=args.eval_max_prompt_len,
            prompt_key=dataset.input_key,
            label_key=dataset.label_key,
            metadata_key=dataset.metadata_key,
            tool_key=dataset.tool_key,
        )
    return cache[key]
