"""Means over a batch: which rows and tokens count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles.batch import TrainBatch, from_published_dict
from miles.trainer.report import column_sums, means_of


def batch() -> TrainBatch:
    """Three samples with 2, 3 and 1 response tokens."""
    return from_published_dict(
        {
            "tokens": [[5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6]],
            "response_lengths": [2, 3, 1],
            "rewards": [1.0, -1.0, 0.0],
            "raw_reward": [1.0, 0.0, 0.5],
            "truncated": [0, 1, 0],
            "sample_indices": [0, 1, 2],
            "loss_masks": [[1, 1], [1, 0, 1], [0]],
        }
    )


def test_row_columns() -> None:
    means = means_of([column_sums(batch())])
    assert means["response_lengths"] == 2.0 and means["total_lengths"] == pytest.approx(11 / 3)
    assert means["rewards"] == 0.0 and means["raw_reward"] == 0.5 and means["truncated"] == pytest.approx(1 / 3)
    assert "round_number" not in means


def test_token_columns_are_means_of_the_samples_means() -> None:
    """Masked tokens take no part, nor does a sample without a trained token."""
    full = batch()
    full.response_columns["log_probs"] = torch.tensor([1.0, 3.0, 5.0, 1000.0, 7.0, 1000.0])
    assert means_of([column_sums(full)])["log_probs"] == pytest.approx((2.0 + 6.0) / 2)


def test_tokens_that_were_not_computed_take_no_part() -> None:
    some = batch()
    some.response_columns["log_probs"] = torch.tensor([1.0, 3.0, *[math.nan] * 4])
    assert means_of([column_sums(some)])["log_probs"] == 2.0
    some.response_columns["log_probs"] = torch.full((6,), math.nan)
    assert "log_probs" not in means_of([column_sums(some)])


def test_failed_rows_take_no_part() -> None:
    some = batch()
    some.failed = np.array([False, True, False])
    some.raw_reward = [1.0, None, 0.5]
    means = means_of([column_sums(some)])
    assert means["raw_reward"] == 0.75 and means["rewards"] == 0.5 and means["response_lengths"] == 1.5


def test_columns_that_are_no_numbers_are_left_out() -> None:
    some = batch()
    some.raw_reward = [{"score": 1.0}, {"score": 0.0}, {"score": 0.5}]
    means = means_of([column_sums(some)])
    assert "raw_reward" not in means and "rewards" in means


def test_nothing_valid() -> None:
    none = batch()
    none.failed = np.ones(3, dtype=bool)
    none.loss_masks = np.zeros(6, dtype=np.int32)
    none.response_columns["log_probs"] = torch.zeros(6)
    assert means_of([column_sums(none)]) == {}
