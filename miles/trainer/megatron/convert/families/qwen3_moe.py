"""Qwen3-MoE: Qwen3 in which some or all layers have a router and experts in place of the feed-forward network."""

from __future__ import annotations

from miles.trainer.megatron.convert.families.qwen3 import QWEN3
from miles.trainer.megatron.convert.rules import Family, Rule

EXPERTS = (
    Rule(
        "decoder.layers.{layer}.mlp.router.weight",
        {"model.layers.{layer}.mlp.gate.weight": ("experts", "hidden")},
        layers="sparse",
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        {
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        join="gates",
        cut=0,
        layers="sparse",
        stacked="model.layers.{layer}.mlp.experts.gate_up_proj",
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
        {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
        cut=1,
        layers="sparse",
        stacked="model.layers.{layer}.mlp.experts.down_proj",
    ),
)

QWEN3_MOE = Family("Qwen3MoeForCausalLM", (*QWEN3.rules, *EXPERTS))
