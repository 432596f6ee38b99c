"""Layer specifications for models of one's own: Megatron's local layers with attention over packed rows and a norm that
knows sequence parallelism, both for CPUs and GPUs. Stock ones refuse packed rows without TransformerEngine."""

from miles.trainer.megatron.layers import Norm, PackedAttention, Rotary
from miles.trainer.megatron.layers import spec as get_decoder_block_spec

__all__ = ["Norm", "PackedAttention", "Rotary", "get_decoder_block_spec"]
