"""Rewards to the numbers that are trained on: the default post-processing, and the door for a plug-in's own.

Both return `(raw, rewards)`: what the reward function said (a list, None for a failed score), and what advantages are
made of. A failed score is 0 in `rewards`, takes part in no mean and no standard deviation, and is shown to no plug-in.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.batch.columns import numbers_or_list, one_per_row
from miles.batch.ragged import FloatArray, IntArray, shown
from miles.batch.types import row_name
from miles.errors import UsageError
from miles.types import Sample, is_failed

# Estimators whose rewards are centred per group, those that divide by the group's standard deviation as well, and those
# whose baseline leaves the sample itself out.
CENTRED = frozenset({"grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"})
SCALED = frozenset({"grpo", "gspo", "cispo"})
LEFT_OUT = frozenset({"rloo"})

# Keeps the division finite where a group's rewards are almost equal.
STD_EPSILON = 1e-6

RewardPostProcess = Callable[[list[Sample]], tuple[Sequence[Any], Sequence[Any]]]


def default_rewards(
    samples: Sequence[Sample],
    *,
    reward_key: str | None,
    estimator: str,
    normalization: bool,
    std_normalization: bool,
    n_samples_per_prompt: int,
) -> tuple[list[Any], FloatArray]:
    """The default post-processing: raw rewards, and float32 [N] normalised per group where the estimator asks for it.

    UsageError names the first sample whose reward is no finite number.
    """
    failed = np.fromiter(map(is_failed, samples), dtype=np.bool_, count=len(samples))
    numbers = np.zeros(len(samples), dtype=np.float64)
    raw: list[Any] = [None] * len(samples)
    for i, sample in enumerate(samples):
        if not failed[i]:
            raw[i] = raw_reward_of(i, sample, reward_key)
            numbers[i] = number(i, sample, raw[i])
    if not normalization or estimator not in CENTRED:
        return raw, numbers.astype(np.float32)
    groups = group_ids([sample.group_index for sample in samples], n_samples_per_prompt)
    return raw, normalize(
        numbers,
        groups,
        failed,
        scale=std_normalization and estimator in SCALED,
        lone_is_raw=n_samples_per_prompt == 1,
        leave_one_out=estimator in LEFT_OUT,
    )


def plugin_rewards(
    samples: Sequence[Sample], post_process: RewardPostProcess
) -> tuple[list[Any], FloatArray | list[Any]]:
    """`--custom-reward-post-process-path` over the samples that have a score; failed ones get None and 0."""
    failed = [is_failed(sample) for sample in samples]
    scored = [sample for sample, bad in zip(samples, failed) if not bad]
    result = post_process(scored)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise UsageError(
            f"--custom-reward-post-process-path: expected a pair (raw_rewards, rewards), got {shown(result)}."
        )
    flag = "--custom-reward-post-process-path"
    raw_scored = iter(one_per_row(f"{flag}: raw_rewards", result[0], len(scored)))
    rewards_scored = iter(one_per_row(f"{flag}: rewards", result[1], len(scored)))
    raw = [None if bad else next(raw_scored) for bad in failed]
    rewards = numbers_or_list("rewards", [0.0 if bad else next(rewards_scored) for bad in failed], len(samples))
    if isinstance(rewards, np.ndarray) and not np.isfinite(rewards).all():
        row = int(np.argmin(np.isfinite(rewards)))
        raise UsageError(
            f"{flag}: the reward of {row_name(row, samples[row].index)} is {rewards[row]}. Expected a finite number."
        )
    return raw, rewards


def raw_reward_of(row: int, sample: Sample, reward_key: str | None) -> Any:
    try:
        return sample.get_reward_value(Namespace(reward_key=reward_key))
    except (KeyError, TypeError, IndexError):
        raise UsageError(
            f"--reward-key {reward_key}: the reward of {row_name(row, sample.index)} is {shown(sample.reward)}. "
            f"Expected a dict with the key {reward_key!r}."
        ) from None


def number(row: int, sample: Sample, value: Any) -> float:
    """A reward as a float; anything that is not one finite number is the reward function's mistake."""
    hint = " Name the entry to train on with --reward-key." if isinstance(value, dict) else ""
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        result = float("nan")
    if isinstance(value, str | bytes) or not np.isfinite(result):
        raise UsageError(
            f"The reward of {row_name(row, sample.index)} is {shown(value)}. Expected a finite number.{hint}"
        )
    return result


def group_ids(group_index: Sequence[Any], n_samples_per_prompt: int) -> IntArray:
    """Which group each sample belongs to, as int64 [N] counted from 0.

    Samples with equal `group_index` belong together, wherever they stand. Samples without one are taken
    `n_samples_per_prompt` at a time, in order.
    """
    ids = np.empty(len(group_index), dtype=np.int64)
    known: dict[Any, int] = {}
    unnamed = 0
    for i, index in enumerate(group_index):
        key: Any = ("index", index)
        if index is None:
            key = ("position", unnamed // n_samples_per_prompt)
            unnamed += 1
        ids[i] = known.setdefault(key, len(known))
    return ids


def normalize(
    numbers: npt.NDArray[np.float64],
    groups: IntArray,
    failed: npt.NDArray[np.bool_],
    *,
    scale: bool,
    lone_is_raw: bool,
    leave_one_out: bool = False,
) -> FloatArray:
    """GRPO's group normalisation (arXiv:2402.03300, section 4.1): (r - mean) / (std + 1e-6), unbiased std.

    With `leave_one_out` (RLOO, arXiv:2402.14740) the mean is that of the others: r_i - mean of r_j over j != i, which
    is (r_i - mean) n / (n - 1) for the n samples that are not failed.

    Mean and std are taken over the group's samples that are not failed. Equal rewards give exactly 0. A group of one
    has no baseline and no spread: it gives 0, as nothing can be learned from a comparison that is not there. With
    `lone_is_raw` (one sample per prompt by choice, so that no comparison was wanted) a group of one keeps its reward.
    """
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    valid = ~failed
    weights = valid.astype(np.float64)
    counts = np.bincount(groups, weights, num_groups)
    sizes = np.bincount(groups, minlength=num_groups)
    means = np.bincount(groups, numbers * weights, num_groups) / np.maximum(counts, 1)
    centred = (numbers - means[groups]) * weights
    lowest, highest = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(lowest, groups[valid], numbers[valid])
    np.maximum.at(highest, groups[valid], numbers[valid])
    centred[(lowest == highest)[groups]] = 0.0
    if leave_one_out:
        centred *= (counts / np.maximum(counts - 1, 1))[groups]
    if scale:
        variances = np.bincount(groups, centred**2, num_groups) / np.maximum(counts - 1, 1)
        centred /= np.sqrt(variances)[groups] + STD_EPSILON
    if lone_is_raw:
        alone = (sizes == 1)[groups] & valid
        centred[alone] = numbers[alone]
    return centred.astype(np.float32)
