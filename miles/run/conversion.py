"""Flat samples to one train batch, through the plug points of that step.

A custom conversion replaces everything; otherwise rewards are post-processed (plug-in or default) and the default
conversion follows. Samples whose score failed are shown to no plug-in; they keep their places in the batch with
an empty loss mask, so that a failed score never costs its neighbours their training. Under the policy `drop` the place
does not count in the mean over an optimizer step.
"""

from __future__ import annotations

from argparse import Namespace

import numpy as np

from miles.batch import (
    TrainBatch,
    default_rewards,
    from_published_dict,
    plugin_rewards,
    to_train_batch,
    with_failed_rows,
)
from miles.config import RunConfig
from miles.hooks import Hooks
from miles.types import Sample, is_dropped, is_failed


def convert(config: RunConfig, args: Namespace, hooks: Hooks, samples: list[Sample]) -> TrainBatch:
    """`samples` fill whole optimizer steps."""
    batch = _converted(config, args, hooks, samples)
    dropped = [is_dropped(s) for s in samples if is_failed(s)]
    if any(dropped):
        batch.dropped = np.zeros(len(batch), dtype=np.bool_)
        batch.dropped[batch.failed] = dropped
    return batch


def convert_held_out(samples: list[Sample]) -> TrainBatch:
    """Conversations of an evaluation: nothing but tokens and masks counts, and no plug-in has a part in it."""
    return to_train_batch(samples, [None] * len(samples), np.zeros(len(samples), dtype=np.float32))


def _converted(config: RunConfig, args: Namespace, hooks: Hooks, samples: list[Sample]) -> TrainBatch:
    custom = hooks.custom_convert_samples_to_train_data
    if custom is not None:
        failed = [is_failed(s) for s in samples]
        shown = [s for s, bad in zip(samples, failed) if not bad]
        return with_failed_rows(from_published_dict(custom(args, shown)), failed)
    post_process = hooks.custom_reward_post_process
    if post_process is not None:
        raw, rewards = plugin_rewards(samples, lambda scored: post_process(args, scored))
    else:
        raw, rewards = default_rewards(
            samples,
            reward_key=config.reward.reward_key,
            estimator=config.algorithm.advantage_estimator,
            normalization=config.algorithm.rewards_normalization,
            std_normalization=config.algorithm.grpo_std_normalization,
            n_samples_per_prompt=config.data.n_samples_per_prompt,
        )
    return to_train_batch(samples, raw, rewards)
