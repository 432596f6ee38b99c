"""Published import path of the helpers for samples that context parallelism cuts into chunks.

Samples are whole in one process here: with `parallel_state.cp_size` 1 every helper has its published meaning, and any
other size is answered with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from miles.backends.training_utils.state_optional import state_optional
from miles.loss import reduce
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
    without any has (0, 0). Example, 5 tokens of which 3 are the response:
    `(3, ((0, 3), (3, 6)), ((1, 3), (3, 4)), ((2, 4), (4, 5)))`.
    """
    whole(parallel_state)
    padded = total_length if qkv_format == "thd" or max_seq_len is None else max_seq_len
    size = (padded + 1) // 2
    chunks = ((0, size), (size, 2 * size))
    first = total_length - response_length - 1
    scoring = tuple((max(start, first), min(end, total_length - 1)) for start, end in chunks)
    logits_0, logits_1 = (span if span[0] < span[1] else (0, 0) for span in scoring)
    tokens_0, tokens_1 = ((a + 1, b + 1) if a < b else (0, 0) for a, b in (logits_0, logits_1))
    return size, chunks, (logits_0, logits_1), (tokens_0, tokens_1)


def all_gather_with_cp(
    tensor: torch.Tensor, total_length: int, response_length: int, parallel_state: ParallelState | None = None
) -> torch.Tensor:
    """The response column [response_length] of a sample from the parts of all ranks; here the tensor itself."""
    whole(parallel_state)
    if tensor.shape[0] != response_length:
        raise ValueError(f"all_gather_with_cp: {tensor.shape[0]} values for a response of {response_length} tokens")
    return tensor


@state_optional
def slice_with_cp(
    tokens: torch.Tensor,
    pad_value: int | float | Callable[[torch.Tensor, int], torch.Tensor],
    parallel_state: ParallelState,
    qkv_format: str = "thd",
    max_seq_len: int | None = None,
) -> torch.Tensor:
    """This rank's part of `tokens`; here all of them, padded to `max_seq_len` in the layout bshd.

    `pad_value` fills, or is a function `(tokens, number of places) -> tokens`.
    """
    whole(parallel_state)
    if qkv_format == "thd":
        return tokens
    if max_seq_len is None:
        raise ValueError(f"slice_with_cp: the layout {qkv_format} needs max_seq_len")
    missing = max_seq_len - tokens.shape[0]
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
    """This rank's part of a sample's log-probs (a list or a tensor); here all of them."""
    whole(parallel_state)
    if len(log_prob) != response_length:
        raise ValueError(f"slice_log_prob_with_cp: {len(log_prob)} values for a response of {response_length} tokens")
    return log_prob


def whole(parallel_state: ParallelState | None) -> None:
    if parallel_state is not None and parallel_state.cp_size != 1:
        raise ValueError(
            f"samples cut over {parallel_state.cp_size} context-parallel ranks are not supported. Expected "
            "--context-parallel-size 1."
        )
