"""What the advantage estimators read, taken from a shard: rewards, old log-probs, a teacher's log-probs.

The estimators themselves are `miles.loss.advantages`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.batch import TrainBatch
from miles.errors import UsageError
from miles.hooks.values import kind_of
from miles.loss.advantages import FROM_A_TEACHER, AdvantageInputs
from miles.loss.types import LossSettings

NO_ROLLOUT_LOG_PROBS = (
    "the samples have no rollout_log_probs. Let your generate function set sample.rollout_log_probs, one float per "
    "response token, on every sample."
)


def advantage_inputs(shard: TrainBatch, settings: LossSettings) -> AdvantageInputs:
    """UsageError where the shard lacks what `--advantage-estimator` needs."""
    lengths = shard.response_lengths.tolist()
    own = "rollout_log_probs" if settings.use_rollout_logprobs else "log_probs"
    columns = shard.flat_columns()
    if settings.advantage_estimator in FROM_A_TEACHER:
        if own not in columns:
            raise UsageError(f"--use-rollout-logprobs: {NO_ROLLOUT_LOG_PROBS}")
        return AdvantageInputs(None, lengths, old_log_probs=columns[own], teacher_log_probs=teacher_column(shard))
    if not isinstance(shard.rewards, np.ndarray):
        raise UsageError(
            f"--advantage-estimator {settings.advantage_estimator}: expected one number per sample as reward, "
            f"got {_what_is_there(shard.rewards)}. Let the reward post-processing return "
            "numbers, or give --disable-compute-advantages-and-returns."
        )
    if settings.kl_coef and "ref_log_probs" in columns and own not in columns:
        raise UsageError(f"--kl-coef {settings.kl_coef}: {NO_ROLLOUT_LOG_PROBS}")
    return AdvantageInputs(
        torch.from_numpy(shard.rewards),
        lengths,
        loss_mask=torch.from_numpy(shard.loss_masks),
        settings=settings,
        old_log_probs=columns.get(own),
        ref_log_probs=columns.get("ref_log_probs"),
        values=columns.get("values"),
    )


def _what_is_there(rewards: Any) -> str:
    """What stands where numbers were expected: `none`, or the first entry, such as `a Tensor of shape (36,)`."""
    if rewards is None:
        return "none"
    first = rewards[0] if len(rewards) else rewards
    return kind_of(first) + (f" of shape {tuple(np.shape(first))}" if np.ndim(first) else "")


def teacher_column(shard: TrainBatch) -> Tensor:
    """float32 [R]: the teacher's log-probs of the response tokens; 0 where nothing is trained and none are known.

    A row may hold more entries than the response has tokens (those of the prompt, too): the last ones are meant.
    """
    rows = shard.teacher_log_probs
    if rows is None:
        raise UsageError(
            "--advantage-estimator on_policy_distillation: the samples have no teacher_log_probs. Let "
            "--custom-reward-post-process-path set sample.teacher_log_probs, one float per response token, on every "
            "sample."
        )
    flat = torch.zeros(len(shard.loss_masks), dtype=torch.float32)
    for row, begin, end in zip(range(len(rows)), shard.response_offsets[:-1], shard.response_offsets[1:]):
        if rows[row] is None or begin == end:
            continue
        values = _numbers(rows[row])
        if values is None or len(values) < end - begin:
            found = "something else" if values is None else f"{len(values)} entries"
            raise UsageError(
                f"teacher_log_probs of {shard.name_of(row)}: expected one number for each of its {end - begin} "
                f"response tokens, got {found}."
            )
        flat[begin:end] = values[len(values) - (end - begin) :]
    trained = torch.from_numpy(shard.loss_masks) != 0
    wrong = torch.nonzero(~flat.isfinite() & trained)
    if len(wrong):
        row = int(np.searchsorted(shard.response_offsets, int(wrong[0]), side="right")) - 1
        raise UsageError(
            f"teacher_log_probs of {shard.name_of(row)} is {float(flat[wrong[0]])} at response token "
            f"{int(wrong[0]) - int(shard.response_offsets[row])}. Expected a finite number wherever the loss mask is 1."
        )
    return flat.masked_fill(~flat.isfinite(), 0.0)


def _numbers(row: Any) -> Tensor | None:
    """A row of numbers as float32 [n]; None for what is none."""
    try:
        values = torch.as_tensor(row, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    return values if values.dim() == 1 else None
