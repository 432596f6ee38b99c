"""Qwen3: Llama with a norm on the queries and keys of each head."""

from __future__ import annotations

from miles.trainer.megatron.convert.families.llama import LLAMA
from miles.trainer.megatron.convert.rules import Family, Rule

HEAD_NORMS = tuple(
    Rule(
        f"decoder.layers.{{layer}}.self_attention.{part}_layernorm.weight",
        {f"model.layers.{{layer}}.self_attn.{part}_norm.weight": ("head",)},
    )
    for part in ("q", "k")
)

QWEN3 = Family("Qwen3ForCausalLM", (*LLAMA.rules, *HEAD_NORMS))
