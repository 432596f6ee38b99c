"""What a Megatron trainer is built from: the sections of the run's settings, as Megatron-Core's own configurations.

Users' flags and the numbers of config.json arrive as fields of Megatron's dataclasses (`RunConfig.overrides`); what is
added here follows from the machine and from what our layers compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from miles.config import OptimizerConfig, RunConfig
from miles.config.layout import ParallelLayout
from miles.rope import rope_frequencies
from miles.trainer.megatron.inputs import Format
from miles.trainer.megatron.model import Vocabulary


@dataclass(frozen=True)
class MegatronSettings:
    """Example: `MegatronSettings("Qwen3-4B", ParallelLayout(4, tensor=2, pipeline=2), {"num_layers": 36, ...})`

    The three mappings hold fields of TransformerConfig, DistributedDataParallelConfig and OptimizerConfig.
    """

    folder: str
    layout: ParallelLayout
    transformer: Mapping[str, Any]
    gradients: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    qkv_format: Format = "thd"
    pad_to: int = 1  # S of a micro batch is a multiple of it, beside what sequence parallelism needs
    padded_vocab_size: int | None = None  # None: the next multiple of the tensor-parallel size

    @staticmethod
    def of(config: RunConfig) -> MegatronSettings:
        """Of a run; values of Megatron's enumerations and of torch's types come as text and are turned into those."""
        train = config.train
        return MegatronSettings(
            str(config.rollout.hf_checkpoint),
            config.layout,
            config.overrides("TransformerConfig"),
            config.overrides("DistributedDataParallelConfig"),
            config.overrides("OptimizerConfig"),
            bf16=bool(config.megatron.bf16),
            qkv_format=train.qkv_format,
            pad_to=config.rollout_buffer.data_pad_size_multiplier * config.layout.tensor,
            padded_vocab_size=train.padded_vocab_size,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def vocabulary(self, hf_config: Any) -> Vocabulary:
        return Vocabulary.of(hf_config.vocab_size, tensor=self.layout.tensor, padded=self.padded_vocab_size)

    def transformer_config(
        self, hf_config: Any, device: torch.device, kind: type[TransformerConfig] = TransformerConfig
    ) -> TransformerConfig:
        """Of the whole model, on this layout."""
        layout, on_cpu = self.layout, device.type == "cpu"
        values: dict[str, Any] = {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": not on_cpu,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": False,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            **self.transformer,
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "virtual_pipeline_model_parallel_size": layout.virtual,
            "context_parallel_size": layout.context,
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.etp_size,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.bf16,
            "variable_seq_lengths": True,
            "use_cpu_initialization": on_cpu,
            "perform_initialization": False,
        }
        if layout.virtual is not None:
            # Two stages that are each other's next and previous one: messages of a batch would be taken for others.
            values.setdefault("overlap_p2p_comm", True)
        values["batch_p2p_comm"] = not values.get("overlap_p2p_comm", False)
        scale = rope_frequencies(hf_config, values["kv_channels"])[1]
        if scale != 1.0:
            values["softmax_scale"] = scale**2 * values["kv_channels"] ** -0.5
        config = kind(**values)
        config.finalize_model_grads_func = finalize_model_grads
        return config

    def ddp_config(self) -> DistributedDataParallelConfig:
        values: dict[str, Any] = {"use_distributed_optimizer": True, **self.gradients}
        return DistributedDataParallelConfig(
            **{"grad_reduce_in_fp32": True, "check_for_nan_in_grad": False, "average_in_collective": False, **values}
        )

    def optimizer_config(self, optimizer: OptimizerConfig, *, distributed: bool) -> MegatronOptimizerConfig:
        return MegatronOptimizerConfig(
            **{
                "optimizer": "adam",
                "lr": optimizer.lr,
                "weight_decay": optimizer.weight_decay,
                "adam_beta1": optimizer.adam_beta1,
                "adam_beta2": optimizer.adam_beta2,
                "adam_eps": optimizer.adam_eps,
                "clip_grad": optimizer.clip_grad,
                "bf16": self.bf16,
                "params_dtype": self.dtype,
                "use_distributed_optimizer": distributed,
                **self.optimizer,
            }
        )
