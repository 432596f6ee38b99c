"""How many different responses a group has: a number that falls when a policy loses its variety.

    miles train --config examples/quickstart/carry.yaml \
        --custom-rollout-log-function-path examples/plug_ins/custom_rollout_log_function.py:log_variety

It is logged through the run's own trackers, so it is in `metrics.jsonl`, TensorBoard and Weights & Biases. False lets
the default metrics be logged as well.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.types import Sample
from miles.utils import tracking_utils


def log_variety(
    rollout_id: int,
    args: Namespace,
    samples: list[Sample],
    rollout_extra_metrics: dict[str, Any] | None,
    rollout_time: float,
) -> bool:
    groups = {sample.group_index for sample in samples}
    different = {(sample.group_index, sample.response) for sample in samples}
    metrics = {"rollout/step": rollout_id, "rollout/different_per_group": len(different) / len(groups)}
    tracking_utils.log(args, metrics, step_key="rollout/step")
    return False
