"""A GPT model whose first layers are kept as they are.

    miles train --config examples/quickstart/carry.yaml --train-backend megatron \
        --custom-model-provider-path examples/plug_ins/custom_model_provider.py:with_frozen_layers

The model is Megatron-Core's own, from the run's settings: its layers have attention over packed rows that needs no
TransformerEngine. What a provider returns may be any module that behaves like it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

NUM_FROZEN = 2


def with_frozen_layers(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from miles.backends.megatron_utils.layer_specs import get_decoder_block_spec

    args = get_args()
    config = core_transformer_config_from_args(args)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_decoder_block_spec(config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )
    for layer in model.decoder.layers:
        if layer.layer_number <= NUM_FROZEN:
            layer.requires_grad_(False)
    return model
