"""From a micro batch's log-probs to its loss, as pure functions of flat tensors over response tokens.

    linear_log_probs      hidden states, projection -> log-probs and entropy at the response tokens, in chunks
    compute_advantages    rewards -> advantages, by estimator
    compute_loss          LossInputs -> LossOutput, by loss type         (policy, sft; importance, kl, reduce)
    custom_loss           the published call of a user's loss, on fp32 logits
    loss_scale            sums over samples -> the mean of the optimizer step
    zero_gradient_rows    samples that need not run at all
    vocab_parallel        log-probs where the vocabulary is cut over ranks
    context_parallel      what a rank owns where samples are cut over ranks, and columns between the ranks

Nothing here knows of models or batches in training; of processes, only the last two do and what calls plug-ins.
"""

from __future__ import annotations

from miles.loss.advantages import AdvantageInputs, Advantages, compute_advantages
from miles.loss.dispatch import compute_loss, loss_scale, step_count, trained_tokens
from miles.loss.exact_zero import zero_gradient_rows
from miles.loss.importance import icepop_function, vanilla_tis_function
from miles.loss.kl import compute_approx_kl
from miles.loss.logprobs import TokenLogProbs, linear_log_probs, log_probs_from_logits
from miles.loss.parallel_state import ParallelState
from miles.loss.policy import compute_policy_loss, policy_loss
from miles.loss.published import custom_loss, get_log_probs_and_entropy, get_responses, loss_batch
from miles.loss.reduce import SumOfSampleMean, get_sum_of_sample_mean
from miles.loss.sft import sft_loss
from miles.loss.types import LossInputs, LossOutput, LossPlugins, LossSettings

__all__ = [
    "AdvantageInputs",
    "Advantages",
    "LossInputs",
    "LossOutput",
    "LossPlugins",
    "LossSettings",
    "ParallelState",
    "SumOfSampleMean",
    "TokenLogProbs",
    "compute_advantages",
    "compute_approx_kl",
    "compute_loss",
    "compute_policy_loss",
    "custom_loss",
    "get_log_probs_and_entropy",
    "get_responses",
    "get_sum_of_sample_mean",
    "icepop_function",
    "linear_log_probs",
    "log_probs_from_logits",
    "loss_batch",
    "loss_scale",
    "policy_loss",
    "sft_loss",
    "step_count",
    "trained_tokens",
    "vanilla_tis_function",
    "zero_gradient_rows",
]
