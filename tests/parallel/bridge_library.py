"""A miniature of megatron-bridge 0.6.2, for machines where that cannot be imported: its `AutoBridge`, as far as miles
calls it, with the parameters that it has there, on Megatron's GPTModel and the tables of `convert`.

What it shares with the library: a provider is a TransformerConfig whose `__post_init__` waits for `finalize`, with
defaults of its own that a run must set; `load_hf_weights` fills a vocabulary that is longer than the folder's only
where it is cut, and refuses a critic's head; `export_hf_weights` gives every rank whole tensors one by one, each expert
by itself, the padded vocabulary included, in an order of its own.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import AutoConfig

from miles.config.architecture import flags_of_model
from miles.errors import CheckpointError
from miles.trainer.megatron import convert
from miles.trainer.megatron.layers import Rotary, spec

PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


class HFWeightTuple(NamedTuple):
    param_name: str
    weight: Tensor


@dataclass
class GPTModelProvider(TransformerConfig):
    share_embeddings_and_output_weights: bool = True
    vocab_size: int | None = None
    should_pad_vocab: bool = False
    seq_length: int = 1024
    parallel_output: bool = True
    hf_config: Any = None
    _pg_collection: Any = None

    def __post_init__(self) -> None:
        """Waits for `finalize`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GPTModelProvider:
        """Process groups are shared."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        shared = {"_pg_collection": self._pg_collection}
        own = {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in shared}
        vars(made).update(own, **shared)
        return made

    def finalize(self) -> None:
        super().__post_init__()
        self.is_final = True

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        assert self.is_final and self.vocab_size is not None and self._pg_collection is not None
        model = GPTModel(
            self,
            transformer_layer_spec=spec(self, vp_stage),
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self._pg_collection,
            vp_stage=vp_stage,
        )
        model.rotary_pos_emb = Rotary(self.hf_config, self.kv_channels)
        return model


# What config.json says, in the words of TransformerConfig.
SIZES = {
    "num_layers": "num_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads", "num_query_groups": "num_query_groups", "kv_channels": "kv_channels",
    "norm_epsilon": "layernorm_epsilon", "add_qkv_bias": "add_qkv_bias", "qk_layernorm": "qk_layernorm",
    "num_experts": "num_moe_experts", "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_router_topk": "moe_router_topk", "moe_layer_freq": "moe_layer_freq",
}  # fmt: skip


class AutoBridge:
    CALLS: ClassVar[list[str]] = []

    def __init__(self, hf_pretrained: Any) -> None:
        self.hf_pretrained = hf_pretrained

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> AutoBridge:
        cls.CALLS.append("from_hf_pretrained")
        return cls(Path(path))

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> GPTModelProvider:
        assert not load_weights  # the real one would load from a hook that provide() never calls
        self.CALLS.append("to_megatron_provider")
        hf = AutoConfig.from_pretrained(self.hf_pretrained)
        said = flags_of_model(hf.to_dict())
        sizes = {ours: said[theirs] for theirs, ours in SIZES.items() if said.get(theirs) is not None}
        return GPTModelProvider(
            **sizes,
            normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False,
            activation_func=torch.nn.functional.silu, hidden_dropout=0.1,
            bf16=True, params_dtype=torch.bfloat16, moe_aux_loss_coeff=1e-3, moe_router_load_balancing_type="aux_loss",
            vocab_size=hf.vocab_size, share_embeddings_and_output_weights=hf.tie_word_embeddings, hf_config=hf,
        )  # fmt: skip

    def load_hf_weights(
        self,
        model: list[Any],
        hf_path: str | Path | None = None,
        allowed_mismatched_params: list[str] | None = None,
    ) -> None:
        self.CALLS.append("load_hf_weights")
        assert isinstance(model, list)
        folder, config = hf_path or self.hf_pretrained, model[0].config
        rows = AutoConfig.from_pretrained(folder).vocab_size
        for name, parameter in model[0].named_parameters():
            if name in PADDED and mpu.get_tensor_model_parallel_world_size() == 1 and len(parameter) != rows:
                raise ValueError(f"Shape mismatch for megatron param {name}")
        headless = not hasattr(model[-1], "output_layer")
        assert config.share_embeddings_and_output_weights == model[0].share_embeddings_and_output_weights
        try:
            convert.load_hf(folder, model, config, own_head=headless)
        except CheckpointError as error:
            raise ValueError(f"Shape mismatch: {error}") from error

    def export_hf_weights(
        self,
        model: list[Any],
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: list[Any] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterable[HFWeightTuple]:
        self.CALLS.append("export_hf_weights")
        exporter = convert.Exporter(self.hf_pretrained, model, model[0].config, experts="each")
        told: list[Any] = [{name: tensor for bucket in exporter.buckets(1 << 30) for name, tensor in bucket.items()}]
        if dist.get_world_size() > 1:  # every rank gets every tensor
            dist.broadcast_object_list(told)
        whole: dict[str, Tensor] = told[0]
        padded = {}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in whole:
                room = model[0].vocab_size - len(whole[name])
                padded[name] = torch.nn.functional.pad(whole[name], (0, 0, 0, room), value=torch.nan)
        for name in sorted(whole):
            yield HFWeightTuple(name, padded.get(name, whole[name]))


def install() -> None:
    """From now on `import megatron.bridge` finds this."""
    import megatron

    module = types.ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="megatron.bridge")  # type: ignore[assignment]
    sys.modules["megatron.bridge"] = module
    megatron.bridge = module
