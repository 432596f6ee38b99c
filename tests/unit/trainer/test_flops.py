"""Operations of a pass against the matrices of a real model, and in the metrics of a rollout."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.trainer.flops import forward_flops

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "tie_word_embeddings": False,
}  # fmt: skip


def matrices(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and "embed_tokens" not in name)


def test_two_operations_per_weight_and_token_and_the_triangle_of_attention() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for lengths in ([1], [10], [3, 7, 20]):
        triangle = sum(n * n for n in lengths) * 2 * 2 * 32
        assert forward_flops(model.config, lengths) == 2 * matrices(model) * sum(lengths) + triangle  # type: ignore[arg-type]


def test_only_the_experts_that_a_token_takes_count() -> None:
    config = Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=16)
    every = 2 * matrices(Qwen3MoeForCausalLM(config))
    attention = 2 * 2 * 32
    assert forward_flops(config, [1]) == every + attention  # type: ignore[arg-type]
    config.num_experts_per_tok = 1
    assert forward_flops(config, [1]) == pytest.approx(every + attention - 2 * 2 * 3 * 3 * 32 * 16)  # type: ignore[arg-type]
