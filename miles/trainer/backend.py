"""What a trainer backend promises, and what the actor builds on it.

A backend owns the model, the optimizer and *the loop over micro batches* (pipeline stages interleave them, so nobody
else can own it). It knows nothing of rewards, advantages or which loss is trained: that is `miles.trainer.actor`, once
for all backends. A line that appears in two backends belongs there.

    actor                                     backend
      plan micro batches
      log_probs ────────────────────────────► forward_only(micro_batches, read)
      advantages, hooks
      per optimizer step ───────────────────► zero_grad
                                              forward_backward(micro_batches, loss_fn)
                                              optimizer_step -> StepResult

A backend with pipeline stages calls `read` and `loss_fn` on the last stage only and hands the results to all of them.
One with tensor or context parallelism gives a `ModelOutput` whose values are whole on every rank. So all ranks that
hold the same samples go on with the same numbers, and the actor knows no parallelism but that of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from miles.batch.pack import PackedBatch
from miles.loss.logprobs import TokenLogProbs, linear_log_probs
from miles.loss.parallel_state import ParallelState
from miles.trainer.schedule import Schedule
from miles.weights import Weights


class Layout(TypedDict, total=False):
    """Of logits that are padded; see `miles.loss.published.loss_batch`."""

    num_places: int
    max_seq_len: int
    packed_seq_params: Any


@dataclass(frozen=True)
class ModelOutput:
    """The last hidden states of one micro batch and the projection to the vocabulary, not yet multiplied.

    Built-in losses project only the positions that predict a response token, in chunks; custom losses ask for
    `logits()` and pay for all of them. `hidden` [T, D] in the model's dtype; `head_weight` [V, D]. A critic's head has
    one row and a bias [1]. Losses are differentiable in `hidden` and `head_weight` and in nothing else of it.
    """

    hidden: Tensor
    head_weight: Tensor
    head_bias: Tensor | None = None
    linear_log_probs: Callable[..., TokenLogProbs] = linear_log_probs  # or `exact_logprobs.linear_log_probs`

    def log_probs(
        self, micro: PackedBatch, *, temperature: float, with_entropy: bool, chunk_tokens: int | None
    ) -> TokenLogProbs:
        """Of the response tokens [R] of `micro`, computed `chunk_tokens` at a time (None: the built-in size)."""
        return self.linear_log_probs(
            self.hidden.index_select(0, micro.predicting),
            self.head_weight,
            micro.targets,
            temperature=temperature,
            with_entropy=with_entropy,
            chunk_tokens=chunk_tokens,
        )

    def logits(self) -> Tensor:
        """fp32 [1, T, V], not divided by the temperature: the published view of custom losses."""
        return (self.hidden @ self.head_weight.T).float().unsqueeze(0)

    @property
    def layout(self) -> Layout:
        """How the rows stand in `logits()`, as custom losses are told."""
        return {}

    def values(self, micro: PackedBatch) -> Tensor:
        """A critic's values of the states that predict the response tokens: [R], float32 (float64 for float64)."""
        assert self.head_weight.shape[0] == 1 and self.head_bias is not None
        values = self.hidden.index_select(0, micro.predicting) @ self.head_weight[0] + self.head_bias
        return values.to(torch.promote_types(torch.float32, values.dtype))


@dataclass(frozen=True)
class MicroLoss:
    """One micro batch's loss, scaled so that the sum over micro batches is the step's loss, and what to report.

    `metrics` are sums over the micro batch's samples (or tokens); the actor divides them once per step.
    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def detached(self) -> MicroLoss:
        return MicroLoss(self.loss.detach(), {name: value.detach() for name, value in self.metrics.items()})


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` is the global norm before clipping; `skipped` says that it was not finite and nothing changed."""

    grad_norm: float
    lr: float
    skipped: bool = False


@dataclass(frozen=True)
class RoutingShape:
    """The numbers of a mixture of experts: layers (dense ones included), experts, and how many a token takes."""

    num_layers: int
    top_k: int
    num_experts: int


Snapshot = Mapping[str, Tensor]
"""This process's share of a set of weights, by name: a reference model's, an older policy's. Never the tensors in
training."""

LossFn = Callable[[PackedBatch, ModelOutput], MicroLoss]

Record = Callable[[PackedBatch, Tensor], None]
"""(micro batch, experts int32 [P, layers, top_k] that a pass took; -1 where this rank does not know)."""


class Backend(Protocol):
    """One process's share of a model in training."""

    parallel: ParallelState
    device: torch.device
    # What hooks receive: a list of model chunks (one per virtual pipeline stage), the optimizer, the scheduler.
    model_chunks: Sequence[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    # The Hugging Face config of the model.
    hf_config: Any
    # Whether a forward pass in training mode differs from one in evaluation mode.
    has_dropout: bool
    # Whether passes understand rows that share one copy of their prompt.
    shares_prompts: bool
    # None for a dense model. With experts, passes follow `PackedBatch.routed_experts`.
    routing: RoutingShape | None

    def use_schedule(self, schedule: Schedule) -> None:
        """Once, when the length of the run is known."""

    def forward_only(
        self,
        micro_batches: Sequence[PackedBatch],
        read: Callable[[PackedBatch, ModelOutput], Tensor],
        record: Record | None = None,
        before: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        """`read` of every micro batch in evaluation mode, without gradients, in main memory; `record` is told the
        experts that each took. `before` is called first, once, in that mode. Ranks may have unequal numbers of micro
        batches, or none; all of them must call this, and `forward_backward`, equally often."""

    def forward_backward(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFn) -> list[MicroLoss]:
        """Accumulate the gradients of all micro batches; what `loss_fn` gave for each, detached, in the same order."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Summed over data-parallel ranks, for metrics and token counts."""

    def on_any_rank(self, happened: bool) -> bool:
        """Whether it happened on one of all ranks: what they go on to do together depends on it."""

    def gather_over_ranks(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        """Named numbers of every data-parallel rank, in their order; names may differ between ranks."""

    def zero_grad(self) -> None: ...

    def optimizer_step(self) -> StepResult:
        """Clip, step, advance the schedule. A gradient that is not finite changes nothing and is reported."""

    def skip_step(self) -> StepResult:
        """In place of `optimizer_step`, where the loss is not finite: forget the gradients, change nothing."""

    def reset_optimizer(self) -> None:
        """Forget the moments and step counts (`--reset-optimizer-states`)."""

    def weights(self) -> Weights:
        """All weights under the names of the Hugging Face model (experts stacked in two tensors per layer)."""

    def save(self, folder: Path, *, with_optimizer: bool, background: bool = False) -> None:
        """Model, optimizer and schedule under `folder`, which exists and is empty; as they are now, also where they
        are written in the background."""

    def finish_saving(self) -> None:
        """Wait for what `save` writes in the background. Raises what went wrong with it."""

    def snapshot(self) -> Snapshot:
        """A copy of the weights as they are."""

    def using(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """Passes inside it run with the snapshot's weights. The model is pointed at other tensors, none is written: an
        engine that reads the trainer's own may serve meanwhile."""

    def read_snapshot(self, folder: Path, *, flag: str) -> Snapshot:
        """From a Hugging Face folder, a folder of `save`, or one of `write_snapshot`; the model's weights stay.
        CheckpointError, which names `flag`, where it does not fit this model."""

    def write_snapshot(self, snapshot: Snapshot, folder: Path) -> None:
        """Under `folder`, which exists and is empty."""

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """The inverse of `save`; CheckpointError where it does not fit this model."""

    def export_hf(self, folder: Path) -> None:
        """A Hugging Face model folder that `transformers` loads without miles."""
