"""Accuracy by difficulty: one number per length of the label, beside the mean of each evaluation set.

    miles train --config examples/quickstart/carry.yaml \
        --custom-eval-rollout-log-function-path examples/plug_ins/custom_eval_rollout_log_function.py:log_by_difficulty

Sums of four digits carry once more than those of three. `eval/<name>/4_digits` and `eval/<name>/3_digits` show which
of them a policy has learned.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from typing import Any

from miles.utils import tracking_utils


def log_by_difficulty(
    rollout_id: int, args: Namespace, data: dict[str, dict[str, Any]], extra_metrics: dict[str, Any] | None
) -> bool:
    metrics: dict[str, float] = {"eval/step": rollout_id}
    for name, entry in data.items():
        by_length: defaultdict[int, list[float]] = defaultdict(list)
        for sample, reward in zip(entry.get("samples", []), entry["rewards"]):
            by_length[len(sample.label)].append(reward)
        for length, rewards in by_length.items():
            metrics[f"eval/{name}/{length}_digits"] = sum(rewards) / len(rewards)
    tracking_utils.log(args, metrics, step_key="eval/step")
    return False
