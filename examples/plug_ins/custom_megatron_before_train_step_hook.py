"""Train the embeddings only from the tenth rollout on.

    miles train --config examples/quickstart/carry.yaml --train-backend megatron \
        --custom-megatron-before-train-step-hook-path examples/plug_ins/custom_megatron_before_train_step_hook.py:freeze

It runs before each forward pass, when gradients are zeroed: parameters can be frozen, noise added, a schedule of
one's own applied to the optimizer.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

FIRST_ROLLOUT = 10


def freeze(
    args: Namespace,
    rollout_id: int,
    step_id: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if "embedding" in name:
                parameter.requires_grad_(rollout_id >= FIRST_ROLLOUT)
