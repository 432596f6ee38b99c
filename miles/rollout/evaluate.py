"""Evaluation: every prompt of every evaluation data set, `n` samples each, with the data set's own sampling parameters.

The same generate function and reward as in training are used, with `evaluation=True`. Prompts are never shuffled, so
the samples of two evaluations correspond one to one.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from miles.config.evaluation import EvalDatasetConfig
from miles.errors import FlagError
from miles.rollout import limits
from miles.rollout.dataset import Dataset
from miles.rollout.sample import gather_or_cancel, generate_and_rm
from miles.rollout.state import GenerateState, compute_sampling_params
from miles.types import RolloutFnEvalOutput, Sample, is_failed

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
    """One data set: `{name: {"rewards": [...], "truncated": [...], "samples": [...]}}`, in the order of the file.

    Samples whose score failed under a tolerant policy are left out of `rewards`: they are no zeros.
    """
    args = state.args
    prompts = load_prompts(state, dataset, cache)
    base = compute_sampling_params(
        args,
        temperature=dataset.temperature,
        top_p=dataset.top_p,
        top_k=dataset.top_k,
        max_new_tokens=dataset.max_response_len,
    )
    samples: list[tuple[int, Sample]] = []
    for prompt in prompts.samples:
        for position in range(dataset.n_samples_per_eval_prompt):
            sample = copy.deepcopy(prompt)
            sample.index = len(samples)
            sample.metadata = dataset.inject_metadata(prompt.metadata)
            samples.append((position, sample))
    produced = await gather_or_cancel(
        generate_and_rm(state, sample, state.params_for(sample, position, base), evaluation=True)
        for position, sample in samples
    )
    flat = [s for entry in produced for s in (entry if isinstance(entry, list) else [entry])]
    scored = [s for s in flat if not is_failed(s)]
    key = args.eval_reward_key or args.reward_key
    return {
        dataset.name: {
            "rewards": [s.reward[key] if key else s.reward for s in scored],
            "truncated": [s.status == Sample.Status.TRUNCATED for s in scored],
            "samples": scored,
        }
    }


def load_all(state: GenerateState, cache: DatasetCache) -> None:
    """Read every evaluation data set now, so that what is wrong with one is said before any training."""
    for dataset in state.args.eval_datasets:
        load_prompts(state, dataset, cache)


def load_prompts(state: GenerateState, dataset: EvalDatasetConfig, cache: DatasetCache) -> Dataset:
    args: Namespace = state.args
    key = (*dataset.cache_key, args.hf_checkpoint, args.apply_chat_template)
    if key not in cache:
        cache[key] = Dataset(
            dataset.path,
            tokenizer=state.tokenizer,
            processor=state.processor,
            max_length=args.eval_max_prompt_len,
            prompt_key=dataset.input_key,
            label_key=dataset.label_key,
            multimodal_keys=args.multimodal_keys,
            metadata_key=dataset.metadata_key,
            tool_key=dataset.tool_key,
            apply_chat_template=args.apply_chat_template,
            apply_chat_template_kwargs=args.apply_chat_template_kwargs,
            context_length=limits.for_prompts_of(args),
        )
    return cache[key]
