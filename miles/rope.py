"""Rotary position embeddings (arXiv:2104.09864) of a Hugging Face config, for the engine and for Megatron models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.errors import CheckpointError

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


def rope_frequencies(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [D/2] and the factor on cos and sin, from the config's `rope_parameters`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE:
        raise CheckpointError(f"rope_type: miles knows {', '.join(SUPPORTED_ROPE)}, got {kind!r}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("miles rotates whole heads; this checkpoint has a partial_rotary_factor.")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return inv_freq.float(), float(scale)
