"""Train on problems of medium difficulty: some answers right, some wrong, and not nearly all the same.

    miles train --config examples/quickstart/carry.yaml --over-sampling-batch-size 32 \
        --dynamic-sampling-filter-path examples/plug_ins/dynamic_sampling_filter.py:medium

Groups whose answers score alike have no advantage at all (DAPO, arXiv:2503.14476). This filter also leaves out those
where a single answer differs in eight, whose one advantage is large and says little.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.types import DynamicFilterOutput, Sample

LEAST_SHARE = 0.2


def medium(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    rewards = [sample.get_reward_value(args) for sample in samples]
    best = sum(reward == max(rewards) for reward in rewards) / len(rewards)
    if best > 1 - LEAST_SHARE:
        return DynamicFilterOutput(keep=False, reason="too_alike")
    if best < LEAST_SHARE:
        return DynamicFilterOutput(keep=False, reason="a_lucky_one")
    return DynamicFilterOutput(keep=True)
