"""Tiny Hugging Face folders, and Megatron-Core models for them on a CPU: what tests of the weights start from.

The models are Megatron's own, of its local layer specification, with stock attention; only norms are of the test's own
(the stock wrapper wants one process). Nothing of `miles` is used, so that what is tested stands beside it.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
MOE: dict[str, Any] = {
    **SHAPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}  # fmt: skip
PAD_TO = 32  # rows of a padded vocabulary, times the tensor-parallel size

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "qwen3 tied": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "moe": Qwen3MoeConfig(**MOE, tie_word_embeddings=False),
    "moe and dense": Qwen3MoeConfig(**MOE, mlp_only_layers=[0, 2], tie_word_embeddings=True),
}


def make_folder(path: Path, name: str, *, shard: str = "5GB", seed: int = 0) -> None:
    """Weights of every kind random, norms and biases too: a transposed or swapped one must show."""
    config = FAMILIES[name]
    torch.manual_seed(len(name) + 1000 * seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.8 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(path, max_shard_size=shard)


@dataclass(frozen=True)
class Split:
    """Parallel sizes. Example: `Split(tensor=2, pipeline=2, virtual=2)` is 4 ranks with two chunks each."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int = 1  # where there are experts
    context: int = 1  # of the groups only: stock attention knows none, and weights do not depend on it
    sequence: bool = False
    first_stage_layers: int | None = None
    stages: str | None = None  # Megatron's notation, as "Et|tttL"


class Norm(nn.Module):
    """RMSNorm as Hugging Face computes it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def start(rank: int, size: int, store: Path) -> None:
    """The process group and what Megatron-Core asks of CUDA where there is none."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.moe import moe_utils

        CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
        torch.Tensor.cuda = lambda self, *_, **__: self
        moe_utils.te_general_gemm = None
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)


def build(folder: Path, split: Split) -> tuple[list[nn.Module], Any]:
    """Chunks of this rank with random weights, and their TransformerConfig. Lays the parallel groups anew."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=split.tensor,
        pipeline_model_parallel_size=split.pipeline,
        virtual_pipeline_model_parallel_size=split.virtual,
        expert_model_parallel_size=split.expert,
        expert_tensor_parallel_size=split.expert_tensor,
        context_parallel_size=split.context,
    )
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)
    torch.manual_seed(7 + dist.get_rank())
    hf = AutoConfig.from_pretrained(folder)
    config = transformer_config(hf, split)
    each = PAD_TO * split.tensor
    chunks: list[nn.Module] = []
    for virtual in range(split.virtual or 1):
        stage = virtual if split.virtual else None
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=_spec(config, stage),
                vocab_size=-(-hf.vocab_size // each) * each,
                max_sequence_length=hf.max_position_embeddings,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                parallel_output=False,
                share_embeddings_and_output_weights=hf.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_base=hf.rope_parameters["rope_theta"],
                vp_stage=stage,
            ).eval()
        )
    return chunks, config


def transformer_config(hf: Any, split: Split) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    heads = hf.num_attention_heads
    settings: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers, "hidden_size": hf.hidden_size, "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": heads, "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // heads, "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False, "add_qkv_bias": hf.model_type == "qwen2",
        "qk_layernorm": hf.model_type.startswith("qwen3"), "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "use_cpu_initialization": True, "tensor_model_parallel_size": split.tensor, "pipeline_dtype": torch.float32,
        "pipeline_model_parallel_size": split.pipeline, "virtual_pipeline_model_parallel_size": split.virtual,
        "expert_model_parallel_size": split.expert, "sequence_parallel": split.sequence,
        "num_layers_in_first_pipeline_stage": split.first_stage_layers, "pipeline_model_parallel_layout": split.stages,
        "bias_dropout_fusion": False, "bias_activation_fusion": False, "masked_softmax_fusion": False,
        "apply_rope_fusion": False, "gradient_accumulation_fusion": False, "persist_layer_norm": False,
    }  # fmt: skip
    if hf.model_type == "qwen3_moe":
        sparse = [int(i not in hf.mlp_only_layers) for i in range(hf.num_hidden_layers)]
        settings |= {
            "num_moe_experts": hf.num_experts, "moe_ffn_hidden_size": hf.moe_intermediate_size,
            "moe_router_topk": hf.num_experts_per_tok, "moe_router_dtype": "fp32", "moe_layer_freq": sparse,
            "moe_router_pre_softmax": False, "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
            "expert_tensor_parallel_size": split.expert_tensor,
        }  # fmt: skip
    return TransformerConfig(**settings)


def _spec(config: Any, stage: int | None) -> Any:
    """Layer specifications with the norms of this file."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    block.layer_norm = Norm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        if config.qk_layernorm:
            parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = Norm
    return block


def forget(chunks: list[Any]) -> None:
    """Chunks, to which hooks of autograd hold on for ever, and their process groups: thousands of their threads would
    slow everything that comes after."""
    for chunk in chunks:
        vars(chunk).clear()
    chunks.clear()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


TOKENS = [[3, 17, 5, 40, 52, 0, 9, 9, 31], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def reference_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def logits(chunk: nn.Module, vocab_size: int) -> Tensor:
    """Of a model in one chunk: [2, 9, vocab]."""
    tokens = torch.tensor(TOKENS)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return chunk(tokens, positions, mask)[..., :vocab_size]
