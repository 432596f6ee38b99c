"""CISPO: the importance weight is clipped, not the update (MiniMax-M1, arXiv:2506.13585, equation 4).

    miles train --config examples/quickstart/carry.yaml --loss-type custom_loss \
        --custom-loss-function-path examples/plug_ins/custom_loss_function.py:cispo

PPO gives a token no gradient once its ratio has left the clip range. Here every token keeps one, weighted by the
clipped ratio as a constant: loss = -clamp(pi / pi_old, max=1 + eps_clip_high) A log pi.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from miles.backends.training_utils.loss import get_log_probs_and_entropy

if TYPE_CHECKING:
    from miles.backends.training_utils.parallel import ParallelState


def cispo(
    args: Namespace,
    parallel_state: ParallelState,
    batch: dict[str, Any],
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    current = get_log_probs_and_entropy(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )["log_probs"]
    log_probs, advantages = torch.cat(current), torch.cat(batch["advantages"])
    ratio = torch.exp(log_probs.detach() - torch.cat(batch["log_probs"]))
    highest = 1 + (args.eps_clip if args.eps_clip_high is None else args.eps_clip_high)
    loss = sum_of_sample_mean(-ratio.clamp(max=highest) * advantages * log_probs)
    return loss, {"cispo_loss": loss.detach(), "cispo_clipped": sum_of_sample_mean((ratio > highest).float())}
