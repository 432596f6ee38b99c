"""Leave-one-out baseline: the reward of a response, less the mean of the *other* responses to its prompt (RLOO).

    miles train --config examples/quickstart/carry.yaml \
        --custom-reward-post-process-path examples/plug_ins/custom_reward_post_process.py:leave_one_out

An unbiased baseline without a critic (arXiv:2402.14740), in the place of GRPO's mean and standard deviation. The raw
rewards, which come first, are what is logged.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict

from miles.types import Sample


def leave_one_out(args: Namespace, samples: list[Sample]) -> tuple[list[float], list[float]]:
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    members: defaultdict[int | None, list[float]] = defaultdict(list)
    for sample, reward in zip(samples, raw, strict=True):
        members[sample.group_index].append(reward)
    rewards = []
    for sample, reward in zip(samples, raw, strict=True):
        group = members[sample.group_index]
        others = (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else 0.0
        rewards.append(reward - others)
    return raw, rewards
