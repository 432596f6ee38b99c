"""Dynamic filters for `--dynamic-sampling-filter-path`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from miles.types import DynamicFilterOutput, Sample

__all__ = ["check_no_aborted", "check_reward_nonzero_std"]


def check_reward_nonzero_std(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group whose rewards differ: only those carry a signal (DAPO, arXiv:2503.14476, section 3.2).

    Rewards are compared in float32. A group of one has no spread to judge and is kept; NaN counts as no spread. A group
    with a sample that has no reward (an aborted one) is dropped under the reason `no_reward`.
    """
    flat = _flat(samples)
    if any(sample.reward is None for sample in flat):
        return DynamicFilterOutput(keep=False, reason="no_reward")
    rewards = [s.get_reward_value(args) for s in flat]
    values = np.asarray([float(r) for r in rewards], dtype=np.float32)
    if len(values) < 2 or values.max() > values.min():
        return DynamicFilterOutput(keep=True)
    first = rewards[0] if isinstance(rewards[0], int) else float(rewards[0])
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(first, 1)}")


def check_no_aborted(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group none of whose samples was aborted; the others are dropped under the reason `aborted`."""
    if any(sample.status == Sample.Status.ABORTED for sample in _flat(samples)):
        return DynamicFilterOutput(keep=False, reason="aborted")
    return DynamicFilterOutput(keep=True)


def _flat(samples: list[Any]) -> list[Sample]:
    """Multi-sample generate functions put lists where samples stand."""
    return [s for entry in samples for s in (entry if isinstance(entry, list) else [entry])]
