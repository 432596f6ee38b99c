"""Llama, and with it what the other dense families have in common."""

from __future__ import annotations

from miles.trainer.megatron.convert.rules import Family, Rule

EMBEDDING = Rule(
    "embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocab", "hidden")}, cut=0, layers="none"
)
FINAL_NORM = Rule("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}, layers="none")
OUTPUT = Rule("output_layer.weight", {"lm_head.weight": ("vocab", "hidden")}, cut=0, layers="none")

ATTENTION = (
    Rule(
        "decoder.layers.{layer}.input_layernorm.weight",
        {"model.layers.{layer}.input_layernorm.weight": ("hidden",)},
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        {
            "model.layers.{layer}.self_attn.q_proj.weight": ("query", "hidden"),
            "model.layers.{layer}.self_attn.k_proj.weight": ("key", "hidden"),
            "model.layers.{layer}.self_attn.v_proj.weight": ("key", "hidden"),
        },
        join="groups",
        cut=0,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        {"model.layers.{layer}.self_attn.o_proj.weight": ("hidden", "query")},
        cut=1,
    ),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        {"model.layers.{layer}.post_attention_layernorm.weight": ("hidden",)},
    ),
)

MLP = (
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        {
            "model.layers.{layer}.mlp.gate_proj.weight": ("ffn", "hidden"),
            "model.layers.{layer}.mlp.up_proj.weight": ("ffn", "hidden"),
        },
        join="gates",
        cut=0,
        layers="dense",
    ),
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        {"model.layers.{layer}.mlp.down_proj.weight": ("hidden", "ffn")},
        cut=1,
        layers="dense",
    ),
)

LLAMA = Family("LlamaForCausalLM", (EMBEDDING, *ATTENTION, *MLP, FINAL_NORM, OUTPUT))
