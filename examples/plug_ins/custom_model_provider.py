"""A GPT model whose first layers are kept as they are.

    miles hooks \
        --custom-model-provider-path examples/plug_ins/custom_model_provider.py:with_frozen_layers

The model is Megatron-Core's own, from the run's settings; what it returns may be any module that behaves like it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

NUM_FROZEN = 4


def with_frozen_layers(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> GPTModel:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    model = GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    for layer in model.decoder.layers:
        if layer.layer_number <= NUM_FROZEN:
            layer.requires_grad_(False)
    return model
