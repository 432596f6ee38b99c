"""Dr.GRPO's reduction of the policy-gradient loss: the sum over a response's tokens, divided by a constant.

The default reducer divides the sum by the number of tokens of that response, which makes each token of a long wrong
answer count less than one of a short wrong answer, so that wrong answers grow (Liu et al., "Understanding
R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783, section 3.1). A constant counts all tokens alike.

    --custom-pg-loss-reducer-function-path examples/DrGRPO/custom_reducer.py:get_pg_loss_reducer

The other half of Dr.GRPO is a flag: --disable-grpo-std-normalization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# The longest response that the run allows (--rollout-max-response-len of dr_grpo.yaml), as in the paper's own code.
# Any constant will do: it only scales the gradient. Set your own, in a copy of this file or before the run starts.
DIVISOR = 36.0


def get_pg_loss_reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[torch.Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from the flat loss [R] to (sum over all trained tokens) / DIVISOR, a sum over samples.

    The dispatcher divides by the number of samples of the optimizer step, so the loss of a step is
    1 / (samples * DIVISOR) * sum over samples and tokens of loss * mask.
    """
    if calculate_per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss divides by the number of trained tokens, Dr.GRPO by a constant: "
            "leave one of the two out."
        )
    mask = torch.cat(loss_masks) if loss_masks else torch.empty(0)

    def reduce(pg_loss: torch.Tensor) -> torch.Tensor:
        if pg_loss.shape != mask.shape:
            raise ValueError(
                f"{pg_loss.shape[0]} tokens of loss for responses of {mask.shape[0]} tokens in all: this reducer needs "
                "whole responses, so give --context-parallel-size 1."
            )
        # A masked token takes no part whatever its value; NaN * 0 would be NaN.
        return pg_loss.masked_fill(mask == 0, 0.0).sum() / DIVISOR

    return reduce
