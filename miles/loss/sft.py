"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

from miles.loss.types import LossInputs, LossOutput, LossPlugins, LossSettings, detached


def sft_loss(inputs: LossInputs, settings: LossSettings, plugins: LossPlugins) -> LossOutput:
    """- sum over samples of the mean log-probability of the trained tokens (a sum over tokens with
    `--calculate-per-token-loss`)."""
    loss = -inputs.reducer(per_token=settings.calculate_per_token_loss)(inputs.log_probs)
    return LossOutput(loss, detached({"loss": loss}, loss))
