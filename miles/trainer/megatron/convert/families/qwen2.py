"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from __future__ import annotations

from miles.trainer.megatron.convert.families.llama import LLAMA
from miles.trainer.megatron.convert.rules import Family, Rule

QKV_BIAS = Rule(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    {
        "model.layers.{layer}.self_attn.q_proj.bias": ("query",),
        "model.layers.{layer}.self_attn.k_proj.bias": ("key",),
        "model.layers.{layer}.self_attn.v_proj.bias": ("key",),
    },
    join="groups",
    cut=0,
)

QWEN2 = Family("Qwen2ForCausalLM", (*LLAMA.rules, QKV_BIAS))
