"""The clipped policy-gradient loss (PPO's objective, arXiv:1707.06347), for all estimators.

    log-ratio -> clipped surrogate -> off-policy sequence mask -> importance correction -> reduction
              -> minus entropy bonus, plus KL to the reference

Each arrow is a function here or in `importance`, `kl`, `reduce`. Metrics carry the published names. Under context
parallelism every rank computes all of it from whole columns; the user's functions alone see a rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.errors import UsageError
from miles.loss.context_parallel import cut_response, group_of, local_share, sum_of_parts, tied
from miles.loss.importance import correct
from miles.loss.kl import compute_approx_kl
from miles.loss.reduce import Reducer, SumOfSampleMean, SumOverConstant, segment_sum, token_weights
from miles.loss.types import LossInputs, LossOutput, LossPlugins, LossSettings, detached


def policy_loss(inputs: LossInputs, settings: LossSettings, plugins: LossPlugins) -> LossOutput:
    """The loss of one micro batch as a sum over samples, and its metrics."""
    advantages = inputs.require("advantages")
    old = inputs.require("rollout_log_probs" if settings.use_rollout_logprobs else "old_log_probs")
    measure = inputs.reducer(per_token=settings.calculate_per_token_loss)
    ppo_kl = policy_log_ratio(inputs, settings, old)
    pg, clipped = SURROGATES.get(settings.advantage_estimator, clipped_surrogate)(inputs, settings, ppo_kl, advantages)
    extra: dict[str, Tensor] = {}
    if settings.use_opsm:
        keep, opsm_clipfrac = off_policy_sequence_mask(inputs, old, advantages, settings.opsm_delta)
        pg, extra["opsm_clipfrac"] = pg * keep, opsm_clipfrac
    reduce: Reducer = measure
    masks = inputs.loss_masks
    if settings.corrects_importance:
        extra["ois"] = measure(torch.exp(-ppo_kl.detach()))
        corrected, corrected_masks, per_token = correct(inputs, settings, plugins, pg)
        extra |= {name: measure(values.detach()) for name, values in per_token.items()}
        if settings.use_tis:  # --get-mismatch-metrics alone only measures, whatever the function returns
            pg, masks = corrected, corrected_masks
        if masks is not inputs.loss_masks:
            mask = torch.cat(masks) if masks else inputs.loss_mask
            per_token_loss = settings.calculate_per_token_loss
            reduce = SumOfSampleMean(mask, inputs.sample_ids, inputs.num_samples, per_token=per_token_loss)
    pg_loss = pg_reducer(inputs, settings, plugins, masks, reduce)(pg)
    loss = pg_loss
    metrics: dict[str, Tensor] = {"pg_loss": pg_loss}
    if inputs.entropy is not None:
        entropy_loss = reduce(inputs.entropy if settings.entropy_coef else inputs.entropy.detach())
        loss = loss - settings.entropy_coef * entropy_loss
        metrics["entropy_loss"] = entropy_loss
    elif settings.entropy_coef:
        raise UsageError("--entropy-coef: the loss needs the entropy of every token, and it was not computed.")
    metrics |= {"pg_clipfrac": reduce(clipped), "ppo_kl": reduce(ppo_kl.detach())}
    if inputs.rollout_log_probs is not None:
        recomputed = old if inputs.old_log_probs is None else inputs.old_log_probs
        metrics["train_rollout_logprob_abs_diff"] = measure((recomputed - inputs.rollout_log_probs).abs())
    if settings.use_kl_loss:
        kl_loss = reduce(reference_kl(inputs, settings, old))
        loss = loss + settings.kl_loss_coef * kl_loss
        metrics["kl_loss"] = kl_loss
    return LossOutput(loss, detached({"loss": loss, **metrics, **extra}, loss))


def clipped_surrogate(
    inputs: LossInputs, settings: LossSettings, ppo_kl: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """PPO's, with the flags' clip range."""
    return compute_policy_loss(ppo_kl, advantages, settings.eps_clip, settings.clip_high, settings.eps_clip_c)


def clipped_weights(
    inputs: LossInputs, settings: LossSettings, ppo_kl: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4): REINFORCE with the clipped ratio as a constant weight,
    -clamp(ratio, 1 - eps_clip, 1 + eps_clip_high) A log pi, so that clipped tokens keep their gradient. The second
    value is 1.0 where the ratio was clipped. The paper has no lower bound: --eps-clip 1."""
    ratio = torch.exp(-ppo_kl.detach())
    weight = ratio.clamp(1 - settings.eps_clip, 1 + settings.clip_high)
    return -weight * advantages * inputs.trained(inputs.log_probs), (weight != ratio).to(ppo_kl.dtype)


SURROGATES: dict[str, Callable[[LossInputs, LossSettings, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "cispo": clipped_weights,
}
"""Estimators with a policy-gradient term of their own: (inputs, settings, ppo_kl, advantages) -> (loss [R], clipped
[R]). All others have `clipped_surrogate`."""


def policy_log_ratio(inputs: LossInputs, settings: LossSettings, old: Tensor) -> Tensor:
    """`ppo_kl` [R] = log pi_old - log pi of each token. GSPO (arXiv:2507.18071) uses the sequence's mean for all its
    tokens."""
    difference = inputs.trained(old - inputs.log_probs)
    return sequence_mean(inputs, difference) if settings.advantage_estimator == "gspo" else difference


def sequence_mean(inputs: LossInputs, values: Tensor) -> Tensor:
    """The mean over each sample's trained tokens, given to every token of the sample: [R] -> [R]."""
    weights = token_weights(inputs.loss_mask, inputs.sample_ids, inputs.num_samples, per_token=False)
    weighted = inputs.trained(values) * weights.to(values.dtype)
    return segment_sum(weighted, inputs.sample_ids, inputs.num_samples)[inputs.sample_ids]


def compute_policy_loss(
    ppo_kl: Tensor, advantages: Tensor, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate per token, and 1.0 where the clip was the larger side; shaped as `ppo_kl`.

    With ratio = exp(-ppo_kl): max(-ratio A, -clamp(ratio, 1 - eps_clip, 1 + eps_clip_high) A). Dual clip
    (arXiv:1912.09729): where A < 0 the loss is at most -eps_clip_c A, so that one huge ratio cannot dominate.
    """
    ratio = torch.exp(-ppo_kl)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    clipfrac = (clipped > unclipped).to(ppo_kl.dtype)
    if eps_clip_c is not None:
        if eps_clip_c <= 1:
            raise ValueError(f"eps_clip_c must be > 1, got {eps_clip_c}")
        loss = torch.where(advantages < 0, torch.minimum(loss, -eps_clip_c * advantages), loss)
    return loss, clipfrac


def off_policy_sequence_mask(
    inputs: LossInputs, old: Tensor, advantages: Tensor, delta: float
) -> tuple[Tensor, Tensor]:
    """OPSM (DeepSeek-V3.2): 0.0 for tokens with a negative advantage in sequences whose mean log-ratio
    log pi_old - log pi exceeds `delta`, else 1.0; and the masked-out share, as a sum over samples."""
    drift = sequence_mean(inputs, (old - inputs.log_probs).detach())
    dropped = ((drift > delta) & (advantages < 0)).to(old.dtype)
    totals = segment_sum(inputs.loss_mask.to(old.dtype), inputs.sample_ids, inputs.num_samples).clamp(min=1)
    share = segment_sum(dropped, inputs.sample_ids, inputs.num_samples) / totals
    return 1 - dropped, share.sum()


def pg_reducer(
    inputs: LossInputs, settings: LossSettings, plugins: LossPlugins, masks: list[Tensor], default: Reducer
) -> Reducer:
    """What reduces the policy-gradient term alone: `--custom-pg-loss-reducer-function-path`, or the estimator's. Under
    context parallelism the user's gets whole masks and this rank's tokens, and returns its part of the sum."""
    if plugins.pg_reducer is None:
        if settings.advantage_estimator == "dr_grpo":
            assert settings.rollout_max_response_len is not None
            mask = torch.cat(masks) if masks else inputs.loss_mask
            return SumOverConstant(mask, settings.rollout_max_response_len)
        return default
    own = [mask.clone() for mask in masks]  # a reducer that changes masks in place must not change the batch
    reducer = plugins.pg_reducer(inputs.total_lengths, inputs.response_lengths, own, settings.calculate_per_token_loss)
    if not callable(reducer):
        raise UsageError(
            "--custom-pg-loss-reducer-function-path: expected a callable that reduces the flat loss to a scalar, "
            f"got {type(reducer).__name__}."
        )
    group = group_of(plugins.parallel_state)
    if group is None:
        return reducer
    share = local_share(plugins.parallel_state, inputs.total_lengths, inputs.response_lengths, inputs.loss_mask.device)

    def over_ranks(pg: Tensor) -> Tensor:
        mine = cut_response(pg, share, group)
        return sum_of_parts(tied(reducer(mine), mine), group)

    return over_ranks


def reference_kl(inputs: LossInputs, settings: LossSettings, old: Tensor) -> Tensor:
    """KL(current || reference) per token, [R]."""
    current, base = inputs.trained(inputs.log_probs), inputs.trained(inputs.require("ref_log_probs"))
    ratio = torch.exp(current - inputs.trained(old)) if settings.use_unbiased_kl else None
    return compute_approx_kl(current, base, settings.kl_loss_type, ratio)
