"""A random Qwen3-MoE with the quickstart's tokenizer, and a reward that a random model can earn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from e2e_runs import BASE
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

NUM_LAYERS, TOP_K = 3, 2


def make_moe(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Three layers, the middle one dense; routers with opinions that are close together."""
    torch.manual_seed(seed)
    numbers = {
        "vocab_size": 53, "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_experts": 8, "num_experts_per_tok": TOP_K, "norm_topk_prob": True, "mlp_only_layers": [1],
        "max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.2,
        "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(numbers | changes))).to(dtype).save_pretrained(folder)
    for file in [*BASE.glob("token*"), BASE / "chat_template.jinja", BASE / "generation_config.json"]:
        shutil.copy(file, folder)
    return folder


def digits(args: Any, sample: Any, **_: Any) -> float:
    """The share of digits in the answer."""
    text = sample.response
    return sum(c.isdigit() for c in text) / max(len(text), 1)
