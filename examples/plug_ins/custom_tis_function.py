"""Importance sampling over whole responses: one weight for all tokens of a response, cut at 2.

    miles train --config examples/quickstart/carry.yaml --use-tis \
        --custom-tis-function-path examples/plug_ins/custom_tis_function.py:per_response

Engine and trainer compute slightly different probabilities, so what was sampled is slightly off-policy. The built-in
correction weights each token by itself. Here it is the geometric mean of the ratios over a response, and responses
whose weight is far off lose their loss.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

HIGHEST = 2.0
FAR_OFF = 10.0


def per_response(
    *,
    args: Namespace,
    pg_loss: torch.Tensor,
    train_log_probs: list[torch.Tensor],
    rollout_log_probs: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
    weights, masks = [], []
    for ours, theirs, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        mean = ((ours - theirs) * mask).sum() / mask.sum().clamp(min=1)
        weight = torch.exp(mean)
        weights.append(weight.expand_as(ours))
        masks.append(mask if 1 / FAR_OFF <= float(weight) <= FAR_OFF else torch.zeros_like(mask))
    flat = torch.cat(weights)
    metrics = {"response_tis": flat, "response_tis_cut": (flat > HIGHEST).float()}
    return pg_loss * flat.clamp(max=HIGHEST), masks, metrics
