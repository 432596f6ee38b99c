"""Samples to train batch to micro batch, as pure functions over flat arrays.

    flatten_groups, check_samples,
      trim_rollout                   groups of a rollout -> flat samples that fill whole optimizer steps
    default_rewards, plugin_rewards  rewards -> (raw, trained on)
    to_train_batch                   samples -> TrainBatch      (from_published_dict: a custom conversion's dict)
    split_batch                      TrainBatch -> one shard per data-parallel rank
    step_rows, by_count, by_tokens   shard -> rows per optimizer step -> rows per micro batch
    pack                             rows -> PackedBatch        (put_back: results of micro batches -> batch order)

Nothing here knows of models, plug-ins or processes.
"""

from __future__ import annotations

from miles.batch.check import check_samples
from miles.batch.convert import from_published_dict, to_train_batch, with_failed_rows
from miles.batch.micro import by_count, by_tokens, num_by_tokens, step_rows
from miles.batch.pack import PackedBatch, pack
from miles.batch.ragged import put_back
from miles.batch.rewards import default_rewards, plugin_rewards
from miles.batch.split import rows_per_rank, split_batch
from miles.batch.trim import TrimmedRollout, flatten_groups, trim_rollout
from miles.batch.types import TrainBatch
from miles.batch.view import PublishedView

__all__ = [
    "PackedBatch",
    "PublishedView",
    "TrainBatch",
    "TrimmedRollout",
    "by_count",
    "by_tokens",
    "check_samples",
    "default_rewards",
    "flatten_groups",
    "from_published_dict",
    "num_by_tokens",
    "pack",
    "plugin_rewards",
    "put_back",
    "rows_per_rank",
    "split_batch",
    "step_rows",
    "to_train_batch",
    "trim_rollout",
    "with_failed_rows",
]
