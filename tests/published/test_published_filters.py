"""The shipped dynamic filters on groups that plug-ins really make: aborted members, lists, tensor rewards."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from miles.rollout.filter_hub.dynamic_sampling_filters import check_no_aborted, check_reward_nonzero_std
from miles.types import DynamicFilterOutput, Sample

ARGS = Namespace(reward_key=None)
ABORTED = Sample(status=Sample.Status.ABORTED)
DONE = Sample(status=Sample.Status.COMPLETED, reward=1.0)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ([DONE, DONE], None),
        ([DONE, ABORTED], "aborted"),
        ([[DONE], [DONE, ABORTED]], "aborted"),
        ([Sample(status="aborted")], "aborted"),  # type: ignore[arg-type]
        ([Sample(status=Sample.Status.FAILED), Sample(status="completed")], None),  # type: ignore[arg-type]
    ],
)
def test_no_aborted(group: list[Any], reason: str | None) -> None:
    assert check_no_aborted(ARGS, group, more=1) == DynamicFilterOutput(reason is None, reason)


@pytest.mark.parametrize(
    ("rewards", "keep", "reason"),
    [
        ([1.0, None], False, "no_reward"),
        ([torch.tensor(0.0), torch.tensor(1.0)], True, None),
        ([torch.tensor(0.5), torch.tensor([0.5])], False, "zero_std_0.5"),
        ([True, False], True, None),
    ],
)
def test_spread_of_what_plug_ins_return(rewards: list[Any], keep: bool, reason: str | None) -> None:
    group = [Sample(reward=reward) for reward in rewards]
    assert check_reward_nonzero_std(ARGS, group) == DynamicFilterOutput(keep, reason)
