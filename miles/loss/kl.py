"""Per-token estimators of KL(current || base) from one sampled token (Schulman, "Approximating KL Divergence")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.errors import UsageError

# Bound of the clamped estimator: keeps one wild token from dominating a batch.
LOW_VAR_KL_BOUND = 10.0


def k1(log_ratio: Tensor) -> Tensor:
    """d: unbiased, high variance, may be negative."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2: biased, low variance; its gradient is the unbiased one."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    return torch.exp(-log_ratio) - 1 + log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": k3}


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    """The estimate per token, float32 (float64 for float64), shaped as `log_probs`; d = log_probs - log_probs_base.

    `importance_ratio` = exp(log_probs - sampled_log_probs) makes the estimate unbiased for tokens that an older policy
    sampled (`--use-unbiased-kl`); gradients flow through it. `low_var_kl` is k3, clamped to [-10, 10] at the end.
    """
    if kl_loss_type not in KL_ESTIMATORS:
        raise UsageError(f"--kl-loss-type: expected one of {', '.join(KL_ESTIMATORS)}, got {kl_loss_type!r}.")
    wide = torch.promote_types(torch.float32, log_probs.dtype)
    kl = KL_ESTIMATORS[kl_loss_type](log_probs.to(wide) - log_probs_base.to(wide))
    if importance_ratio is not None:
        kl = importance_ratio * kl
    return kl.clamp(-LOW_VAR_KL_BOUND, LOW_VAR_KL_BOUND) if kl_loss_type == "low_var_kl" else kl
