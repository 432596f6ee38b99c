"""Floating-point operations of a pass through a decoder, counted from its architecture.

Two per weight and token, as in Kaplan et al. (arXiv:2001.08361, section 2.1), plus the products of queries with keys
and of weights with values, of which the causal mask leaves half. A backward pass costs twice the forward pass. Counted
are the tokens of the samples: work that is saved, by sharing prompts for instance, shows as speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.batch.ragged import IntArray

# A forward and a backward pass, over a forward pass.
TRAINING = 3.0


def forward_flops(config: Any, total_lengths: IntArray) -> float:
    """Of one forward pass over rows of the given lengths [n], for a Hugging Face `config` of Llama, Qwen2, Qwen3 or
    Qwen3-MoE, the projection to the vocabulary included.

    Example: `forward_flops(config, [10])` of a model with P weights in its matrices is a little over 20 P.
    """
    lengths = np.asarray(total_lengths, dtype=np.float64)
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    queries = heads * head_dim
    attention = width * (queries + 2 * config.num_key_value_heads * head_dim) + queries * width
    experts = getattr(config, "num_experts", None)
    if experts:
        step, without = config.decoder_sparse_step, config.mlp_only_layers
        dense = sum(layer in without or (layer + 1) % step != 0 for layer in range(layers))
        sparse_mlp = width * experts + config.num_experts_per_tok * 3 * width * config.moe_intermediate_size
    else:
        dense, sparse_mlp = layers, 0
    mlps = dense * 3 * width * config.intermediate_size + (layers - dense) * sparse_mlp
    weights = layers * attention + mlps + width * config.vocab_size
    return float(2 * weights * lengths.sum() + 2 * layers * queries * np.square(lengths).sum())
