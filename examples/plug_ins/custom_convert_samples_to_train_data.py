"""The same response twice in a group is trained once.

    miles train --config examples/quickstart/carry.yaml \
        --custom-convert-samples-to-train-data-path examples/plug_ins/custom_convert_samples_to_train_data.py:no_repeats

Small models and low temperatures repeat themselves, and a response that was drawn five times pulls five times. Here
its copies keep their place, with a mask of zeros. The whole conversion is replaced: the columns below are what
training needs.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from typing import Any

from miles.types import Sample


def no_repeats(args: Namespace, samples: list[Sample]) -> dict[str, Any]:
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    members: defaultdict[int | None, list[float]] = defaultdict(list)
    for sample, reward in zip(samples, raw, strict=True):
        members[sample.group_index].append(reward)
    mean = {group: sum(rewards) / len(rewards) for group, rewards in members.items()}
    seen: set[tuple[int | None, str]] = set()
    masks = []
    for sample in samples:
        key = sample.group_index, sample.response
        trained = key not in seen and not sample.remove_sample
        seen.add(key)
        mask = sample.loss_mask or [1] * sample.response_length
        masks.append(mask if trained else [0] * sample.response_length)
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "loss_masks": masks,
        "rewards": [reward - mean[sample.group_index] for sample, reward in zip(samples, raw, strict=True)],
        "raw_reward": raw,
        "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }
