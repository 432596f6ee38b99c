"""Published import path of the loss functions: what custom losses call, or build upon.

The work is in `miles.loss`. Here are the built-in losses under the published call, for custom losses that add a term to
one of them: `loss, metrics = policy_loss_function(args, parallel_state, batch, logits, sum_of_sample_mean)`. As with
every custom loss, under context parallelism both are this rank's part of a sum over the ranks.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.backends.training_utils.state_optional import state_optional
from miles.hooks import load_function
from miles.loss.context_parallel import gather_response_of_parts, group_of, local_share
from miles.loss.importance import icepop_function, vanilla_tis_function
from miles.loss.parallel_state import ParallelState
from miles.loss.policy import policy_loss
from miles.loss.published import get_log_probs_and_entropy, get_responses
from miles.loss.reduce import Reducer, ids_of
from miles.loss.types import LossInputs, LossPlugins, LossSettings

__all__ = [
    "get_log_probs_and_entropy",
    "get_responses",
    "get_values",
    "icepop_function",
    "policy_loss_function",
    "sft_loss_function",
    "vanilla_tis_function",
]

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


def get_values(
    logits: Tensor,
    *,
    args: Namespace,
    parallel_state: ParallelState | None = None,
    unconcat_tokens: Sequence[Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    with_entropy: bool = False,
    non_loss_data: bool = True,
    max_seq_lens: Sequence[int] | None = None,
) -> dict[str, list[Tensor]]:
    """`{"values": [R_i] per sample}` from a value head's output [1, T, 1]; as published, divided by the temperature."""
    if with_entropy:
        raise ValueError("get_values: values have no entropy")
    responses = get_responses(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=unconcat_tokens,
        total_lengths=total_lengths,
        response_lengths=response_lengths,
        max_seq_lens=max_seq_lens,
    )
    return {"values": [predicting.squeeze(-1) for predicting, _ in responses]}


@state_optional
def policy_loss_function(
    args: Namespace,
    parallel_state: ParallelState,
    batch: Mapping[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Reducer,
) -> LossAndMetrics:
    """The built-in policy loss with the importance function and the reducer that `args` names: (loss, metrics), sums
    over samples. `sum_of_sample_mean` stands for the reducer that the batch's own masks and lengths make."""
    current = get_log_probs_and_entropy(logits, with_entropy=True, **_rows(args, parallel_state, batch))
    plugins = LossPlugins(
        tis=load_function(args.custom_tis_function_path),
        pg_reducer=load_function(args.custom_pg_loss_reducer_function_path),
        args=args,
        parallel_state=parallel_state,
    )
    group = group_of(parallel_state)
    totals, responses = list(batch["total_lengths"]), list(batch["response_lengths"])

    def flat(rows: Sequence[Tensor] | None) -> Tensor | None:
        """A column as one tensor [R] of whole samples; None where it was not computed."""
        if rows is None or group is None:
            return None if rows is None else torch.cat(list(rows))
        share = local_share(parallel_state, totals, responses, logits.device)
        return gather_response_of_parts(torch.cat(list(rows)), share.own, share.num_response, group)

    log_probs = flat(current["log_probs"])
    assert log_probs is not None
    inputs = LossInputs(
        log_probs=log_probs,
        entropy=flat(current["entropy"]),
        loss_mask=torch.cat(list(batch["loss_masks"])),
        sample_ids=ids_of(responses, logits.device),
        response_lengths=responses,
        total_lengths=totals,
        old_log_probs=flat(batch.get("log_probs")),
        rollout_log_probs=flat(batch.get("rollout_log_probs")),
        ref_log_probs=flat(batch.get("ref_log_probs")),
        advantages=flat(batch.get("advantages")),
    )
    result = policy_loss(inputs, LossSettings.of(args), plugins)
    if group is None:
        return result.loss, result.metrics
    # Every rank has computed the whole loss: its part is one of equal shares.
    size = parallel_state.cp_size
    return result.loss / size, {name: value / size for name, value in result.metrics.items()}


@state_optional
def sft_loss_function(
    args: Namespace,
    parallel_state: ParallelState,
    batch: Mapping[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Reducer,
) -> LossAndMetrics:
    """Minus the reduced log-probs of the response tokens: (loss, {"loss": loss})."""
    log_probs = get_log_probs_and_entropy(logits, **_rows(args, parallel_state, batch))["log_probs"]
    loss = -sum_of_sample_mean(torch.cat(log_probs))
    if not loss.requires_grad:  # no response token at all
        loss = loss + 0 * logits.sum()
    return loss, {"loss": loss.detach().clone()}


def _rows(args: Namespace, parallel_state: ParallelState, batch: Mapping[str, Any]) -> dict[str, Any]:
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    rows = {name: batch[name] for name in names}
    return {"args": args, "parallel_state": parallel_state, "max_seq_lens": batch.get("max_seq_lens"), **rows}
