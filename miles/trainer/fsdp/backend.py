"""The fsdp backend: the Hugging Face model itself, on packed rows.

One process needs no process group. Several cut this same model into shards (`shard`) and run the same passes on samples
of their own: a rank with fewer micro batches than another runs the rest on one token, without a gradient, because
every pass gathers weights from all of them. Gradients are averaged over ranks: the actor's scale is the published one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from miles.batch.pack import PackedBatch, one_token
from miles.config import OptimizerConfig, TrainConfig
from miles.loss import exact_logprobs
from miles.loss.logprobs import linear_log_probs
from miles.trainer.backend import LossFn, MicroLoss, ModelOutput, Record, Snapshot, StepResult
from miles.trainer.checkpoints import is_megatrons, refuse_other
from miles.trainer.fsdp import checkpoint, exact, moe
from miles.trainer.fsdp.model import load_model, on_disk, owned_tensors, stored_tensors, use_value_head
from miles.trainer.hf_folder import EXPORT_BUCKET_BYTES, write_hf
from miles.trainer.packed_attention import Packing
from miles.trainer.ranks import Ranks, own_device
from miles.trainer.schedule import ParamScheduler, Schedule
from miles.trainer.snapshots import holding
from miles.weights.gather import Held

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class FsdpBackend:
    """Implements `miles.trainer.backend.Backend`. A critic's projection to the vocabulary is replaced by one to a
    number, which `seed` decides at first; plug-ins tell the two apart by `model_chunks[0].role`."""

    def __init__(
        self,
        hf_checkpoint: str,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        ranks: Ranks | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        role: Literal["actor", "critic"] = "actor",
        seed: int = 0,
    ) -> None:
        self.ranks = ranks or Ranks.alone()
        self.parallel = self.ranks.parallel_state()
        self.device = own_device()
        self.source = hf_checkpoint
        self.model = load_model(hf_checkpoint, dtype=dtype, gradient_checkpointing=train.gradient_checkpointing)
        if role == "critic":
            use_value_head(self.model, seed)
        self.model.role = role
        offload = train.fsdp_cpu_offload and self.device.type == "cuda"
        if self.ranks.mesh is not None:
            from miles.trainer.fsdp.shard import shard

            narrow = torch.bfloat16 if train.fsdp_param_dtype == "bfloat16" else None
            shard(self.model, self.ranks.mesh, param_dtype=narrow, cpu_offload=offload)
        if not offload:
            self.model.to(self.device)
        self._idle = one_token(self.device)
        self._saver = checkpoint.Saver(self.ranks)
        self.model_chunks, self.hf_config = [self.model], self.model.config
        self.shares_prompts = True
        self.routers = moe.use_in(self.model)
        self._linear_log_probs = linear_log_probs
        if train.true_on_policy_mode:
            exact.use_in(self.model, self.routers)
            self._linear_log_probs = exact_logprobs.linear_log_probs
        self.routing = None if self.routers is None else self.routers.shape
        self.has_dropout = any(
            isinstance(value, float) and value > 0
            for name, value in self.model.config.to_dict().items()
            if "dropout" in name
        )
        self.clip_grad = optimizer.clip_grad
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=optimizer.lr,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.scheduler = ParamScheduler(self.optimizer, Schedule(max_lr=optimizer.lr))

    def use_schedule(self, schedule: Schedule) -> None:
        self.scheduler = ParamScheduler(self.optimizer, schedule)

    # ---- passes --------------------------------------------------------------------------------------------------

    def _forward(self, micro: PackedBatch) -> ModelOutput:
        inputs = {
            "input_ids": micro.tokens[None],
            "position_ids": micro.position_ids[None],
            "use_cache": False,
            "packing": Packing.of(micro.cu_seqlens, micro.row_places),
        }
        if self.ranks.mesh is None:
            hidden = self.model.base_model(**inputs).last_hidden_state
        else:
            hidden = self.model.hidden_states(**inputs)
        head = self.model.get_output_embeddings()
        return ModelOutput(hidden[0], head.weight, head.bias, self._linear_log_probs)

    def _missing(self, micro_batches: Sequence[PackedBatch]) -> int:
        """How many passes this rank has to make only because another one has that many more."""
        return self.ranks.largest(len(micro_batches)) - len(micro_batches)

    def _following(self, micro: PackedBatch) -> AbstractContextManager[None]:
        """The passes over `micro` inside take the experts that it prescribes."""
        return nullcontext() if self.routers is None else self.routers.following(micro.routed_experts)

    def forward_only(
        self,
        micro_batches: Sequence[PackedBatch],
        read: Callable[[PackedBatch, ModelOutput], Tensor],
        record: Record | None = None,
        before: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        missing = self._missing(micro_batches)
        self.model.eval()
        try:
            with torch.no_grad():
                if before is not None:
                    before()
                results = [self._read(micro, read, record).cpu() for micro in micro_batches]
                for _ in range(missing):
                    self._forward(self._idle)
                return results
        finally:
            self.model.train()
            if self.ranks.mesh is not None:
                from miles.trainer.fsdp.shard import reshard

                reshard(self.model)

    def _read(
        self, micro: PackedBatch, read: Callable[[PackedBatch, ModelOutput], Tensor], record: Record | None
    ) -> Tensor:
        with self._following(micro):
            output = self._forward(micro)
            if record is not None and self.routers is not None:
                record(micro, self.routers.taken())
            return read(micro, output)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFn) -> list[MicroLoss]:
        missing, results = self._missing(micro_batches), []
        for micro in micro_batches:
            with self._following(micro):  # the backward pass too: activation checkpointing routes again
                result = loss_fn(micro, self._forward(micro))
                result.loss.backward()
            results.append(result.detached())
        for _ in range(missing):
            hidden = self._forward(self._idle).hidden
            hidden.backward(torch.zeros_like(hidden))
        return results

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values)

    def on_any_rank(self, happened: bool) -> bool:
        return self.ranks.any(happened)

    def gather_over_ranks(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        return self.ranks.gather(values)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> StepResult:
        for p in self.params:
            if p.grad is None:  # every sample of the step had exactly zero gradient
                p.grad = torch.zeros_like(p)
        max_norm = self.clip_grad if self.clip_grad > 0 else math.inf
        total = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        lr = self.scheduler.lr
        if not math.isfinite(norm):
            self.zero_grad()
            return StepResult(norm, lr, skipped=True)
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(norm, lr)

    def skip_step(self) -> StepResult:
        self.zero_grad()
        return StepResult(math.nan, self.scheduler.lr, skipped=True)

    def reset_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for key in MOMENTS:
                state[key].zero_()

    # ---- weights -------------------------------------------------------------------------------------------------

    def weights(self) -> Held:
        return Held(owned_tensors(self.model))

    def snapshot(self) -> Snapshot:
        return {name: tensor.clone() for name, tensor in owned_tensors(self.model).items()}

    def using(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        if self.ranks.mesh is None:
            return self._pointed_at(snapshot)
        return holding(owned_tensors(self.model), snapshot)

    @contextmanager
    def _pointed_at(self, snapshot: Snapshot) -> Iterator[None]:
        stored = stored_tensors(self.model)
        own = {name: tensor.data for name, tensor in stored.items()}
        try:
            for name, tensor in stored.items():
                tensor.data = snapshot[name]
            yield
        finally:
            for name, tensor in stored.items():
                tensor.data = own[name]

    def read_snapshot(self, folder: Path, *, flag: str) -> Snapshot:
        if (folder / "config.json").is_file():
            other = load_model(str(folder), dtype=torch.float32, gradient_checkpointing=False, flag=flag)
            return self._own_part(owned_tensors(other), folder, flag)
        if is_megatrons(folder):
            refuse_other("megatron", "fsdp", folder, flag)
        weights = {name: torch.empty_like(tensor) for name, tensor in owned_tensors(self.model).items()}
        checkpoint.read_into(folder / "model", weights, flag=flag)
        return weights

    def _own_part(self, whole: Mapping[str, Tensor], folder: Path, flag: str) -> Snapshot:
        own = owned_tensors(self.model)
        checkpoint.check({name: tuple(t.shape) for name, t in whole.items()}, own, f"{flag} {folder}")
        if self.ranks.mesh is None:
            return {name: whole[name].to(self.device) for name in own}
        from miles.trainer.fsdp.shard import cut_like

        return {name: cut_like(whole[name], tensor) for name, tensor in own.items()}

    def write_snapshot(self, snapshot: Snapshot, folder: Path) -> None:
        checkpoint.write(folder / "model", snapshot, self.ranks)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, *, with_optimizer: bool, background: bool = False) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": owned_tensors(self.model)}
        if with_optimizer:
            parts["optimizer"] = self._moments()
            parts["lr_scheduler"] = {"num_steps": torch.tensor(self.scheduler.num_steps)}
        self._saver.save(folder, parts, background=background)

    def finish_saving(self) -> None:
        self._saver.finish()

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        checkpoint.read_into(folder / "model", owned_tensors(self.model))
        if with_optimizer and (folder / "optimizer").is_dir():
            if checkpoint.shapes(folder / "optimizer"):  # none where every step so far was skipped
                self._make_moments()
                checkpoint.read_into(folder / "optimizer", self._moments())
            schedule = {"num_steps": torch.tensor(0)}
            checkpoint.read_into(folder / "lr_scheduler", schedule)
            self.scheduler.load_state_dict({"num_steps": int(schedule["num_steps"])})

    def _moments(self) -> dict[str, Tensor]:
        """`<moment>.<parameter>` -> tensor, for every parameter that has been stepped."""
        return {
            f"{key}.{name}": self.optimizer.state[p][key]
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
            for key in MOMENTS
        }

    def _make_moments(self) -> None:
        """What the first step would make: the places that a checkpoint is read into."""
        for p in self.params:
            self.optimizer.state[p] = {
                "step": torch.tensor(0.0, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def export_hf(self, folder: Path) -> None:
        # In the dtype of the folder that training started from: an export is a drop-in for it.
        config = type(self.model.config).from_pretrained(self.source)
        state = {
            name: tensor.to(config.dtype)
            for bucket in self.weights().buckets(EXPORT_BUCKET_BYTES)
            for name, tensor in bucket.items()
        }
        if self.ranks.rank == 0:
            write_hf(folder, self.source, config, on_disk(self.model, state))
