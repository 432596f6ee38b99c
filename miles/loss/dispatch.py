"""Which loss runs, and how sums over samples become the loss of an optimizer step."""

from __future__ import annotations

from torch import Tensor

from miles.errors import UsageError
from miles.loss.policy import policy_loss
from miles.loss.sft import sft_loss
from miles.loss.types import LossFunction, LossInputs, LossOutput, LossPlugins, LossSettings
from miles.loss.value import value_loss

LOSSES: dict[str, LossFunction] = {
    "policy_loss": policy_loss,
    "value_loss": value_loss,
    "sft_loss": sft_loss,
}
"""The built-in losses by `--loss-type`. `custom_loss` is called through `published.custom_loss`."""


def compute_loss(inputs: LossInputs, settings: LossSettings, plugins: LossPlugins, scale: float) -> LossOutput:
    """The built-in loss of one micro batch. `loss` is multiplied by `scale` (see `loss_scale`), metrics stay sums."""
    if settings.loss_type not in LOSSES:
        raise UsageError(f"--loss-type: expected one of {', '.join(LOSSES)}, got {settings.loss_type!r}.")
    result = LOSSES[settings.loss_type](inputs, settings, plugins)
    return LossOutput(result.loss * scale, result.metrics)


def step_count(settings: LossSettings, num_samples: int, num_tokens: int) -> int:
    """What the sums of one optimizer step are divided by, loss and metrics alike.

    `num_samples` and `num_tokens` (trained ones) are those of the whole step: all micro batches of all data-parallel
    ranks, samples that were left out as exactly zero included. At least 1, so that a step without a trained token has
    the loss 0.
    """
    return max(num_tokens if settings.calculate_per_token_loss else num_samples, 1)


def loss_scale(settings: LossSettings, num_samples: int, num_tokens: int, *, dp_size: int = 1) -> float:
    """Factor on every micro batch's sum, so that the gradient that arrives is that of the step's mean.

    `dp_size` is the number of ranks over which the backend AVERAGES gradients (as FSDP and DDP do); a backend that sums
    them leaves it at 1.
    """
    return dp_size / step_count(settings, num_samples, num_tokens)


def trained_tokens(loss_mask: Tensor) -> int:
    """Tokens that count in `--calculate-per-token-loss`."""
    return int(loss_mask.sum())
