"""Rewards to per-token advantages: one function per estimator, in a table.

An estimator reads `AdvantageInputs` and returns flat advantages and returns over the response tokens of a whole shard.
Whitening over ranks comes after it, and is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.errors import UsageError


@dataclass(frozen=True)
class AdvantageInputs:
    """n samples with R response tokens. Estimators with critics, teachers or KL penalties add the columns they read.

    Example: `AdvantageInputs(rewards=[0.7, -0.7], response_lengths=[3, 2])` is
    `[0.7, 0.7, 0.7, -0.7, -0.7]` under GRPO.
    """

    rewards: Tensor  # float32 [n], after post-processing
    response_lengths: Sequence[int]


@dataclass(frozen=True)
class Advantages:
    """`advantages` weigh the policy gradient, `returns` are what a critic would learn. float32 [R] each."""

    advantages: Tensor
    returns: Tensor


Estimator = Callable[[AdvantageInputs], Advantages]


def reward_of_the_sample(inputs: AdvantageInputs) -> Advantages:
    """Every token of a response gets its reward: GRPO (arXiv:2402.03300) and GSPO (arXiv:2507.18071) with outcome
    rewards, whose baseline is already in the rewards."""
    lengths = torch.tensor(list(inputs.response_lengths), dtype=torch.int64, device=inputs.rewards.device)
    spread = torch.repeat_interleave(inputs.rewards.float(), lengths)
    return Advantages(advantages=spread, returns=spread)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": reward_of_the_sample,
    "gspo": reward_of_the_sample,
}


def compute_advantages(estimator: str, inputs: AdvantageInputs) -> Advantages:
    """The advantages of `--advantage-estimator`."""
    if estimator not in ESTIMATORS:
        raise UsageError(f"--advantage-estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    assert inputs.rewards.shape == (len(inputs.response_lengths),)
    return ESTIMATORS[estimator](inputs)
