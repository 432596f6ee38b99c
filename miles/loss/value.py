"""The critic's loss: squared error to the returns, clipped around the values of the rollout (PPO, arXiv:1707.06347)."""

from __future__ import annotations

import torch

from miles.loss.types import LossInputs, LossOutput, LossPlugins, LossSettings, detached


def value_loss(inputs: LossInputs, settings: LossSettings, plugins: LossPlugins) -> LossOutput:
    """Per token max((v - R)^2, (clamp(v, v_old - value_clip, v_old + value_clip) - R)^2), as a sum over samples."""
    values = inputs.trained(inputs.require("values"))
    old = inputs.trained(inputs.require("old_values"))
    returns = inputs.trained(inputs.require("returns"))
    clipped = old + (values - old).clamp(-settings.value_clip, settings.value_clip)
    reduce = inputs.reducer(per_token=settings.calculate_per_token_loss)
    loss = reduce(torch.maximum((values - returns).square(), (clipped - returns).square()))
    outside = ((values - old).abs() > settings.value_clip).to(values.dtype)
    return LossOutput(loss, detached({"value_loss": loss, "value_clipfrac": reduce(outside)}, loss))
