"""The published functions that plug-ins of the loss stage call, and what a custom loss is called with.

A custom loss (`--custom-loss-function-path`) is `fn(args, parallel_state, batch, logits, sum_of_sample_mean)`, with
fp32 logits that are not yet divided by the temperature. `loss_batch` builds its `batch`, `custom_loss` makes the call.
The functions below read `args.rollout_temperature` of the caller.

Logits are [1, T, V] of packed rows (thd), or [B, S, V] of padded ones (bshd; `max_seq_lens`). Under tensor parallelism
V is this rank's part of the vocabulary, and log-probs and entropies come out whole. Under context parallelism T are
this rank's tokens (`context_parallel`); columns of the batch and what the functions return are this rank's part of each
sample, masks and lengths are those of whole samples, and the loss and the metrics are this rank's part of a sum.
"""

from __future__ import annotations

import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miles.batch.media import joined_media
from miles.batch.pack import PackedBatch
from miles.errors import UsageError
from miles.loss.context_parallel import ContextShare, group_of, local_share, share_of, sum_of_parts
from miles.loss.logprobs import TokenLogProbs
from miles.loss.parallel_state import ParallelState
from miles.loss.reduce import Reducer, SumOfSampleMean, SumOfSampleMeanPart
from miles.loss.types import LossOutput, detached
from miles.loss.vocab_parallel import log_probs_from_logits, shard_of

CustomLoss = Callable[[Any, ParallelState, dict[str, Any], Tensor, Reducer], tuple[Tensor, dict[str, Any]]]

# Columns of the batch dict that hold one tensor per sample, or None where they were not computed.
TOKEN_COLUMNS = ("log_probs", "ref_log_probs", "values", "advantages", "returns", "rollout_log_probs")


def loss_batch(
    micro: PackedBatch,
    columns: Mapping[str, Tensor],
    row_values: Mapping[str, Any] | None = None,
    *,
    dynamic_global_batch_size: int | None = None,
    parallel_state: ParallelState | None = None,
    num_places: int | None = None,
    max_seq_len: int | None = None,
    packed_seq_params: Any = None,
) -> dict[str, Any]:
    """The `batch` of a custom loss, under the published keys.

    `columns` maps names of `TOKEN_COLUMNS` to flat tensors [R] of this micro batch, whole under context parallelism
    too; those that are missing become None. `row_values` are the micro batch's rows of everything else that is known
    (`TrainBatch.row_values`): rewards, metadata, teacher_log_probs and the columns of a custom conversion go in as they
    are, media are joined.

    `num_places` is the length of the packed logits where the backend padded the end of the packed tokens (with 0, as a
    row of its own in `cu_seqlens`). `max_seq_len` lays rows out padded to it, [B, S] (bshd). `packed_seq_params` is the
    backend's own description of the packed rows.
    """
    row_values = row_values or {}
    media, num_items = joined_media(row_values.get("multimodal_train_inputs") or (), micro.tokens.device)
    state = parallel_state or ParallelState.single_process()
    if max_seq_len is not None:
        layout = _padded_layout(micro, state, max_seq_len)
    else:
        layout = _packed_layout(micro, state, num_places)
    batch: dict[str, Any] = {
        **row_values,
        **layout,
        "unconcat_tokens": list(torch.split(micro.tokens, micro.total_lengths)),
        "packed_seq_params": packed_seq_params,
        "total_lengths": micro.total_lengths,
        "response_lengths": micro.response_lengths,
        "loss_masks": list(torch.split(micro.loss_mask, micro.response_lengths)),
        "multimodal_train_inputs": media or None,
        "multimodal_num_items": num_items or None,
    }
    share = _share_of_micro(micro, state) if state.cp_size > 1 else None
    for name in dict.fromkeys((*TOKEN_COLUMNS, *columns)):
        flat = columns.get(name)
        if flat is None:
            batch[name] = None
        else:
            batch[name] = list(torch.split(flat, micro.response_lengths)) if share is None else share.pieces(flat)
    if dynamic_global_batch_size is not None:
        batch["dynamic_global_batch_size"] = dynamic_global_batch_size
    return batch


def _share_of_micro(micro: PackedBatch, state: ParallelState) -> ContextShare:
    return local_share(state, micro.total_lengths, micro.response_lengths, micro.tokens.device)


def _packed_layout(micro: PackedBatch, state: ParallelState, num_places: int | None) -> dict[str, Any]:
    """The keys that depend on it, for packed rows [1, T]; under context parallelism this rank's tokens."""
    tokens, position_ids, cu_seqlens, longest = micro.tokens, micro.position_ids, micro.cu_seqlens, micro.max_seqlen
    predicting, mask = micro.predicting, micro.loss_mask
    if state.cp_size > 1:
        share = _share_of_micro(micro, state)
        tokens, position_ids, cu_seqlens = share.local_tokens(tokens), share.position_ids, share.cu_seqlens()
        predicting, mask = share.places, mask.index_select(0, share.own)
        longest = int(share.local_lengths.max(initial=0)) * state.cp_size
    missing = 0 if num_places is None else num_places - len(tokens)
    if missing:
        tokens = F.pad(tokens, (0, missing))
        position_ids = torch.cat([position_ids, torch.arange(missing, device=position_ids.device)])
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + missing * state.cp_size])
        longest = max(longest, missing * state.cp_size)
    full_masks = torch.zeros(len(tokens), dtype=mask.dtype, device=mask.device)
    full_masks[predicting] = mask
    return {
        "tokens": tokens[None],
        "cu_seqlens": cu_seqlens,
        "max_seqlen": longest,
        "position_ids": position_ids[None],
        "full_loss_masks": full_masks[None],
        "max_seq_lens": None,
    }


def _padded_layout(micro: PackedBatch, state: ParallelState, max_seq_len: int) -> dict[str, Any]:
    """The same for padded rows [B, S]."""
    if state.cp_size != 1:
        raise ValueError(f"padded (bshd) rows are whole: expected a cp_size of 1, got {state.cp_size}")
    max_seq_lens = [max_seq_len] * len(micro)
    share = share_of(
        micro.total_lengths, micro.response_lengths, rank=0, size=1, device=micro.tokens.device,
        padded_lengths=max_seq_lens,
    )  # fmt: skip
    full_masks = torch.zeros(share.num_places, dtype=micro.loss_mask.dtype, device=micro.tokens.device)
    full_masks[share.places] = micro.loss_mask
    shape = (len(micro), max_seq_len)
    return {
        "tokens": share.local_tokens(micro.tokens).view(shape),
        "cu_seqlens": None,
        "max_seqlen": None,
        "position_ids": share.position_ids.view(shape),
        "full_loss_masks": full_masks.view(shape),
        "max_seq_lens": max_seq_lens,
    }


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
    """Call a custom loss on one micro batch. Its loss is a sum over samples, and multiplied by `scale` here.

    Under context parallelism the loss that comes out is this rank's part; metrics are summed over the ranks, so that
    they are whole on each of them, as those of the built-in losses are.
    """
    group = group_of(parallel_state)
    reduce: Reducer
    if group is None:
        reduce = SumOfSampleMean(micro.loss_mask, micro.sample_ids, len(micro), per_token=per_token)
    else:
        own = _share_of_micro(micro, parallel_state).own
        reduce = SumOfSampleMeanPart(micro.loss_mask, micro.sample_ids, len(micro), own, per_token=per_token)
    result = fn(args, parallel_state, batch, logits, reduce)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise UsageError(f"--custom-loss-function-path: expected a pair (loss, metrics), got {type(result).__name__}.")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            "--custom-loss-function-path: expected the loss as a scalar tensor with gradient, a sum over samples. Add "
            "0 * logits.sum() where no token is trained."
        )
    numbers = detached(metrics, loss)
    if group is not None:
        numbers = _summed_over_ranks(numbers, loss, parallel_state)
    return LossOutput(loss.reshape(()) * scale, numbers)


def _summed_over_ranks(metrics: dict[str, Tensor], like: Tensor, parallel_state: ParallelState) -> dict[str, Tensor]:
    """Every rank's part of each metric, summed. UsageError on every rank where their names differ."""
    group = group_of(parallel_state)
    mark = float(zlib.crc32("\n".join(metrics).encode()))  # of the names in their order
    extremes = torch.tensor([mark, -mark], dtype=torch.float64, device=like.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if extremes.tolist() != [mark, -mark]:
        raise UsageError(
            "--custom-loss-function-path: expected the same metrics in the same order from every context-parallel "
            "rank, also from one that has no response token; this one returned "
            f"{', '.join(metrics) or 'none'}."
        )
    if not metrics:
        return metrics
    total = sum_of_parts(torch.stack([value.reshape(()).double() for value in metrics.values()]), group)
    return {name: total[i].to(value.dtype) for i, (name, value) in enumerate(metrics.items())}


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

    `unconcat_tokens` are whole rows. Under context parallelism both are those of the tokens that this rank owns; under
    tensor parallelism the logits are this rank's columns. Without `parallel_state` (as losses that know of none call
    it) samples are whole in this process.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 logits, got {logits.dtype}")
    state = parallel_state or ParallelState.single_process()
    if state.cp_size == 1 and max_seq_lens is None:
        yield from _responses_of_whole_rows(logits, args, unconcat_tokens, total_lengths, response_lengths)
        return
    if state.cp_size > 1 and max_seq_lens is not None:
        raise ValueError(f"max_seq_lens: padded (bshd) rows are whole, and cp_size is {state.cp_size}")
    share = share_of(
        total_lengths, response_lengths, rank=state.cp_rank, size=state.cp_size, device=logits.device,
        padded_lengths=max_seq_lens,
    )  # fmt: skip
    predicting = logits.flatten(0, 1).index_select(0, share.places) / args.rollout_temperature
    rows = [tokens[total - n :] for tokens, total, n in zip(unconcat_tokens, total_lengths, response_lengths)]
    targets = share.pieces(torch.cat(rows)) if rows else []
    yield from zip(torch.split(predicting, share.own_lengths), targets)


def _responses_of_whole_rows(
    logits: Tensor,
    args: Namespace,
    unconcat_tokens: Sequence[Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
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

    Of this rank's tokens under context parallelism, and over the whole vocabulary. `non_loss_data` is accepted for
    pipeline schedules and changes nothing here.
    """
    state = parallel_state or ParallelState.single_process()
    shard = shard_of(state, logits.shape[-1])
    responses = get_responses(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=unconcat_tokens,
        total_lengths=total_lengths,
        response_lengths=response_lengths,
        max_seq_lens=max_seq_lens,
    )

    def read(predicting: Tensor, tokens: Tensor) -> TokenLogProbs:
        return log_probs_from_logits(predicting, tokens, with_entropy=with_entropy, **shard._asdict())

    if state.tp_size == 1:
        results = [read(predicting, tokens) for predicting, tokens in responses]
    else:
        results = _all_at_once(list(responses), read)
    data = {"log_probs": [result.log_probs for result in results]}
    if with_entropy:
        data["entropy"] = [result.entropy for result in results if result.entropy is not None]
    return data


def _all_at_once(
    responses: list[tuple[Tensor, Tensor]], read: Callable[[Tensor, Tensor], TokenLogProbs]
) -> list[TokenLogProbs]:
    """`read` of every sample in one call: its all-reduces then travel once, not once per sample."""
    if not responses:
        return []
    lengths = [len(tokens) for _, tokens in responses]
    whole = read(torch.cat([z for z, _ in responses]), torch.cat([tokens for _, tokens in responses]))
    entropies = [None] * len(lengths) if whole.entropy is None else torch.split(whole.entropy, lengths)
    return [TokenLogProbs(x, h) for x, h in zip(torch.split(whole.log_probs, lengths), entropies)]
