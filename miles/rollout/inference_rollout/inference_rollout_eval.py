"""Published name of the evaluation of one data set; the work is in `miles.rollout.evaluate`."""

from __future__ import annotations

from typing import Any

from miles.config.evaluation import EvalDatasetConfig
from miles.rollout.evaluate import DatasetCache, evaluate_dataset
from miles.rollout.state import GenerateState

__all__ = ["eval_rollout_single_dataset"]


async def eval_rollout_single_dataset(
    state: GenerateState, dataset_cfg: EvalDatasetConfig, prompt_dataset_cache: DatasetCache
) -> dict[str, dict[str, Any]]:
    """`{name: {"rewards": [...], "truncated": [...], "samples": [...]}}`."""
    return await evaluate_dataset(state, dataset_cfg, prompt_dataset_cache)
