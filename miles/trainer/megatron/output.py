"""What a Megatron model's last stage yields for one micro batch, as losses read it: the same numbers on every rank of
the stage.

    hidden [S, B, D]  cut over tensor-parallel ranks with sequence parallelism  ─┐
                      cut over context-parallel ranks                            ├─►  log-probs [R], values [R]
    projection        rows cut over tensor-parallel ranks                       ─┘

A rank gets all R values of the micro batch, and in the backward pass the gradient of its own part of them. Custom
losses get the published view instead: `logits`, of this rank's places and rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from miles.batch.pack import PackedBatch
from miles.loss import context_parallel, vocab_parallel
from miles.loss.logprobs import TokenLogProbs
from miles.loss.parallel_state import ParallelState
from miles.trainer.backend import Layout, ModelOutput
from miles.trainer.megatron.inputs import Inputs

# What stands in logits at rows that are no token: finite, so that 0 times it is 0, and exp of it is 0.
NEVER = -1e30


@dataclass(frozen=True, kw_only=True)
class HiddenOutput(ModelOutput):
    """Hidden states and this rank's rows of the projection, not yet multiplied."""

    inputs: Inputs
    parallel: ParallelState
    sequence_parallel: bool

    def log_probs(
        self, micro: PackedBatch, *, temperature: float, with_entropy: bool, chunk_tokens: int | None
    ) -> TokenLogProbs:
        if self.sequence_parallel:
            states = self._flat(gather_from_sequence_parallel_region(self.hidden))
        else:
            states = copy_to_tensor_model_parallel_region(self._flat(self.hidden))
        shard = vocab_parallel.shard_of(self.parallel, self.head_weight.shape[0])
        targets = micro.targets if self.inputs.share is None else micro.targets[self.inputs.share.own]
        local = vocab_parallel.linear_log_probs(
            states,
            self.head_weight,
            targets,
            **shard._asdict(),
            temperature=temperature,
            with_entropy=with_entropy,
            chunk_tokens=chunk_tokens,
        )
        return _of_all_ranks(local, self.inputs, self.parallel)

    def logits(self) -> Tensor:
        """float32 [B, S of this rank, V / tp]."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(self.hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(self.hidden)
        return masked((hidden @ self.head_weight.T).float().transpose(0, 1), self.parallel)

    def values(self, micro: PackedBatch) -> Tensor:
        assert self.head_weight.shape[0] == 1 and self.head_bias is not None
        hidden = self.hidden
        if self.sequence_parallel:  # every rank computes the same values: the gradient of its own part is its own
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        local = self._flat(hidden) @ self.head_weight[0] + self.head_bias
        local = local.to(torch.promote_types(torch.float32, local.dtype))
        share = self.inputs.share
        return local if share is None else context_parallel.gather_response(local, share, self.parallel.cp_group)

    @property
    def layout(self) -> Layout:
        return layout_of(self.inputs)

    def _flat(self, hidden: Tensor) -> Tensor:
        """The states that predict response tokens [R of this rank, D]."""
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.inputs.states)


@dataclass(frozen=True, kw_only=True)
class LogitsOutput(ModelOutput):
    """Of a model of the user's own, which gives logits: `hidden` holds them, [B, S of this rank, V / tp]."""

    inputs: Inputs
    parallel: ParallelState

    def log_probs(
        self, micro: PackedBatch, *, temperature: float, with_entropy: bool, chunk_tokens: int | None
    ) -> TokenLogProbs:
        flat = self.hidden.transpose(0, 1).reshape(-1, self.hidden.shape[-1]).index_select(0, self.inputs.states)
        shard = vocab_parallel.shard_of(self.parallel, flat.shape[-1])
        targets = micro.targets if self.inputs.share is None else micro.targets[self.inputs.share.own]
        local = vocab_parallel.log_probs_from_logits(
            flat, targets, **shard._asdict(), temperature=temperature, with_entropy=with_entropy
        )
        return _of_all_ranks(local, self.inputs, self.parallel)

    def logits(self) -> Tensor:
        return masked(self.hidden.float(), self.parallel)

    @property
    def layout(self) -> Layout:
        return layout_of(self.inputs)

    def values(self, micro: PackedBatch) -> Tensor:
        """From a critic's [B, S of this rank, 1]."""
        flat = self.hidden.transpose(0, 1).reshape(-1).index_select(0, self.inputs.states).float()
        share = self.inputs.share
        return flat if share is None else context_parallel.gather_response(flat, share, self.parallel.cp_group)


def layout_of(inputs: Inputs) -> Layout:
    if inputs.published is None:
        return {"max_seq_len": inputs.tokens.shape[1]}
    return {"num_places": inputs.tokens.shape[1], "packed_seq_params": inputs.published}


def _of_all_ranks(local: TokenLogProbs, inputs: Inputs, parallel: ParallelState) -> TokenLogProbs:
    if inputs.share is None:
        return local
    return context_parallel.gathered_log_probs(local, inputs.share, parallel.cp_group)


def masked(logits: Tensor, parallel: ParallelState) -> Tensor:
    """Logits [..., V / tp] whose rows without a token never win, nor count in a sum."""
    shard = vocab_parallel.shard_of(parallel, logits.shape[-1])
    if shard.real_rows == logits.shape[-1]:
        return logits
    rows = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(rows >= shard.real_rows, NEVER)
