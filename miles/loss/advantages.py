"""Rewards, or a teacher's log-probs, to per-token advantages: one function per estimator, in a table.

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
    """n samples with R response tokens. What an estimator does not read may be None.

    Example: `AdvantageInputs(rewards=[0.7, -0.7], response_lengths=[3, 2])` is
    `[0.7, 0.7, 0.7, -0.7, -0.7]` under GRPO.
    """

    rewards: Tensor | None  # float32 [n], after post-processing
    response_lengths: Sequence[int]
    old_log_probs: Tensor | None = None  # float32 [R], of the policy that is trained, before the rollout's first step
    teacher_log_probs: Tensor | None = None  # float32 [R]


@dataclass(frozen=True)
class Advantages:
    """`advantages` weigh the policy gradient, `returns` are what a critic would learn. float32 [R] each."""

    advantages: Tensor
    returns: Tensor


Estimator = Callable[[AdvantageInputs], Advantages]


def reward_of_the_sample(inputs: AdvantageInputs) -> Advantages:
    """Every token of a response gets its reward: GRPO (arXiv:2402.03300) and GSPO (arXiv:2507.18071) with outcome
    rewards, whose baseline is already in the rewards."""
    assert inputs.rewards is not None and inputs.rewards.shape == (len(inputs.response_lengths),)
    lengths = torch.tensor(list(inputs.response_lengths), dtype=torch.int64, device=inputs.rewards.device)
    spread = torch.repeat_interleave(inputs.rewards.float(), lengths)
    return Advantages(advantages=spread, returns=spread)


def log_ratio_to_the_teacher(inputs: AdvantageInputs) -> Advantages:
    """log pi_teacher - log pi of each sampled token: the policy gradient of the reverse KL to the teacher, with a
    discount of 0 (Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649; Lu et al., "On-Policy
    Distillation", Thinking Machines Lab, 2025). Rewards are not read."""
    assert inputs.teacher_log_probs is not None and inputs.old_log_probs is not None
    ratio = inputs.teacher_log_probs - inputs.old_log_probs
    return Advantages(advantages=ratio, returns=ratio)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": reward_of_the_sample,
    "gspo": reward_of_the_sample,
    "on_policy_distillation": log_ratio_to_the_teacher,
}

FROM_A_TEACHER = frozenset({"on_policy_distillation"})
"""Estimators that read `old_log_probs` and `teacher_log_probs`, and no rewards."""


def compute_advantages(estimator: str, inputs: AdvantageInputs) -> Advantages:
    """The advantages of `--advantage-estimator`."""
    if estimator not in ESTIMATORS:
        raise UsageError(f"--advantage-estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    return ESTIMATORS[estimator](inputs)
