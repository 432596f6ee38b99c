"""The published functions that plug-ins of the loss stage call, and what a custom loss is called with.

A custom loss (`--custom-loss-function-path`) is `fn(args, parallel_state, batch, logits, sum_of_sample_mean)`, with
fp32 logits [1, T, V] that are not yet divided by the temperature. `loss_batch` builds its `batch`, `custom_loss` makes
the call. The functions below read `args.rollout_temperature` of the caller and take packed (thd) rows that are whole in
one process; context and tensor parallelism bring the backend's own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.batch.media import joined_media
from miles.batch.pack import PackedBatch
from miles.errors import UsageError
from miles.loss.logprobs import log_probs_from_logits
from miles.loss.parallel_state import ParallelState
from miles.loss.reduce import Reducer, SumOfSampleMean
from miles.loss.types import LossOutput, detached

CustomLoss = Callable[[Any, ParallelState, dict[str, Any], Tensor, Reducer], tuple[Tensor, dict[str, Any]]]

# Columns of the batch dict that hold one tensor per sample, or None where they were not computed.
TOKEN_COLUMNS = ("log_probs", "ref_log_probs", "values", "advantages", "returns", "rollout_log_probs")


def loss_batch(
    micro: PackedBatch,
    columns: Mapping[str, Tensor],
    row_values: Mapping[str, Any] | None = None,
    *,
    dynamic_global_batch_size: int | None = None,
) -> dict[str, Any]:
    """The `batch` of a custom loss, under the published keys.

    `columns` maps names of `TOKEN_COLUMNS` to flat tensors [R] of this micro batch; those that are missing become None.
    `row_values` are the micro batch's rows of everything else that is known (`TrainBatch.row_values`): rewards,
    metadata, teacher_log_probs and the columns of a custom conversion go in as they are, media are joined.
    """
    row_values = row_values or {}
    media, num_items = joined_media(row_values.get("multimodal_train_inputs") or (), micro.tokens.device)
    full_masks = torch.zeros(micro.tokens.shape[0], dtype=micro.loss_mask.dtype, device=micro.tokens.device)
    full_masks[micro.predicting] = micro.loss_mask
    batch: dict[str, Any] = {
        **row_values,
        "tokens": micro.tokens[None],
        "unconcat_tokens": list(torch.split(micro.tokens, micro.total_lengths)),
        "packed_seq_params": None,
        "cu_seqlens": micro.cu_seqlens,
        "max_seqlen": micro.max_seqlen,
        "position_ids": micro.position_ids[None],
        "total_lengths": micro.total_lengths,
        "response_lengths": micro.response_lengths,
        "loss_masks": list(torch.split(micro.loss_mask, micro.response_lengths)),
        "full_loss_masks": full_masks[None],
        "max_seq_lens": None,
        "multimodal_train_inputs": media or None,
        "multimodal_num_items": num_items or None,
    }
    for name in dict.fromkeys((*TOKEN_COLUMNS, *columns)):
        flat = columns.get(name)
        batch[name] = None if flat is None else list(torch.split(flat, micro.response_lengths))
    if dynamic_global_batch_size is not None:
        batch["dynamic_global_batch_size"] = dynamic_global_batch_size
    return batch


def custom_loss(
    fn: CustomLoss,
    args: Namespace,
    parallel_state: ParallelState,
    micro: PackedBatch,
    batch: dict[str, Any],
    logits: Tensor,
    *,
    per_token: bool,
    scale: float,
) -> LossOutput:
    """Call a custom loss on one micro batch. Its loss is a sum over samples, and multiplied by `scale` here."""
    reduce = SumOfSampleMean(micro.loss_mask, micro.sample_ids, len(micro), per_token=per_token)
    result = fn(args, parallel_state, batch, logits, reduce)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise UsageError(f"--custom-loss-function-path: expected a pair (loss, metrics), got {type(result).__name__}.")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            "--custom-loss-function-path: expected the loss as a scalar tensor with gradient, a sum over samples. Add "
            "0 * logits.sum() where no token is trained."
        )
    return LossOutput(loss.reshape(()) * scale, detached(metrics, loss))


# ---- what custom losses call -------------------------------------------------------------------------------------


def get_responses(
    logits: Tensor,
    *,
    args: Namespace,
    parallel_state: ParallelState | None = None,
    unconcat_tokens: Sequence[Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    max_seq_lens: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per sample the logits [R_i, V] that predict its response, divided by the temperature, and its tokens [R_i].

    Without `parallel_state` (as losses that know of none call it) samples are whole in this process.
    """
    if parallel_state is not None and (parallel_state.cp_size != 1 or parallel_state.tp_size != 1):
        raise ValueError("samples or vocabularies cut over several ranks need the backend's own get_responses")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 logits, got {logits.dtype}")
    if max_seq_lens is not None:
        raise ValueError("max_seq_lens belongs to padded (bshd) batches; rows are packed here")
    end = 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths):
        end += total
        predicting = logits[0, end - response - 1 : end - 1] if response else logits[0, :0]
        yield predicting / args.rollout_temperature, tokens[total - response :]


def get_log_probs_and_entropy(
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
    """`{"log_probs": [R_i] per sample}` from `logits` [1, T, V], and `"entropy"` likewise if asked for.

    `non_loss_data` is accepted for pipeline schedules and changes nothing here.
    """
    results = [
        log_probs_from_logits(predicting, tokens, with_entropy=with_entropy)
        for predicting, tokens in get_responses(
            logits,
            args=args,
            parallel_state=parallel_state,
            unconcat_tokens=unconcat_tokens,
            total_lengths=total_lengths,
            response_lengths=response_lengths,
            max_seq_lens=max_seq_lens,
        )
    ]
    data = {"log_probs": [result.log_probs for result in results]}
    if with_entropy:
        data["entropy"] = [result.entropy for result in results if result.entropy is not None]
    return data
