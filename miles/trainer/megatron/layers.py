"""Our modules inside of Megatron's transformer layers: attention over packed rows, RMS norm, rotary positions.

Megatron-Core without TransformerEngine has an attention that refuses packed rows and context parallelism, and a norm
that refuses sequence parallelism. These take their places in its layer spec (`spec`); everything else in a layer is
Megatron's.

    rows       one micro batch as this rank sees it: `inputs.Packed`, which travels as `packed_seq_params`
    attention  q, k, v [P, 1, H, d] -> [P, 1, H * d] (of the layout thd, [P, H, d] -> [P, H * d]); under context
               parallelism keys and values of all ranks are gathered, and queries stay where they are
    positions  the angles of each packed token, from its place in its own sample
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from miles.rope import rope_frequencies
from miles.trainer.megatron.inputs import Packed
from miles.trainer.ranks import own_device
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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H, d] each -> [S, B, H * d]; packed rows have S = P and B = 1, or come as [P, H, d] -> [P, H * d]."""
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is None:
            return self._padded(query, key, value, dropout)
        rows = packed_seq_params
        if not isinstance(rows, Packed):
            rows = Packed.of(rows, self.cp_group)
        if query.dim() == 3:
            return rows.attend(query, key, value, scaling=self.softmax_scale, dropout=dropout)
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        return rows.attend(q, k, v, scaling=self.softmax_scale, dropout=dropout).unsqueeze(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Rows that are padded at the end: real tokens never look at what follows them."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Rotary(torch.nn.Module):
    """The angles of the tokens of one pass, in the place of Megatron's `RotaryEmbedding`, whose frequencies are other
    than those of some Hugging Face models, and which knows only the order of tokens.

    A scaling of cosine and sine (yarn) is not a matter of angles: `scale` multiplies queries and keys, and so enters
    attention as its square.
    """

    def __init__(self, hf_config: Any, head_dim: int) -> None:
        super().__init__()
        self._frequencies, self.scale = rope_frequencies(hf_config, head_dim)
        self._positions: Tensor | None = None

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> int:
        """How many angles the pass needs. `forward`, which Megatron calls next, does not see the rows."""
        self._positions = None
        if isinstance(packed_seq_params, Packed) and packed_seq_params.qkv_format == "packed":
            assert packed_seq_params.positions is not None
            self._positions = packed_seq_params.positions
            return len(self._positions)
        if packed_seq_params is not None:  # of the longest row: Megatron lays them out row by row
            return max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv)
        states = transformer_input if transformer.input_tensor is None else transformer.input_tensor
        parts = transformer_config.tensor_model_parallel_size if transformer_config.sequence_parallel else 1
        return states.shape[0] * parts  # type: ignore[union-attr]

    def forward(self, length: int, *_: Any, **__: Any) -> Tensor:
        """float32 [length, 1, 1, d]."""
        device = own_device() if self._positions is None else self._positions.device
        positions = torch.arange(length, device=device) if self._positions is None else self._positions
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = torch.outer(positions.float(), self._frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
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
