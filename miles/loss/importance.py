"""Correction of the policy loss where the engine's distribution differs from the trainer's (TIS, IcePop).

An importance function, built in or the user's (`--custom-tis-function-path`), is called by keyword::

    fn(args=, pg_loss=, train_log_probs=, rollout_log_probs=, loss_masks=, total_lengths=, response_lengths=,
       parallel_state=) -> (pg_loss, loss_masks, metrics)

`pg_loss` [R] flat; log-probs and masks one tensor per sample; `metrics` maps names to flat [R] values. The trainer's
log-probs are those of the old policy, recomputed before the first step. Masks that come back changed also change the
denominators of the loss.

Under context parallelism the user's function sees this rank's tokens alone (`pg_loss`, log-probs, the metrics that it
returns), and whole masks, which must come back the same on every rank. What it returns is gathered again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from miles.errors import UsageError
from miles.loss.context_parallel import cut_response, gather_response, group_of, local_share, tied
from miles.loss.types import LossInputs, LossPlugins, LossSettings, lengths_of


class ClipRange(Protocol):
    """The two flags that the built-in functions read."""

    @property
    def tis_clip(self) -> float: ...
    @property
    def tis_clip_low(self) -> float: ...


TisResult = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def vanilla_tis_function(
    args: ClipRange,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> TisResult:
    """Truncated importance sampling (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", 2025): each token's loss times clamp(pi_train / pi_rollout, tis_clip_low, tis_clip)."""
    ratio = importance_ratio(train_log_probs, rollout_log_probs)
    weight = ratio.clamp(args.tis_clip_low, args.tis_clip)
    return pg_loss * weight, loss_masks, weight_metrics(ratio, weight)


def icepop_function(
    args: ClipRange,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> TisResult:
    """IcePop (Zhao et al., "Small Leak Can Sink a Great Ship", 2025): as vanilla, but a token whose ratio leaves
    [tis_clip_low, tis_clip] counts nothing instead of the bound."""
    ratio = importance_ratio(train_log_probs, rollout_log_probs)
    inside = (ratio >= args.tis_clip_low) & (ratio <= args.tis_clip)
    weight = ratio.masked_fill(~inside, 0.0)
    return pg_loss * weight, loss_masks, weight_metrics(ratio, weight)


def importance_ratio(train_log_probs: list[Tensor], rollout_log_probs: list[Tensor]) -> Tensor:
    """pi_train / pi_rollout of each sampled token, [R]."""
    return torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))


def weight_metrics(ratio: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {
        "tis": ratio.clone().detach(),
        "tis_clipfrac": (weight != ratio).to(ratio.dtype),
        "tis_abs": (ratio - 1).abs().detach(),
    }


def correct(inputs: LossInputs, settings: LossSettings, plugins: LossPlugins, pg_loss: Tensor) -> TisResult:
    """Call the importance function of the run and check what it returned."""
    rollout_log_probs = inputs.require("rollout_log_probs")
    shared: dict[str, Any] = {
        "pg_loss": pg_loss,
        "train_log_probs": inputs.per_sample(inputs.require("old_log_probs")),
        "rollout_log_probs": inputs.per_sample(rollout_log_probs),
        "loss_masks": inputs.loss_masks,
        "total_lengths": inputs.total_lengths,
        "response_lengths": inputs.response_lengths,
        "parallel_state": plugins.parallel_state,
    }
    if plugins.tis is None:
        return vanilla_tis_function(settings, **shared)
    # Their own copies: a function that changes masks in place must not change the batch.
    shared["loss_masks"] = inputs.per_sample(inputs.loss_mask.clone())
    group = group_of(plugins.parallel_state)
    if group is None:
        return checked(inputs, plugins.tis(args=plugins.args, **shared), pg_loss)
    share = local_share(plugins.parallel_state, inputs.total_lengths, inputs.response_lengths, pg_loss.device)
    mine = cut_response(pg_loss, share, group)
    shared |= {
        "pg_loss": mine,
        "train_log_probs": share.pieces(inputs.require("old_log_probs")),
        "rollout_log_probs": share.pieces(rollout_log_probs),
    }
    corrected, masks, metrics = checked(inputs, plugins.tis(args=plugins.args, **shared), mine)
    metrics = {name: gather_response(value.detach(), share, group) for name, value in metrics.items()}
    return gather_response(tied(corrected, mine), share, group), masks, metrics


def checked(inputs: LossInputs, result: Any, pg_loss: Tensor) -> TisResult:
    """What the user's function returned for `pg_loss`, or a UsageError."""
    if not isinstance(result, tuple) or len(result) != 3:
        raise UsageError(
            f"--custom-tis-function-path: expected a tuple (pg_loss, loss_masks, metrics), got {type(result).__name__}."
        )
    corrected, masks, metrics = result
    for name, value in {"pg_loss": corrected, **metrics}.items():
        if tuple(value.shape) != tuple(pg_loss.shape):
            raise UsageError(
                f"--custom-tis-function-path: {name} has shape {tuple(value.shape)}, expected {tuple(pg_loss.shape)}: "
                "one value per response token."
            )
    if lengths_of(masks) != inputs.response_lengths:
        raise UsageError(
            f"--custom-tis-function-path: the masks have lengths {lengths_of(masks)}, expected the response lengths "
            f"{inputs.response_lengths}."
        )
    return corrected, list(masks), dict(metrics)
