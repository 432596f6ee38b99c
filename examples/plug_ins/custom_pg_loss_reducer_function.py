"""Long and short responses weigh the same per token, whatever the batch: a sum over tokens by a constant.

    miles train --config examples/quickstart/carry.yaml \
        --custom-pg-loss-reducer-function-path examples/plug_ins/custom_pg_loss_reducer_function.py:per_constant

The built-in reducer takes the mean over each response, so a token of a long response moves the model less
(arXiv:2503.20783). The constant only scales the learning rate; here it is the longest response of the quickstart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LONGEST_RESPONSE = 36


def per_constant(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[torch.Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    mask = torch.cat(loss_masks)
    return lambda pg_loss: pg_loss.masked_fill(mask == 0, 0.0).sum() / LONGEST_RESPONSE
