"""Which Megatron parameters a whole model consists of, and who holds each: the rules of a family, laid out.

Every rank computes the same list from the folder's `config.json`, Megatron's configuration and its padded vocabulary,
without a message to the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from miles.trainer.megatron.convert.families.llama import EMBEDDING, OUTPUT
from miles.trainer.megatron.convert.folder import HfModel
from miles.trainer.megatron.convert.rules import Parameter, Rule, Sizes

# How TransformerEngine's modules call what Megatron's own modules call otherwise.
SPELLINGS = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.linear_fc\1.weight"),
)
HEAD = "output_layer."


def local_parameters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of this rank: number of the chunk (virtual stage), dot, name without what wrappers add.

    Example key: `0.decoder.layers.1.mlp.linear_fc2.weight`
    """
    return {
        f"{i}.{name}": parameter
        for i, chunk in enumerate(chunks)
        for name, parameter in unwrapped(chunk).named_parameters()
    }


def plainly(name: str) -> str:
    """The name as Megatron's own modules spell it."""
    for pattern, spelling in SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def unwrapped(chunk: Any) -> Any:
    """Without data parallelism and mixed precision around it."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


class ModelLayout:
    """`parameters`: of all ranks, in the order of the layers. `own_head`: the output layer is not the folder's."""

    def __init__(
        self, model: HfModel, chunks: Sequence[nn.Module], config: TransformerConfig, *, own_head: bool
    ) -> None:
        self.model, self.config, self.own_head = model, config, own_head
        self.sizes = sizes_of(config, model.vocab_size, int(unwrapped(chunks[0]).vocab_size))
        self.expert_size = config.expert_model_parallel_size
        self.parameters = list(self._of_the_model())

    def here(self) -> dict[str, Parameter]:
        """What this rank must hold, by its local name."""
        stage = mpu.get_pipeline_model_parallel_rank()
        expert_rank = mpu.get_expert_model_parallel_rank()
        return {
            p.local: p
            for p in self.parameters
            if p.stage == stage and (p.expert is None or self.holder(p) == expert_rank)
        }

    def holder(self, parameter: Parameter) -> int:
        """The expert-parallel rank that holds an expert; 0 for what is no expert."""
        return 0 if parameter.expert is None else parameter.expert // self.num_local_experts

    @property
    def num_local_experts(self) -> int:
        return int((self.config.num_moe_experts or 0) // self.expert_size)

    def tensor_size(self, parameter: Parameter) -> int:
        """Over how many ranks the parameter may be cut."""
        config = self.config
        size = config.tensor_model_parallel_size if parameter.expert is None else config.expert_tensor_parallel_size
        return size or 1

    def tensor_rank(self, parameter: Parameter) -> int:
        """Of this process, among the ranks over which the parameter may be cut."""
        if parameter.expert is None:
            return int(mpu.get_tensor_model_parallel_rank())
        return int(mpu.get_expert_tensor_parallel_rank())

    def is_head(self, local: str) -> bool:
        """Whether a local name belongs to an output layer that the folder does not know (a critic's)."""
        return self.own_head and local.split(".", 1)[1].startswith(HEAD)

    def _of_the_model(self) -> Iterator[Parameter]:
        stages, chunks = self.config.pipeline_model_parallel_size, self._num_chunks
        rules = self.model.family.rules
        outside = [rule for rule in rules if rule.layers == "none"]
        last = stages - 1
        yield self._parameter(EMBEDDING, 0, 0)
        where = {
            offset + i: (stage, chunk, i)
            for chunk in range(chunks)
            for stage in range(stages)
            for offset, count in [self._layers(stage, chunk)]
            for i in range(count)
        }
        assert sorted(where) == list(range(self.config.num_layers)), where
        for layer in range(self.config.num_layers):
            yield from self._of_a_layer(layer, *where[layer])
        for rule in outside:
            if rule not in (EMBEDDING, OUTPUT):
                yield self._parameter(rule, last, chunks - 1)
        if self.own_head:
            return
        if not self.model.tied:
            yield self._parameter(OUTPUT, last, chunks - 1)
        elif stages > 1:  # the last stage computes with a copy of the embedding
            copied = Rule(OUTPUT.megatron, EMBEDDING.hugging_face, cut=OUTPUT.cut, layers="none")
            yield self._parameter(copied, last, chunks - 1, exported=False)

    def _of_a_layer(self, layer: int, stage: int, chunk: int, local: int) -> Iterator[Parameter]:
        kind = "sparse" if self._is_sparse(layer) else "dense"
        rules = [rule for rule in self.model.family.rules if rule.layers in ("every", kind)]
        for rule in rules:
            if not rule.per_expert:
                yield self._parameter(rule, stage, chunk, layer, local)
        # First the first expert of each rank, so that what is gathered together comes from all of them.
        for own in range(self.num_local_experts):
            for rank in range(self.expert_size):
                for rule in rules:
                    if rule.per_expert:
                        expert = rank * self.num_local_experts + own
                        yield self._parameter(rule, stage, chunk, layer, local, expert, own)

    def _parameter(
        self,
        rule: Rule,
        stage: int,
        chunk: int,
        layer: int | None = None,
        local_layer: int | None = None,
        expert: int | None = None,
        local_expert: int | None = None,
        exported: bool = True,
    ) -> Parameter:
        local = f"{chunk}.{rule.megatron.format(layer=local_layer, expert=local_expert)}"
        return Parameter(rule, self.sizes, stage, local, layer, expert, exported)

    def _layers(self, stage: int, chunk: int) -> tuple[int, int]:
        """First layer and number of layers of a chunk."""
        config = self.config
        virtual = chunk if config.virtual_pipeline_model_parallel_size is not None else None
        if config.pipeline_model_parallel_layout is not None:
            return _of_custom_layout(config.pipeline_model_parallel_layout, stage, chunk)
        return (
            get_transformer_layer_offset(config, vp_stage=virtual, pp_rank=stage),
            get_num_layers_to_build(config, vp_stage=virtual, pp_rank=stage),
        )

    @property
    def _num_chunks(self) -> int:
        return self.config.virtual_pipeline_model_parallel_size or 1

    def _is_sparse(self, layer: int) -> bool:
        frequency = self.config.moe_layer_freq
        if not self.config.num_moe_experts:
            return False
        return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])


def _of_custom_layout(layout: Any, stage: int, chunk: int) -> tuple[int, int]:
    from megatron.core.transformer.enums import LayerType

    return (
        layout.get_layer_offset(layer_type=LayerType.decoder, vp_stage=chunk, pp_rank=stage),
        layout.get_num_layers_to_build(layer_type=LayerType.decoder, vp_stage=chunk, pp_rank=stage),
    )


def sizes_of(config: TransformerConfig, vocab: int, padded_vocab: int) -> Sizes:
    named: Mapping[str, int] = {
        "hidden": config.hidden_size,
        "query": config.num_attention_heads * config.kv_channels,
        "key": config.num_query_groups * config.kv_channels,
        "head": config.kv_channels,
        "ffn": config.ffn_hidden_size,
        "vocab": vocab,
        "experts": config.num_moe_experts or 0,
        "expert_ffn": config.moe_ffn_hidden_size or 0,
    }
    return Sizes(named, config.num_query_groups, padded_vocab)
