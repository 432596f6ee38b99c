"""The model of the benchmarks that need a small one: a random Qwen3 of 1 million parameters, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 2048


def write_tiny_model(folder: str | Path, *, context: int, **more: Any) -> None:
    """Hidden size 128, 4 layers; the same weights every time. `more` are fields of Qwen3Config."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **more,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
