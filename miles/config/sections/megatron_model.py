"""Megatron's flags that describe the model. `miles.config.architecture` fills them from the checkpoint's config.json.

Where a default is None, an unset flag leaves the field to Megatron-Core or to config.json.
"""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from miles.config.flags import (
    FRACTION,
    Pattern,
    Section,
    above,
    at_least,
    between,
    flag,
    more_than,
    no_meaning_here,
    not_built,
)

megatron_flag: Any = partial(flag, only="megatron")
"""A flag that the megatron backend alone reads."""

TRANSFORMER = "TransformerConfig"

FROM_CHECKPOINT = no_meaning_here("the weights come from a checkpoint.")
BALANCING_LOSS = "A load-balancing loss of the experts"
ONE_BY_ONE = no_meaning_here("the experts are computed one after another.")


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronModel(Section):
    """The decoder."""

    num_layers: int | None = megatron_flag(None, "Layers of the decoder.", check=at_least(1), sets=TRANSFORMER)
    hidden_size: int | None = megatron_flag(None, "Width of a token's state.", check=at_least(1), sets=TRANSFORMER)
    ffn_hidden_size: int | None = megatron_flag(None, "Width inside the MLP.", check=at_least(1), sets=TRANSFORMER)
    num_attention_heads: int | None = megatron_flag(
        None, "Query heads of a layer.", check=at_least(1), sets=TRANSFORMER
    )
    kv_channels: int | None = megatron_flag(None, "Width of a head.", check=at_least(1), sets=TRANSFORMER)
    group_query_attention: bool = megatron_flag(False, "Let several query heads share keys and values.")
    num_query_groups: int | None = megatron_flag(None, "Heads of keys and values.", check=at_least(1), sets=TRANSFORMER)
    max_position_embeddings: int | None = megatron_flag(None, "Longest sequence of the model.", check=at_least(1))
    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "yarn", "relative", "none"] = megatron_flag(
        "learned_absolute", "How positions are told apart."
    )
    rotary_base: float = megatron_flag(10000, "Base of the rotary frequencies.", check=more_than(0))
    rotary_percent: float = megatron_flag(1.0, "Part of a head that is rotated.", check=FRACTION)
    rotary_interleaved: bool = megatron_flag(False, "Rotate neighbouring channels.", sets=TRANSFORMER)
    rotary_seq_len_interpolation_factor: float | None = megatron_flag(
        None, "Divides the positions.", check=more_than(0)
    )
    use_rope_scaling: bool = megatron_flag(False, "Stretch the rotary frequencies as Llama 3.1 does.")
    rope_scaling_factor: float = megatron_flag(8.0, "By how much.", check=more_than(0))
    use_rotary_position_embeddings: bool = megatron_flag(
        False, "An older name of --position-embedding-type rope.", status=no_meaning_here("config.json says so.")
    )
    normalization: Literal["LayerNorm", "RMSNorm"] = megatron_flag("LayerNorm", "Which norm.", sets=TRANSFORMER)
    norm_epsilon: float = megatron_flag(
        1e-5, "Term that keeps the norm finite.", check=more_than(0), sets=f"{TRANSFORMER}.layernorm_epsilon"
    )
    apply_layernorm_1p: bool = megatron_flag(
        False, "Keep the norm's weight minus one.", sets=f"{TRANSFORMER}.layernorm_zero_centered_gamma"
    )
    qk_layernorm: bool = megatron_flag(False, "Norm queries and keys.", sets=TRANSFORMER)
    swiglu: bool = megatron_flag(False, "A gated MLP with SiLU.", sets=f"{TRANSFORMER}.gated_linear_unit")
    add_bias_linear: bool = megatron_flag(
        True, "No biases in the linear layers.", option="--disable-bias-linear", sets=TRANSFORMER
    )
    add_qkv_bias: bool = megatron_flag(False, "Biases of queries, keys and values.", sets=TRANSFORMER)
    untie_embeddings_and_output_weights: bool = megatron_flag(False, "An output layer of its own.")
    vocab_size: int | None = megatron_flag(None, "Tokens of the vocabulary, before padding.", check=at_least(1))
    make_vocab_size_divisible_by: int = megatron_flag(
        128, "The vocabulary is padded to a multiple of this and of the tensor-parallel size.", check=at_least(1)
    )
    hidden_dropout: float = megatron_flag(0.1, "Dropout of the residual stream.", check=between(0, 1), sets=TRANSFORMER)
    attention_dropout: float = megatron_flag(
        0.1, "Dropout of the attention's weights.", check=between(0, 1), sets=TRANSFORMER
    )
    init_method_std: float = megatron_flag(0.02, "Spread of random weights.", status=FROM_CHECKPOINT, sets=TRANSFORMER)


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class MegatronExperts(Section):
    """Mixtures of experts."""

    num_experts: int | None = megatron_flag(
        None, "Experts of a layer.", check=at_least(1), sets=f"{TRANSFORMER}.num_moe_experts"
    )
    moe_layer_freq: Pattern = megatron_flag(
        1, "Which layers have experts: every n-th, or 0 or 1 per layer.", sets=TRANSFORMER
    )
    moe_ffn_hidden_size: int | None = megatron_flag(None, "Width of an expert.", check=at_least(1), sets=TRANSFORMER)
    moe_shared_expert_intermediate_size: int | None = megatron_flag(
        None, "Width of the expert that takes every token.", check=at_least(1), sets=TRANSFORMER
    )
    moe_shared_expert_gate: bool = megatron_flag(False, "Gate the shared expert.", sets=TRANSFORMER)
    moe_router_topk: int = megatron_flag(2, "Experts of a token.", check=at_least(1), sets=TRANSFORMER)
    moe_router_pre_softmax: bool = megatron_flag(
        False, "Softmax over all experts, not over the chosen ones.", sets=TRANSFORMER
    )
    moe_router_score_function: Literal["softmax", "sigmoid"] = megatron_flag(
        "softmax", "From logits to the weights of experts.", sets=TRANSFORMER
    )
    moe_router_topk_scaling_factor: float | None = megatron_flag(
        None, "Factor of the weights of the chosen experts.", check=more_than(0), sets=TRANSFORMER
    )
    moe_router_num_groups: int | None = megatron_flag(
        None, "Groups of experts that are chosen first.", check=at_least(1), sets=TRANSFORMER
    )
    moe_router_group_topk: int | None = megatron_flag(None, "Groups of a token.", check=at_least(1), sets=TRANSFORMER)
    moe_router_dtype: Literal["fp32", "fp64"] | None = megatron_flag(
        None, "What the router computes in; as the model when unset.", sets=TRANSFORMER
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] = (
        megatron_flag(
            "aux_loss",
            "How experts are kept equally busy.",
            sets=TRANSFORMER,
            status=not_built("Balancing by sinkhorn", when=lambda v: v == "sinkhorn"),
        )
    )
    moe_aux_loss_coeff: float = megatron_flag(
        0.0,
        "Weight of the balancing loss.",
        check=at_least(0),
        sets=TRANSFORMER,
        status=not_built(BALANCING_LOSS, when=above(0)),
    )
    moe_z_loss_coeff: float | None = megatron_flag(
        None,
        "Weight of the loss on the router's logits.",
        check=at_least(0),
        sets=TRANSFORMER,
        status=not_built(BALANCING_LOSS, when=above(0)),
    )
    moe_router_enable_expert_bias: bool = megatron_flag(
        False, "Balance with a bias per expert.", sets=TRANSFORMER, status=not_built("Balancing by a bias per expert")
    )
    moe_router_bias_update_rate: float = megatron_flag(
        1e-3, "Step of that bias.", sets=TRANSFORMER, status=no_meaning_here("no expert has such a bias.")
    )
    moe_router_force_load_balancing: bool = megatron_flag(
        False, "Route at random, to measure speed.", sets=TRANSFORMER, status=not_built("Routing at random")
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = megatron_flag(
        "allgather",
        "How tokens travel to their experts; alltoall in place of allgather, which needs samples of one length.",
        sets=TRANSFORMER,
        status=not_built("The flex dispatcher", when=lambda v: v == "flex"),
    )
    moe_grouped_gemm: bool = megatron_flag(
        False, "One matrix product for all experts of a process.", sets=TRANSFORMER, status=ONE_BY_ONE
    )
    moe_use_legacy_grouped_gemm: bool = megatron_flag(
        False, "The older form of that.", sets=TRANSFORMER, status=ONE_BY_ONE
    )
    moe_permute_fusion: bool = megatron_flag(
        False,
        "Sort tokens by expert in one kernel.",
        sets=TRANSFORMER,
        status=no_meaning_here("the kernel is a part of Transformer Engine, which is not used."),
    )
    moe_router_fusion: bool = megatron_flag(
        False,
        "Choose experts in one kernel.",
        sets=TRANSFORMER,
        status=no_meaning_here("the kernel is a part of Transformer Engine, which is not used."),
    )
    moe_per_layer_logging: bool = megatron_flag(
        False, "Log the balancing loss per layer.", sets=TRANSFORMER, status=no_meaning_here("there is no such loss.")
    )
