"""What estimators read from a shard: a teacher's log-probs in every form that plug-ins give, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miles.batch import TrainBatch, from_published_dict
from miles.errors import UsageError
from miles.loss.types import LossSettings
from miles.trainer.advantages import advantage_inputs, teacher_column
from miles.trainer.report import column_sums, means_of

DISTILL = LossSettings(advantage_estimator="on_policy_distillation")
NAN = float("nan")


def shard(teacher: Any, masks: list[list[int]] | None = None, **more: Any) -> TrainBatch:
    """Responses of two, none and three tokens."""
    data = {
        "tokens": [[1, 2, 3], [4], [5, 6, 7, 8]],
        "response_lengths": [2, 0, 3],
        "loss_masks": masks or [[1, 1], [], [1, 1, 1]],
        "sample_indices": [20, 21, 22],
        "teacher_log_probs": teacher,
        **more,
    }
    return from_published_dict({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize(
    "teacher",
    [
        [[-1.0, -2.0], [], [-3.0, -4.0, -5.0]],
        [torch.tensor([-1.0, -2.0]), torch.empty(0), torch.tensor([-3.0, -4.0, -5.0])],
        [np.array([-1.0, -2.0]), [], (-3, -4, -5)],
        [[-9.0, -1.0, -2.0], [-9.0], [-9.0, -3.0, -4.0, -5.0]],  # with the prompt's entries: the last ones count
        [torch.tensor([-1.0, -2.0], requires_grad=True), None, [-3.0, -4.0, -5.0]],
    ],
)
def test_forms_of_a_teacher_column(teacher: Any) -> None:
    assert teacher_column(shard(teacher)).tolist() == [-1, -2, -3, -4, -5]


def test_what_is_not_trained_may_be_anything() -> None:
    batch = shard([[NAN, -2.0], [], [-3.0, None, -5.0]], masks=[[0, 1], [], [1, 0, 1]])
    with pytest.raises(UsageError, match="sample 22: expected one number for each of its 3 response tokens"):
        teacher_column(batch)
    batch = shard([[NAN, -2.0], [], [-3.0, -np.inf, -5.0]], masks=[[0, 1], [], [1, 0, 1]])
    assert teacher_column(batch).tolist() == [0, -2, -3, 0, -5]
    with pytest.raises(UsageError, match="sample 22 is -inf at response token 1"):
        teacher_column(shard([[-1.0, -2.0], [], [-3.0, -np.inf, -5.0]]))


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (None, "the samples have no teacher_log_probs. Let --custom-reward-post-process-path set"),
        ([[-1.0], [], [-1.0] * 3], "sample 20: expected one number for each of its 2 response tokens, got 1 entries"),
        ([["a", "b"], [], [-1.0] * 3], "sample 20: expected .*, got something else"),
        ([[[-1.0], [-2.0]], [], [-1.0] * 3], "sample 20: expected .*, got something else"),
        ([-1.0, [], [-1.0] * 3], "sample 20: expected .*, got something else"),
    ],
)
def test_wrong_teachers(teacher: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        teacher_column(shard(teacher))


def test_the_student_is_the_trainer_or_the_engine() -> None:
    teacher = [[-1.0, -1.0], [], [-1.0, -1.0, -1.0]]
    batch = shard(teacher, rollout_log_probs=[[-2.0, -2.0], [], [-2.0] * 3])
    batch.response_columns["log_probs"] = torch.full((5,), -3.0)
    own = advantage_inputs(batch, DISTILL)
    assert own.rewards is None and own.old_log_probs is not None and own.old_log_probs.tolist() == [-3.0] * 5
    engine = LossSettings(advantage_estimator="on_policy_distillation", use_rollout_logprobs=True)
    theirs = advantage_inputs(batch, engine)
    assert theirs.old_log_probs is not None and theirs.old_log_probs.tolist() == [-2.0] * 5
    with pytest.raises(UsageError, match="--use-rollout-logprobs: the samples have no rollout_log_probs"):
        advantage_inputs(shard(teacher), engine)


def test_rewards_are_needed_by_the_others() -> None:
    with pytest.raises(UsageError, match="--advantage-estimator grpo: expected one number per sample"):
        advantage_inputs(shard([[-1.0, -1.0], [], [-1.0] * 3]), LossSettings())
    per_token = shard(None, rewards=[torch.ones(2), torch.ones(0), torch.ones(3)])
    with pytest.raises(UsageError, match=r"as reward, got a Tensor of shape \(2,\)\."):
        advantage_inputs(per_token, LossSettings())
    inputs = advantage_inputs(shard(None, rewards=[1.0, 0.0, -1.0]), LossSettings())
    assert inputs.rewards is not None and inputs.rewards.tolist() == [1, 0, -1]


def test_the_report_shows_a_teacher_and_survives_what_is_none() -> None:
    means = means_of([column_sums(shard([[-1.0, -2.0], [], [-3.0, -4.0, -5.0]]))])
    assert means["teacher_log_probs"] == pytest.approx(-2.75)
    assert "teacher_log_probs" not in means_of([column_sums(shard(["free", "text", "here"]))])
