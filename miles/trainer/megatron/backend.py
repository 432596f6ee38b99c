"""The megatron backend: Megatron-Core's GPT model under tensor, pipeline, context, expert and data parallelism.

    micro batches ──► inputs.arrange ──► Megatron's pipeline schedule ──► output ──► read, loss
                                              │ per model chunk
                                              └ routing.follow / taken

What passes yield on the last pipeline stage is handed to all stages, and response columns are whole on every rank: the
actor sees no parallelism but the data's. Ranks with fewer micro batches than others run the rest on one token, without
a gradient: experts and pipelines need all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import AutoConfig

from miles.batch.pack import PackedBatch, one_token
from miles.config import OptimizerConfig
from miles.trainer.backend import (
    LossFn,
    MicroLoss,
    ModelOutput,
    Record,
    RoutingShape,
    Snapshot,
    StepResult,
)
from miles.trainer.checkpoints import is_fsdps, refuse_other
from miles.trainer.hf_folder import EXPORT_BUCKET_BYTES, write_hf
from miles.trainer.megatron import checkpoint, convert
from miles.trainer.megatron.inputs import Inputs, arrange
from miles.trainer.megatron.model import GPT, Provider, Role, chunks, own_provider, unwrapped, wrapped
from miles.trainer.megatron.output import HiddenOutput, LogitsOutput
from miles.trainer.megatron.provided import adopt
from miles.trainer.megatron.ranks import from_last_stage, parallel_state, told_by_last_stage
from miles.trainer.megatron.routing import Routers
from miles.trainer.megatron.settings import MegatronSettings
from miles.trainer.ranks import Ranks, own_device
from miles.trainer.schedule import ParamScheduler, Schedule
from miles.trainer.snapshots import holding
from miles.weights import Weights


@dataclass(frozen=True)
class Work:
    """One micro batch on its way through the pipeline. `is_idle`: only there because other ranks have one."""

    micro: PackedBatch
    inputs: Inputs
    is_idle: bool = False


class MegatronBackend:
    """Implements `miles.trainer.backend.Backend`. `provider` is `--custom-model-provider-path`; ProviderError where it
    returns what cannot be trained."""

    def __init__(
        self,
        settings: MegatronSettings,
        optimizer: OptimizerConfig,
        ranks: Ranks,
        *,
        role: Role = "actor",
        seed: int = 0,
        provider: Provider | None = None,
        custom_loss: bool = False,
    ) -> None:
        self.settings, self.ranks, self.role = settings, ranks, role
        self.device = own_device()
        self.hf_config = AutoConfig.from_pretrained(settings.folder)
        self.config = settings.transformer_config(self.hf_config, self.device)
        vocabulary = settings.vocabulary(self.hf_config)
        self.parallel = parallel_state(vocabulary.size)
        made = chunks(
            self.config,
            provider or own_provider(self.config, self.hf_config, vocabulary),
            role=role,
            seed=seed,
            device=self.device,
        )
        # A model of the user's own may do anything between its last state and its logits.
        self._gives_hidden = provider is None
        if provider is not None:
            self.config = adopt(made, self.config, settings.folder, ranks, own_head=role == "critic")
        for model in made:
            if isinstance(model, GPT):
                model.gives_hidden = self._gives_hidden
        convert.load_hf(settings.folder, made, self.config, own_head=role == "critic")
        ddp = settings.ddp_config()
        self.model_chunks: list[Any] = wrapped(made, self.config, ddp, role)
        self.shares_prompts = self._gives_hidden and settings.qkv_format == "thd" and settings.layout.context == 1
        self.routing = self._routing_shape()
        self._routers = [self._routers_of(chunk) for chunk in self.model_chunks]
        self.has_dropout = self.config.hidden_dropout > 0 or self.config.attention_dropout > 0
        self.optimizer = get_megatron_optimizer(
            settings.optimizer_config(optimizer, distributed=ddp.use_distributed_optimizer), self.model_chunks
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self._overlap(ddp)
        self.scheduler = ParamScheduler(self.optimizer, Schedule(max_lr=optimizer.lr))
        self._saver = checkpoint.Saver()
        self._exporter: convert.Exporter | None = None

    def use_schedule(self, schedule: Schedule) -> None:
        self.scheduler = ParamScheduler(self.optimizer, schedule)

    def _overlap(self, ddp: DistributedDataParallelConfig) -> None:
        """What the pipeline schedule calls where gradients or parameters travel while it computes."""

        def of_chunks(name: str) -> Any:
            functions = [getattr(chunk, name) for chunk in self.model_chunks]
            return functions if len(functions) > 1 else functions[0]

        if ddp.overlap_grad_reduce:
            self.config.no_sync_func = of_chunks("no_sync")
            self.config.grad_sync_func = of_chunks("start_grad_sync") if len(self.model_chunks) > 1 else None
        if ddp.overlap_param_gather and ddp.align_param_gather and len(self.model_chunks) > 1:
            self.config.param_sync_func = of_chunks("start_param_sync")
        self._gathers_late = ddp.overlap_param_gather

    def _settle(self) -> None:
        """Bring parameters that are gathered at their next use to what the last step has made of them."""
        if self._gathers_late:
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    def _routing_shape(self) -> RoutingShape | None:
        config = self.config
        if config.num_moe_experts is None:
            return None
        return RoutingShape(config.num_layers, config.moe_router_topk, config.num_moe_experts)

    def _routers_of(self, chunk: Any) -> Routers | None:
        if self.routing is None:
            return None
        return Routers(
            unwrapped(chunk),
            self.routing,
            recomputed=self.config.recompute_granularity is not None,
            sequence_parallel=self.config.sequence_parallel,
        )

    # ---- passes --------------------------------------------------------------------------------------------------

    def forward_only(
        self,
        micro_batches: Sequence[PackedBatch],
        read: Callable[[PackedBatch, ModelOutput], Tensor],
        record: Record | None = None,
        before: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        for chunk in self.model_chunks:
            chunk.eval()
        found: list[Tensor] = []

        def on_last(work: Work, output: ModelOutput) -> tuple[Tensor, dict[str, Any]]:
            if not work.is_idle:
                found.append(read(work.micro, output))
            return output.hidden.new_zeros(1), {}

        try:
            with torch.no_grad():
                if before is not None:
                    before()
                self._run(micro_batches, on_last, record, training=False)
        finally:
            for chunk in self.model_chunks:
                chunk.train()
        return from_last_stage(found)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFn) -> list[MicroLoss]:
        results: list[MicroLoss] = []

        def on_last(work: Work, output: ModelOutput) -> tuple[Tensor, dict[str, Any]]:
            if work.is_idle:
                # Of every parameter: gradients that travel early wait for each of them.
                parts = (output.hidden, output.head_weight, output.head_bias)
                return sum(part.float().sum() * 0 for part in parts if part is not None), {}
            result = loss_fn(work.micro, output)
            results.append(result.detached())
            return result.loss, {}

        self._run(micro_batches, on_last, None, training=True)
        told = told_by_last_stage([[float(r.loss), {k: float(v) for k, v in r.metrics.items()}] for r in results])
        return [
            MicroLoss(torch.tensor(loss, dtype=torch.float64), {k: torch.tensor(v) for k, v in metrics.items()})
            for loss, metrics in told
        ]

    def _run(
        self,
        micro_batches: Sequence[PackedBatch],
        on_last: Callable[[Work, ModelOutput], tuple[Tensor, dict[str, Any]]],
        record: Record | None,
        *,
        training: bool,
    ) -> None:
        work = self._work(micro_batches)
        if not work:
            return
        scale = len(work) / self.parallel.cp_size  # Megatron multiplies by the one and divides by the other

        def forward_step(queue: Iterator[Work], chunk: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
            each = next(queue)
            raw = self._forward(chunk, each, record, training=training)

            def loss(raw: Tensor) -> tuple[Tensor, dict[str, Any]]:
                value, reported = on_last(each, self._output(chunk, raw, each.inputs))
                return value * scale, reported

            return raw, loss

        queues = [iter(work) for _ in self.model_chunks]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=queues if len(queues) > 1 else queues[0],
            model=self.model_chunks,
            num_microbatches=len(work),
            seq_length=1,  # shapes travel with the tensors
            micro_batch_size=1,
            forward_only=not training,
        )
        for routers in self._routers:
            if routers is not None:
                routers.forget()

    def _work(self, micro_batches: Sequence[PackedBatch]) -> list[Work]:
        """As many as the rank with the most has, in a number that the pipeline's interleaving can take."""
        layout = self.settings.layout
        number = self.ranks.largest(len(micro_batches))
        if layout.virtual is not None:
            number += -number % layout.pipeline
        idle = one_token(self.device)
        work = [Work(micro, self._arranged(micro)) for micro in micro_batches]
        return work + [Work(idle, self._arranged(idle), is_idle=True)] * (number - len(work))

    def _arranged(self, micro: PackedBatch) -> Inputs:
        layout, config = self.settings.layout, self.config
        multiple = math.lcm(self.settings.pad_to, layout.tensor if config.sequence_parallel else 1)
        context = mpu.get_context_parallel_group() if layout.context > 1 else None
        return arrange(micro, layout=self.settings.qkv_format, multiple_of=multiple, context=context)

    def _forward(self, chunk: Any, work: Work, record: Record | None, *, training: bool) -> Tensor:
        inputs = work.inputs
        routers = self._routers[self.model_chunks.index(chunk)]
        if routers is not None:
            routers.follow(work.micro.routed_experts, inputs.places)
        if self._gives_hidden:
            options = {"fp32_output": False} if self.settings.bf16 else {}
            raw = chunk(inputs.tokens, None, None, packed_seq_params=inputs.packed, **options)
        else:
            raw = chunk(
                input_ids=inputs.tokens,
                position_ids=None,
                attention_mask=None,
                labels=None,
                packed_seq_params=inputs.published,
                loss_mask=None,
            )
        if routers is not None:
            wanted = record is not None and not work.is_idle
            taken = routers.taken(inputs.places, len(work.micro.tokens), training=training, wanted=wanted)
            if taken is not None:
                assert record is not None
                record(work.micro, taken)
        return raw  # type: ignore[no-any-return]

    def _output(self, chunk: Any, raw: Tensor, inputs: Inputs) -> ModelOutput:
        if not self._gives_hidden:
            return LogitsOutput(raw, raw, inputs=inputs, parallel=self.parallel)
        model = unwrapped(chunk)
        if model.share_embeddings_and_output_weights:
            weight, bias = model.shared_embedding_or_output_weight(), None
        else:
            weight, bias = model.output_layer.weight, model.output_layer.bias
        return HiddenOutput(
            raw,
            weight,
            head_bias=bias,
            inputs=inputs,
            parallel=self.parallel,
            sequence_parallel=self.config.sequence_parallel,
        )

    # ---- optimizer steps -----------------------------------------------------------------------------------------

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values)

    def on_any_rank(self, happened: bool) -> bool:
        return self.ranks.any(happened)

    def gather_over_ranks(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        return self.ranks.gather(values)

    def zero_grad(self) -> None:
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def optimizer_step(self) -> StepResult:
        lr = self.scheduler.lr
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            self.zero_grad()
            return StepResult(norm, lr, skipped=True)
        for part in self.optimizer.chained_optimizers:
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step()
        return StepResult(norm, lr)

    def skip_step(self) -> StepResult:
        self.zero_grad()
        return StepResult(math.nan, self.scheduler.lr, skipped=True)

    def reset_optimizer(self) -> None:
        for part in self.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    # ---- weights -------------------------------------------------------------------------------------------------

    def weights(self) -> Weights:
        self._settle()
        if self._exporter is None:
            self._exporter = convert.Exporter(self.settings.folder, self._models(), self.config, experts="stacked")
        return self._exporter

    def _models(self) -> list[Any]:
        return [unwrapped(chunk) for chunk in self.model_chunks]

    def _own(self) -> dict[str, Tensor]:
        self._settle()
        return {name: tensor.detach() for name, tensor in convert.local_parameters(self.model_chunks).items()}

    def snapshot(self) -> Snapshot:
        return {name: tensor.clone() for name, tensor in self._own().items()}

    def using(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return holding(self._own(), snapshot)

    def read_snapshot(self, folder: Path, *, flag: str) -> Snapshot:
        if (folder / "config.json").is_file():
            found = convert.read_hf(folder, self._models(), self.config, flag=flag)
            return {name: tensor.to(self.device) for name, tensor in found.items()}
        if is_fsdps(folder):
            refuse_other("fsdp", "megatron", folder, flag)
        with self.using(self._own()):
            checkpoint.load(folder, self.model_chunks, None, flag=flag)
            return self.snapshot()

    def write_snapshot(self, snapshot: Snapshot, folder: Path) -> None:
        with self.using(snapshot):
            checkpoint.Saver().save(folder, self.model_chunks, None, 0, background=False)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, *, with_optimizer: bool, background: bool = False) -> None:
        self._settle()
        optimizer = self.optimizer if with_optimizer else None
        self._saver.save(folder, self.model_chunks, optimizer, self.scheduler.num_steps, background=background)

    def finish_saving(self) -> None:
        self._saver.finish()

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        steps = checkpoint.load(folder, self.model_chunks, self.optimizer if with_optimizer else None)
        if steps is None:
            self.optimizer.reload_model_params()
        else:
            self.scheduler.load_state_dict({"num_steps": steps})

    def export_hf(self, folder: Path) -> None:
        """In the dtype of the folder that training started from: an export is a drop-in for it."""
        self._settle()
        exporter = convert.Exporter(self.settings.folder, self._models(), self.config, experts="each")
        tensors = {
            name: tensor.to(self.hf_config.dtype or tensor.dtype, copy=True)
            for bucket in exporter.buckets(EXPORT_BUCKET_BYTES)
            for name, tensor in bucket.items()
        }
        if self.ranks.rank == 0:
            write_hf(folder, self.settings.folder, self.hf_config, tensors)
