"""Published import path of the helpers for samples that context parallelism cuts into chunks.

A row is padded to a multiple of 2 * cp_size and cut into as many chunks, of which a rank owns two
(`miles.loss.context_parallel`). A response token belongs to the rank that has the logit at the place before it, which
scores it. Without a `parallel_state`, or with a `cp_size` of 1, samples are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from miles.backends.training_utils.state_optional import state_optional
from miles.loss import reduce
from miles.loss.context_parallel import gather_response_of_parts, group_of
from miles.loss.parallel_state import ParallelState

__all__ = [
    "all_gather_with_cp",
    "get_logits_and_tokens_offset_with_cp",
    "get_sum_of_sample_mean",
    "slice_log_prob_with_cp",
    "slice_with_cp",
]

Range = tuple[int, int]

get_sum_of_sample_mean = state_optional(reduce.get_sum_of_sample_mean)


@state_optional
def get_logits_and_tokens_offset_with_cp(
    total_length: int,
    response_length: int,
    parallel_state: ParallelState,
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
) -> tuple[int, tuple[Range, Range], tuple[Range, Range], tuple[Range, Range]]:
    """(chunk size, two chunks, their logits, their tokens): ranges [start, end) of one sample.

    A rank owns two chunks of a sample; alone it owns both halves. The logit at t - 1 scores the response token t, so
    the second pair says which logits of each chunk score response tokens, and the third which tokens those are. A chunk
    without any has (0, 0). Example, 5 tokens of which 3 are the response, on one rank:
    `(3, ((0, 3), (3, 6)), ((1, 3), (3, 4)), ((2, 4), (4, 5)))`.
    """
    rank, count = parallel_state.cp_rank, 2 * parallel_state.cp_size
    padded = total_length if qkv_format == "thd" or max_seq_len is None else max_seq_len
    size = -(-padded // count)
    chunks = ((rank * size, (rank + 1) * size), ((count - 1 - rank) * size, (count - rank) * size))
    first = total_length - response_length - 1
    scoring = tuple((max(start, first), min(end, total_length - 1)) for start, end in chunks)
    logits_0, logits_1 = (span if span[0] < span[1] else (0, 0) for span in scoring)
    tokens_0, tokens_1 = ((a + 1, b + 1) if a < b else (0, 0) for a, b in (logits_0, logits_1))
    return size, chunks, (logits_0, logits_1), (tokens_0, tokens_1)


def all_gather_with_cp(
    tensor: torch.Tensor, total_length: int, response_length: int, parallel_state: ParallelState | None = None
) -> torch.Tensor:
    """The response column [response_length] of a sample from the parts of all ranks.

    Every rank of the group must call it, in the same order, also one that owns no token of the sample. Differentiable:
    each rank gets the gradient of its own part, summed over the ranks, because every rank's loss is a part of the whole
    one and may depend on all parts.
    """
    state = parallel_state or ParallelState.single_process()
    if state.cp_size == 1:
        if tensor.shape[0] != response_length:
            raise ValueError(f"all_gather_with_cp: {tensor.shape[0]} values for a response of {response_length} tokens")
        return tensor
    places = own_places(total_length, response_length, state)
    own = torch.cat([torch.arange(start, end, device=tensor.device) for start, end in places])
    if tensor.shape[0] != len(own):
        raise ValueError(
            f"all_gather_with_cp: {tensor.shape[0]} values where this rank has {len(own)} of a response of "
            f"{response_length} tokens"
        )
    return gather_response_of_parts(tensor, own, response_length, group_of(state))


@state_optional
def slice_with_cp(
    tokens: torch.Tensor,
    pad_value: int | float | Callable[[torch.Tensor, int], torch.Tensor],
    parallel_state: ParallelState,
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
) -> torch.Tensor:
    """This rank's two chunks of `tokens`, one after the other; alone all of them, padded to `max_seq_len` in bshd.

    `pad_value` fills, or is a function `(tokens, number of places) -> tokens`.
    """
    if qkv_format != "thd" and max_seq_len is None:
        raise ValueError(f"slice_with_cp: the layout {qkv_format} needs max_seq_len")
    if qkv_format == "thd" and parallel_state.cp_size == 1:
        return tokens
    length = tokens.shape[0]
    size, chunks, _, _ = get_logits_and_tokens_offset_with_cp(length, 0, parallel_state, qkv_format, max_seq_len)
    padded = max_seq_len if parallel_state.cp_size == 1 else 2 * parallel_state.cp_size * size
    assert padded is not None
    tokens = with_padding(tokens, padded - length, pad_value)
    return tokens if parallel_state.cp_size == 1 else torch.cat([tokens[start:end] for start, end in chunks])


def with_padding(
    tokens: torch.Tensor, missing: int, pad_value: int | float | Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    if callable(pad_value):
        return pad_value(tokens, missing)
    return F.pad(tokens, (0, 0) * (tokens.dim() - 1) + (0, missing), value=pad_value)


@state_optional
def slice_log_prob_with_cp(
    log_prob: list[float] | torch.Tensor,
    total_length: int,
    response_length: int,
    parallel_state: ParallelState,
    qkv_format: str = "thd",
    max_token_len: int | None = None,
) -> Any:
    """This rank's part of a response column of a sample (a list or a tensor); alone all of it."""
    if len(log_prob) != response_length:
        raise ValueError(f"slice_log_prob_with_cp: {len(log_prob)} values for a response of {response_length} tokens")
    if parallel_state.cp_size == 1:
        return log_prob
    first, second = own_places(total_length, response_length, parallel_state, qkv_format, max_token_len)
    parts = log_prob[slice(*first)], log_prob[slice(*second)]
    return torch.cat(parts) if isinstance(log_prob, torch.Tensor) else [*parts[0], *parts[1]]


def own_places(
    total_length: int,
    response_length: int,
    parallel_state: ParallelState,
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
) -> tuple[Range, Range]:
    """Ranges [start, end) of the response that this rank owns."""
    tokens = get_logits_and_tokens_offset_with_cp(
        total_length, response_length, parallel_state, qkv_format, max_seq_len
    )[3]
    prompt = total_length - response_length
    first, second = ((start - prompt, end - prompt) if end else (0, 0) for start, end in tokens)
    return first, second
