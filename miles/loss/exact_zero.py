"""Samples whose gradient is exactly zero, so that the trainer need not run them through the model.

A group whose rewards are all equal has advantage 0 everywhere; a removed or failed sample has an empty mask. Running
the model for them changes no weight.
"""

from __future__ import annotations

from torch import Tensor

from miles.loss.reduce import segment_sum
from miles.loss.types import LossPlugins, LossSettings


def zero_gradient_rows(
    advantages: Tensor | None,
    loss_mask: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    settings: LossSettings,
    plugins: LossPlugins,
) -> Tensor:
    """bool [n]: True for samples that can be left out of forward and backward without changing any gradient.

    Proof. The loss of a step is (sum over samples i of l_i) / N, where N, the samples (or trained tokens) of the step,
    is counted before anything is left out, and l_i depends on the tokens of sample i alone: packed rows do not attend
    to each other, GSPO's ratio, OPSM's mask and every denominator max(sum of m, 1) are taken inside one sample. So
    leaving i out removes exactly the gradient of l_i. That gradient is zero if

    - every mask entry of i is 0: l_i is a sum of terms m_t x_t, each 0 whatever x_t. (all built-in losses), or
    - every unmasked token of i has advantage 0, and l_i has no term but the policy gradient: with A = 0 both sides of
      the clip are -0 * ratio, with derivative 0 in the ratio; the dual clip needs A < 0; CISPO's term is A times log
      pi times a constant; the built-in importance weight is a constant factor. (policy_loss without entropy bonus and
      KL loss, since those do not vanish with A. A KL loss of weight 0 is run for its metric.)

    A user's loss, reducer or importance function may do anything with a sample, so with one of them nothing is left
    out; nor may it be by a model that adds a loss of its own over all tokens (expert balancing). Metrics are another
    matter: a sample that was left out has no entropy and no ppo_kl in this step, so whoever
    leaves samples out divides such metrics by the number of samples that ran.
    """
    empty = segment_sum((loss_mask != 0).float(), sample_ids, num_samples) == 0
    if settings.loss_type == "custom_loss" or plugins.pg_reducer is not None:
        return empty.new_zeros(num_samples)
    if settings.loss_type in ("sft_loss", "value_loss"):
        return empty
    if settings.corrects_importance and plugins.tis is not None:
        return empty.new_zeros(num_samples)
    only_policy_gradient = settings.entropy_coef == 0 and not settings.use_kl_loss
    if advantages is None or not only_policy_gradient:
        return empty
    pulls = (advantages != 0) & (loss_mask != 0)
    return segment_sum(pulls.float(), sample_ids, num_samples) == 0
