"""Our modules inside of Megatron's transformer layers: attention over packed rows, RMS norm, rotary positions.

Megatron-Core without TransformerEngine has an attention that refuses packed rows and context parallelism, and a norm
that refuses sequence parallelism. These take their places in its layer spec (`spec`); everything else in a layer is
Megatron's.

    rows       one micro batch as this rank sees it: `inputs.Packed`, which travels as `packed_seq_params`
    attention  q, k, v [P, 1, H, d] -> [P, 1, H * d]; under context parallelism keys and values of all ranks are
               gathered, and queries stay where they are
    positions  the angles of each packed token, from its place in its own sample
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from miles.rope import rope_frequencies
from miles.trainer.megatron.inputs import Packed
from miles.trainer.packed_attention import attend
from miles.trainer.rms_norm import RMSNorm


class Norm(torch.nn.Module):
    """RMS norm with a weight [hidden_size]; its gradient is summed over tensor-parallel ranks where each of them has
    only a part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class PackedAttention(MegatronModule):
    """Causal attention of each row to itself. What `PackedSeqParams` says of rows is in `Packed`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.cp_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packed | None = None,
    ) -> Tensor:
        """[S, B, H, d] each -> [S, B, H * d]; packed rows have S = P and B = 1."""
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is None:
            return self._padded(query, key, value, dropout)
        packed = packed_seq_params
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        if packed.context is not None:
            out = packed.context.attend(q, k, v, scaling=self.softmax_scale, dropout=dropout)
        else:
            assert packed.packing is not None
            out = attend(q, k, v, packed.packing, scaling=self.softmax_scale, dropout=dropout)
        return out.unsqueeze(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Rows that are padded at the end: real tokens never look at what follows them."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Rotary(torch.nn.Module):
    """The angles of the tokens of one pass, in the place of Megatron's `RotaryEmbedding`, which knows only the order
    of tokens: set `positions` [S] before each pass.

    A scaling of cosine and sine (yarn) is not a matter of angles: `scale` multiplies queries and keys, and so enters
    attention as its square.
    """

    def __init__(self, hf_config: Any, head_dim: int) -> None:
        super().__init__()
        self._frequencies, self.scale = rope_frequencies(hf_config, head_dim)
        self.positions = torch.zeros(0, dtype=torch.int64)

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        return len(self.positions)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """float32 [S, 1, 1, d]."""
        if self._frequencies.device != self.positions.device:
            self._frequencies = self._frequencies.to(self.positions.device)
        angles = torch.outer(self.positions.float(), self._frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk: Megatron's local ones, with our attention and norms."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) is not IdentityOp:
                setattr(attention, name, Norm)
    block.layer_norm = Norm
    return block
