"""The model chunks of one rank: Megatron's `GPTModel`, wrapped for mixed precision and data-parallel gradients.

    provider          builds one chunk (pre_process, post_process, vp_stage): ours, or --custom-model-provider-path
                      (`provided`)
    GPT               GPTModel whose last stage can stop at its hidden states, so that losses project only the positions
                      that predict a response token
    chunks            provider -> critic's head, one per virtual stage
    wrapped           -> Float16Module -> DistributedDataParallel
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from miles.trainer.megatron.layers import Rotary, spec

# Standard deviation of a new critic's projection.
VALUE_HEAD_STD = 0.02

Role = Literal["actor", "critic"]
Provider = Callable[..., torch.nn.Module]


@dataclass(frozen=True)
class Vocabulary:
    """`padded` is a multiple of the tensor-parallel size; rows from `size` on belong to no token."""

    size: int
    padded: int

    @staticmethod
    def of(size: int, *, tensor: int, padded: int | None) -> Vocabulary:
        """Without an explicit size, the least that can be cut."""
        return Vocabulary(size, -(-size // tensor) * tensor if padded is None else padded)


class GPT(GPTModel):  # type: ignore[misc]
    """`gives_hidden` [S, B, D] in place of logits, on the last stage."""

    gives_hidden = False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.post_process and self.gives_hidden:
            return hidden_states
        logits: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return logits


class ValueHead(torch.nn.Linear):
    """A critic's projection [D] -> [1], the same on every tensor-parallel rank; weights from N(0, 0.02), bias 0."""

    def __init__(self, config: TransformerConfig, device: torch.device, seed: int) -> None:
        super().__init__(config.hidden_size, 1, dtype=config.params_dtype, device=device)
        self.sequence_parallel = config.sequence_parallel
        weight = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.weight.copy_(weight * VALUE_HEAD_STD)
            self.bias.zero_()

    def forward(self, hidden: Tensor, weight: Any = None, runtime_gather_output: Any = None) -> tuple[Tensor, None]:
        """[S, B, D] -> ([S, B, 1], None), as Megatron's output layers are called. With sequence parallelism `hidden` is
        this rank's part of S; every rank computes all values, so that the gradient of its own part is its own."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return super().forward(hidden), None


def own_provider(config: TransformerConfig, hf_config: Any, vocabulary: Vocabulary) -> Provider:
    """Builds `GPT` chunks of the architecture of `config`, with the rotary positions of the Hugging Face config."""

    def provide(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPT:
        model = GPT(
            config=config,
            transformer_layer_spec=spec(config, vp_stage),
            vocab_size=vocabulary.padded,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        model.rotary_pos_emb = Rotary(hf_config, config.kv_channels)
        return model

    return provide


def chunks(
    config: TransformerConfig,
    provider: Provider,
    *,
    role: Role,
    seed: int,
    device: torch.device,
) -> list[Any]:
    """One module per virtual stage, on `device`; not wrapped yet (`wrapped`). `provider` is called with
    `pre_process`, `post_process` and `vp_stage` by keyword."""
    made = []
    stages: Sequence[int | None] = (
        [None]
        if config.virtual_pipeline_model_parallel_size is None
        else range(config.virtual_pipeline_model_parallel_size)
    )
    for stage in stages:
        first = mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
        last = mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
        model: Any = provider(pre_process=first, post_process=last, vp_stage=stage)
        model.model_type = ModelType.encoder_or_decoder
        model.vp_stage = stage
        if role == "critic":
            model.share_embeddings_and_output_weights = False  # on the first stage, too: it would wait for the last
            if last:
                model.output_layer = ValueHead(config, device, seed)
        mark_cut(model)
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        made.append(model.to(device))
    return made


def mark_cut(model: torch.nn.Module) -> None:
    """Say of each weight along which axis tensor parallelism has cut it. Megatron does so where it draws random
    weights, and the norm of gradients counts what is not marked on one rank only."""
    for module in model.modules():
        for kind, axis in CUT.items():
            weight = getattr(module, "weight", None) if isinstance(module, kind) else None
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)


CUT: dict[type[torch.nn.Module], int] = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


def wrapped(models: list[Any], config: TransformerConfig, ddp: DistributedDataParallelConfig, role: Role) -> list[Any]:
    """The same for training: parameters in half precision where the config says so, gradients in one buffer."""
    if config.bf16 or config.fp16:
        models = [Float16Module(config, model) for model in models]
    made = []
    for position, model in enumerate(models):
        chunk = DistributedDataParallel(
            config=config, ddp_config=ddp, module=model, disable_bucketing=position > 0 or not ddp.overlap_grad_reduce
        )
        chunk.role = role
        made.append(chunk)
    return made


def unwrapped(chunk: Any) -> Any:
    """The module inside of `wrapped`'s wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
