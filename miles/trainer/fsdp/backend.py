"""The fsdp backend: the Hugging Face model itself, on packed rows. One process, which needs no process group.

Several processes shard this same model with `torch.distributed.fsdp.fully_shard`: `weights()` then gathers, and `save`
writes one file per process; callers see no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles.batch.pack import PackedBatch
from miles.config import OptimizerConfig, TrainConfig
from miles.errors import CheckpointError
from miles.loss.parallel_state import ParallelState
from miles.trainer.backend import LossFn, ModelOutput, StepResult
from miles.trainer.fsdp.attention import Packing
from miles.trainer.fsdp.model import load_model, load_owned, owned_tensors
from miles.trainer.schedule import ParamScheduler, Schedule

T = TypeVar("T")

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class FsdpBackend:
    """Implements `miles.trainer.backend.Backend`."""

    def __init__(self, hf_checkpoint: str, train: TrainConfig, optimizer: OptimizerConfig) -> None:
        self.parallel = ParallelState.single_process()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.source = hf_checkpoint
        self.model = load_model(
            hf_checkpoint, dtype=torch.float32, gradient_checkpointing=train.gradient_checkpointing
        ).to(self.device)
        self.model_chunks = [self.model]
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
        out = self.model.base_model(
            input_ids=micro.tokens[None],
            position_ids=micro.position_ids[None],
            use_cache=False,
            packing=Packing.of(micro.cu_seqlens, micro.row_places),
        )
        return ModelOutput(out.last_hidden_state[0], self.model.get_output_embeddings().weight)

    def forward_only(
        self, micro_batches: Sequence[PackedBatch], read: Callable[[PackedBatch, ModelOutput], T]
    ) -> list[T]:
        self.model.eval()
        try:
            with torch.no_grad():
                return [read(micro, self._forward(micro)) for micro in micro_batches]
        finally:
            self.model.train()

    def forward_backward(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFn) -> list[dict[str, Tensor]]:
        metrics = []
        for micro in micro_batches:
            result = loss_fn(micro, self._forward(micro))
            result.loss.backward()
            metrics.append(result.metrics)
        return metrics

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> StepResult:
        for p in self.params:
            if p.grad is None:  # every sample of the step had exactly zero gradient
                p.grad = torch.zeros_like(p)
        max_norm = self.clip_grad if self.clip_grad > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, max_norm))
        lr = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(norm):
            self.zero_grad()
            return StepResult(norm, lr, skipped=True)
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(norm, lr)

    def reset_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for key in MOMENTS:
                state[key].zero_()

    # ---- weights -------------------------------------------------------------------------------------------------

    def weights(self) -> Mapping[str, Tensor]:
        return owned_tensors(self.model)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        (folder / "model").mkdir()
        save_file(contiguous(owned_tensors(self.model)), folder / "model" / "model.safetensors")
        if with_optimizer:
            (folder / "optimizer").mkdir()
            save_file(contiguous(self._moments()), folder / "optimizer" / "optimizer.safetensors")
            (folder / "lr_scheduler").mkdir()
            state = {"num_steps": torch.tensor(self.scheduler.num_steps)}
            save_file(state, folder / "lr_scheduler" / "lr_scheduler.safetensors")

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        load_owned(self.model, read_tensors(folder / "model" / "model.safetensors"), folder)
        moments = folder / "optimizer" / "optimizer.safetensors"
        if with_optimizer and moments.exists():
            self._load_moments(read_tensors(moments))
            state = read_tensors(folder / "lr_scheduler" / "lr_scheduler.safetensors")
            self.scheduler.load_state_dict({"num_steps": int(state["num_steps"])})

    def _moments(self) -> dict[str, Tensor]:
        """`<moment>.<parameter>` -> tensor, for every parameter that has been stepped."""
        return {
            f"{key}.{name}": self.optimizer.state[p][key]
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
            for key in MOMENTS
        }

    def _load_moments(self, stored: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            if f"step.{name}" in stored:
                self.optimizer.state[p] = {key: stored[f"{key}.{name}"].to(p.device) for key in MOMENTS}

    def export_hf(self, folder: Path) -> None:
        from miles.rollout.tokenizer import load_tokenizer

        # In the dtype of the folder that training started from: an export is a drop-in for it.
        config = type(self.model.config).from_pretrained(self.source)
        state = {name: tensor.to(config.dtype) for name, tensor in owned_tensors(self.model).items()}
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(contiguous(state), folder / "model.safetensors", metadata={"format": "pt"})
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        load_tokenizer(self.source, trust_remote_code=True).save_pretrained(folder)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--load: {path} cannot be read ({error}). Expected a file that `--save` wrote; an older checkpoint "
            "can be named through latest_checkpointed_iteration.txt in the same folder."
        ) from error
