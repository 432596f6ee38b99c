"""Published import path of the formulas of policy optimization, for custom losses and advantage functions.

What the built-in losses use lives in `miles.loss`; the rest is here. Log-probs and entropies are over the vocabulary
of a tensor-parallel group, where one is given; every rank then holds equal parts of the columns, and all of them are
tokens. Advantages take samples that are whole in one process: context parallelism above 1 is answered with a sentence.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles.loss.kl import compute_approx_kl
from miles.loss.policy import compute_policy_loss
from miles.loss.scan import discounted_sums
from miles.loss.vocab_parallel import log_probs_from_logits

__all__ = [
    "calculate_log_probs_and_entropy",
    "chunked_gae",
    "compute_approx_kl",
    "compute_entropy_from_logits",
    "compute_gspo_kl",
    "compute_log_probs",
    "compute_opsm_mask",
    "compute_policy_loss",
    "get_advantages_and_returns",
    "get_advantages_and_returns_batch",
    "get_grpo_returns",
    "get_reinforce_plus_plus_baseline_advantages",
    "get_reinforce_plus_plus_returns",
    "vanilla_gae",
]


# ---- log-probs -------------------------------------------------------------------------------------------------------


def compute_log_probs(logits: Tensor, tokens: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Log-probability of `tokens` [R] under `logits` [R, V / group], as [R, 1]. Differentiable."""
    return calculate_log_probs_and_entropy(logits, tokens, process_group)[0]


def compute_entropy_from_logits(logits: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Entropy of each row of `logits` [R, V / group]: [R]."""
    any_token = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    entropy = calculate_log_probs_and_entropy(logits, any_token, process_group, with_entropy=True)[1]
    assert entropy is not None
    return entropy


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs [R, 1], entropy [R] or None) of `tokens` [R] under `logits` [R, V / tp], `chunk_size` rows a time."""
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    shard = {"group": tp_group, "first_row": rank * logits.shape[1]}
    rows = logits.shape[0] if chunk_size <= 0 else chunk_size
    parts = [
        log_probs_from_logits(some, ids, with_entropy=with_entropy, **shard)
        for some, ids in zip(logits.split(max(rows, 1)), tokens.split(max(rows, 1)))
    ]
    log_probs = torch.cat([part.log_probs for part in parts])[:, None]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return log_probs, torch.cat(entropies) if with_entropy else None


# ---- ratios of whole sequences ---------------------------------------------------------------------------------------


def compute_gspo_kl(
    full_log_probs: list[Tensor],
    full_old_log_probs: list[Tensor],
    local_log_probs: list[Tensor],
    loss_masks: list[Tensor],
) -> Tensor:
    """old - current as the mean over each sequence, given to each of its tokens (GSPO, arXiv:2507.18071): [R]."""
    drifts = sequence_drift(full_log_probs, full_old_log_probs, loss_masks)
    return torch.cat([drift.expand(local.shape[0]) for drift, local in zip(drifts, local_log_probs, strict=True)])


def compute_opsm_mask(
    args: Namespace,
    full_log_probs: list[Tensor],
    full_old_log_probs: list[Tensor],
    advantages: list[Tensor],
    loss_masks: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """(keep [R], clipped share as a sum over samples). 0 for tokens with a negative advantage in sequences whose mean
    old - current exceeds `args.opsm_delta` (off-policy sequence masking, DeepSeek-V3.2)."""
    drifts = sequence_drift(full_log_probs, full_old_log_probs, loss_masks)
    keep, share = [], torch.zeros((), device=advantages[0].device)
    for drift, advantage, mask in zip(drifts, advantages, loss_masks, strict=True):
        dropped = ((drift > args.opsm_delta) & (advantage < 0)).float()
        keep.append(1 - dropped)
        share = share + dropped.sum() / mask.sum().clamp(min=1)
    return torch.cat(keep), share


def sequence_drift(log_probs: list[Tensor], old: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Per sample the masked mean of old - current."""
    return [
        ((before - now) * mask).sum() / mask.sum().clamp(min=1)
        for now, before, mask in zip(log_probs, old, masks, strict=True)
    ]


# ---- rewards to advantages -------------------------------------------------------------------------------------------


def get_grpo_returns(rewards: Tensor, kl: list[Tensor]) -> list[Tensor]:
    """Each token of sample i gets `rewards[i]`; `kl` gives the lengths."""
    return [torch.ones_like(row) * reward for reward, row in zip(rewards, kl, strict=True)]


def get_reinforce_plus_plus_returns(
    rewards: Tensor,
    kl: list[Tensor],
    loss_masks: list[Tensor],
    response_lengths: list[int],
    total_lengths: list[int],
    kl_coef: float,
    gamma: float,
    parallel_state: Any,
) -> list[Tensor]:
    """Discounted returns of -kl_coef kl_t, with the reward at the last unmasked token (arXiv:2501.03262).

    AssertionError for a sample whose tokens are all masked.
    """
    one_rank("get_reinforce_plus_plus_returns", parallel_state)
    returns = []
    for reward, row, mask in zip(rewards, kl, loss_masks, strict=True):
        assert mask.sum() > 0, "a sample has no unmasked token that could carry its reward"
        token_rewards = -kl_coef * row
        token_rewards[int(mask.nonzero()[-1])] += reward
        returns.append(discounted_sums(token_rewards, [len(token_rewards)], gamma))
    return returns


def get_reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, kl: list[Tensor], loss_masks: list[Tensor], kl_coef: float
) -> list[Tensor]:
    """reward_i - kl_coef kl_t, for rewards that had their group's mean taken off."""
    return [reward - kl_coef * row for reward, row in zip(rewards, kl, strict=True)]


def get_advantages_and_returns(
    total_len: int,
    response_len: int,
    values: Tensor,
    rewards: Tensor,
    gamma: float,
    lambd: float,
    parallel_state: Any,
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438) of one sample: (advantages [R], returns [R]); returns = advantages + values."""
    one_rank("get_advantages_and_returns", parallel_state)
    advantages, returns = vanilla_gae(rewards[None], values[None], gamma, lambd)
    return advantages[0].detach(), returns[0].detach()


def get_advantages_and_returns_batch(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    values_list: list[Tensor],
    rewards_list: list[Tensor],
    gamma: float,
    lambd: float,
    parallel_state: Any,
    chunked: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """`get_advantages_and_returns` of several samples; `chunked` chooses the faster of two equal ways."""
    one_rank("get_advantages_and_returns_batch", parallel_state)
    pad = torch.nn.utils.rnn.pad_sequence
    # What stands after a sample's end has value and reward 0, and so takes no part in the recursion before it.
    values, rewards = pad(values_list, batch_first=True), pad(rewards_list, batch_first=True)
    advantages, returns = (chunked_gae if chunked else vanilla_gae)(rewards, values, gamma, lambd)
    lengths = list(response_lengths)
    return (
        [row[:n].detach() for row, n in zip(advantages, lengths, strict=True)],
        [row[:n].detach() for row, n in zip(returns, lengths, strict=True)],
    )


def vanilla_gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of [B, T] each: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambd A_{t+1},
    with 0 after the end; returns = A + V (arXiv:1506.02438, equations 11 and 16)."""
    advantages = torch.zeros_like(rewards)
    deltas = temporal_differences(rewards, values, gamma)
    later = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = deltas[:, t] + gamma * lambd * later
        advantages[:, t] = later
    return advantages, advantages + values


def chunked_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """As `vanilla_gae`, `chunk_size` steps at a time (`miles.loss.scan`)."""
    deltas = temporal_differences(rewards, values, gamma)
    lengths = [rewards.shape[1]] * rewards.shape[0]
    flat = discounted_sums(deltas.flatten(), lengths, gamma * lambd, chunk=chunk_size)
    advantages = flat.view_as(rewards)
    return advantages, advantages + values


def temporal_differences(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return rewards + gamma * following - values


# ---- what is not here ------------------------------------------------------------------------------------------------


def one_rank(name: str, parallel_state: Any) -> None:
    if parallel_state.cp_size != 1:
        raise ValueError(f"{name}: samples cut over {parallel_state.cp_size} context-parallel ranks are not supported")
