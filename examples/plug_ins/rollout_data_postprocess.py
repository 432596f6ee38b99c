"""Train only on tokens that the policy was not already sure of.

    miles train --config examples/quickstart/carry.yaml \
        --rollout-data-postprocess-path examples/plug_ins/rollout_data_postprocess.py:only_uncertain

Most tokens of a response follow from the ones before. Their gradient is small, and their number hides the few where
something was decided (arXiv:2506.01939). Tokens whose log-probability under the old policy is above a limit lose
their loss; a response keeps at least its most uncertain token.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

SURE = math.log(0.99)


def only_uncertain(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    masks = []
    for mask, log_probs in zip(rollout_data["loss_masks"], rollout_data["log_probs"], strict=True):
        least = log_probs.min() if len(log_probs) else 0.0
        masks.append(mask * (log_probs <= max(SURE, float(least))))
    rollout_data["loss_masks"] = masks
