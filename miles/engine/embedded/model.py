"""A decoder as plain functions over tensors: Llama, Qwen2, Qwen3 and Qwen3-MoE checkpoints, by Hugging Face names.

The model owns no weights: it refers to the tensors of a mapping (a loaded checkpoint, or the live parameters of a
trainer in the same process), so that a weight update in one process copies nothing. It knows nothing about requests or
slots: `forward` runs flat tokens through the layers and hands each layer's queries, keys and values to an `attend`
function, which the cache supplies (`cache.py`), and the experts that its tokens took to a `record` function. The
feed-forward layers are in `mlp.py`.

Shapes: N tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.engine.embedded.mlp import DenseMlp, Linear, SparseMlp
from miles.errors import CheckpointError
from miles.rope import rope_frequencies

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

Attend = Callable[[int, Tensor], Tensor]
"""(layer, qkv [N, H + 2K, D]) -> attention output [N, H, D]."""

Record = Callable[[int, Tensor], None]
"""(layer, experts int64 [N, top_k]): which experts a layer's tokens took."""


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of one architecture that the engine needs.

    Example (the quickstart model)::

        DecoderShape(num_layers=3, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=53,
                     context_length=128, norm_eps=1e-6, tied_embeddings=True)

    A mixture of experts has `num_experts` > 0, of which each token takes `top_k`.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied_embeddings: bool
    num_experts: int = 0
    top_k: int = 0
    normalize_routing: bool = False  # the weights of a token's experts add up to 1

    @classmethod
    def from_config(cls, hf_config: Any) -> DecoderShape:
        """Read a `transformers` config; CheckpointError for what this engine cannot compute exactly."""
        names = hf_config.architectures or [type(hf_config).__name__.replace("Config", "ForCausalLM")]
        if names[0] not in SUPPORTED:
            raise CheckpointError(
                f"The embedded engine cannot run a {names[0]} checkpoint. It runs {', '.join(SUPPORTED)}; use an "
                "SGLang engine for others."
            )
        layer_types = getattr(hf_config, "layer_types", None)
        window = getattr(hf_config, "sliding_window", None)
        windowed = window is not None and ("sliding_attention" in layer_types if layer_types else True)
        if windowed and hf_config.sliding_window < hf_config.max_position_embeddings:
            raise CheckpointError(
                f"The embedded engine has no sliding-window attention, and this checkpoint uses a window of "
                f"{hf_config.sliding_window} tokens. Use an SGLang engine."
            )
        if hf_config.hidden_act != "silu":
            raise CheckpointError(f"hidden_act: the embedded engine computes 'silu', got {hf_config.hidden_act!r}.")
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        return cls(
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=hf_config.vocab_size,
            context_length=hf_config.max_position_embeddings,
            norm_eps=hf_config.rms_norm_eps,
            tied_embeddings=bool(hf_config.tie_word_embeddings),
            **_expert_numbers(hf_config),
        )


def _expert_numbers(hf_config: Any) -> dict[str, Any]:
    if hf_config.model_type != "qwen3_moe":
        return {}
    return {
        "num_experts": hf_config.num_experts,
        "top_k": hf_config.num_experts_per_tok,
        "normalize_routing": bool(hf_config.norm_topk_prob),
    }


@dataclass(frozen=True)
class Layer:
    """Projections that read the same input are one matrix: in a decode step, calls cost more than their FLOPs."""

    input_norm: Tensor  # [C]
    qkv: Linear  # [(H + 2K) * D, C]
    qk_norm: Tensor | None  # [H + K, D], Qwen3: the norm weight of each head
    o: Linear
    post_norm: Tensor  # [C]
    mlp: DenseMlp | SparseMlp


class DecoderModel:
    """`load` takes over tensors; `forward` and `logits` compute with them.

    Embedding, output projections and norms are referred to, joined projections are copied unless they follow each other
    in memory: after a trainer has changed its parameters in place, `load` has to be called again before the next step,
    and a run that trains and generates at the same time must load copies.

    `named` are the weights that it computes with, by the names of Hugging Face checkpoints (experts one by one), as
    views of its own tensors.
    """

    def __init__(self, hf_config: Any, tensors: Mapping[str, Tensor]) -> None:
        self.shape = DecoderShape.from_config(hf_config)
        self._inv_freq, self._rope_scale = rope_frequencies(hf_config, self.shape.head_dim)
        self._num_positions = 0
        self._names: frozenset[str] = frozenset()
        self.load(tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute with `tensors` (Hugging Face names) from now on. CheckpointError names what does not fit."""
        shape, take = self.shape, _Taker(tensors)
        c = shape.hidden_size
        embed = take("model.embed_tokens.weight", (shape.vocab_size, c))
        layers = [_read_layer(take, f"model.layers.{i}", shape) for i in range(shape.num_layers)]
        final_norm = take("model.norm.weight", (c,))
        head = embed if shape.tied_embeddings else take("lm_head.weight", (shape.vocab_size, c))
        self._check_names(take.named)
        self.embed, self.layers, self.final_norm, self.head = embed, layers, final_norm, head
        self.dtype, self.device = embed.dtype, embed.device
        self.named: dict[str, Tensor] = take.named

    def _check_names(self, named: Mapping[str, Tensor]) -> None:
        """Weights that come later have the optional parts (biases, norms of heads) that the first ones had."""
        if not self._names:
            self._names = frozenset(named)
        for name in sorted(self._names.symmetric_difference(named))[:1]:
            what = "have no tensor" if name in self._names else "have, unlike those at the start, a tensor"
            raise CheckpointError(f"The weights {what} {name!r}.")

    def forget(self) -> None:
        """Give up all tensors; `load` must be called before the next `forward`."""
        self.embed = self.final_norm = self.head = torch.empty(0, dtype=self.dtype, device=self.device)
        self.layers, self.named = [], {}

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are kept in."""
        return self.dtype

    def cover_positions(self, count: int) -> None:
        """Make the rotary tables fit the weights, and long enough for positions below `count`."""
        if count <= self._num_positions and (self._cos.dtype, self._cos.device) == (self.dtype, self.device):
            return
        angles = torch.outer(torch.arange(count, dtype=torch.float32), self._inv_freq)
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        # rotate_half(x) * sin == roll(x, D/2) * [-sin, sin]
        self._cos = torch.cat((cos, cos), -1).to(self.device, self.dtype)
        self._sin = torch.cat((-sin, sin), -1).to(self.device, self.dtype)
        self._num_positions = count

    def forward(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, record: Record) -> Tensor:
        """int64 [N] tokens at int64 [N] positions -> hidden states [N, C] after the final norm."""
        shape = self.shape
        cos = self._cos.index_select(0, positions_N).unsqueeze(1)
        sin = self._sin.index_select(0, positions_N).unsqueeze(1)
        x = F.embedding(tokens_N, self.embed)
        size, eps = (shape.hidden_size,), shape.norm_eps
        for i, layer in enumerate(self.layers):
            qkv = self._qkv(layer, F.rms_norm(x, size, layer.input_norm, eps), cos, sin)
            x = layer.o.added_to(x, attend(i, qkv).flatten(1))
            y = F.rms_norm(x, size, layer.post_norm, eps)
            if isinstance(layer.mlp, SparseMlp):
                x, chosen = layer.mlp.added_to(x, y)
                record(i, chosen)
            else:
                x = layer.mlp.added_to(x, y)
        return F.rms_norm(x, size, self.final_norm, eps)

    def _qkv(self, layer: Layer, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[N, C] -> rotated queries, rotated keys and values in one tensor [N, H + 2K, D]."""
        h, k, d = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        qkv = layer.qkv(y).view(-1, h + 2 * k, d)
        rotated = qkv.narrow(1, 0, h + k)
        if layer.qk_norm is not None:
            scale = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True, dtype=torch.float32)
            scale.square_().div_(d).add_(self.shape.norm_eps).rsqrt_()
            rotated.mul_(scale).mul_(layer.qk_norm)
        swapped = torch.roll(rotated, d // 2, -1)
        rotated.mul_(cos).addcmul_(swapped, sin)
        return qkv

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """float32 [N, V]."""
        return F.linear(hidden_NC, self.head).float()

    def log_softmax(self, logits: Tensor) -> Tensor:
        """float32 [N, V], as the trainer computes it."""
        return torch.log_softmax(logits, -1)


class _Taker:
    """Looks tensors up by name and checks shape, dtype and device against the first one taken."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.first: Tensor | None = None
        self.named: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"The weights have no tensor {name!r} (found {len(self.tensors)} others).")
        tensor = self.tensors[name].detach()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: expected shape {list(shape)} from config.json, got {list(tensor.shape)}.")
        self.first = tensor if self.first is None else self.first
        if tensor.dtype != self.first.dtype or tensor.device != self.first.device:
            raise CheckpointError(
                f"{name} is {tensor.dtype} on {tensor.device}, others are {self.first.dtype} on {self.first.device}; "
                "the embedded engine wants one dtype and one device."
            )
        self.named[name] = tensor
        return tensor

    def joined(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
        """Tensors that were taken as `names`, below each other: a view where they lie so in memory, else a copy."""
        whole = tensors[0] if len(tensors) == 1 else _adjacent(tensors)
        if whole is None:
            whole = torch.cat(list(tensors))
            self.named.update(zip(names, whole.split([len(tensor) for tensor in tensors])))
        return whole

    def linear(self, name: str, *parts: tuple[str, int], in_features: int) -> Linear:
        """The projections `<name>.<part>` of one input, each (part, out_features), as one."""
        weights = [self(f"{name}.{part}.weight", (out, in_features)) for part, out in parts]
        weight = self.joined([f"{name}.{part}.weight" for part, _ in parts], weights)
        biased = [f"{name}.{part}.bias" in self for part, _ in parts]
        bias = None
        if any(biased):
            biases = [
                self(f"{name}.{part}.bias", (out,)) if has else weight.new_zeros(out)
                for (part, out), has in zip(parts, biased)
            ]
            bias = torch.cat(biases)
            views = zip(parts, biased, bias.split([out for _, out in parts]))
            self.named.update({f"{name}.{part}.bias": view for (part, _), has, view in views if has})
        return Linear(weight, weight.t(), bias)


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Rows of several contiguous matrices as one view, if they follow each other in one storage."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not tensor.is_contiguous() or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _read_layer(take: _Taker, name: str, shape: DecoderShape) -> Layer:
    c, d = shape.hidden_size, shape.head_dim
    wide, narrow = shape.num_heads * d, shape.num_kv_heads * d
    qk_norm = None
    if f"{name}.self_attn.q_norm.weight" in take:
        norms = [f"{name}.self_attn.{part}_norm.weight" for part in ("q", "k")]
        each = [take(norm, (d,)) for norm in norms]
        qk_norm = torch.cat([each[0].expand(shape.num_heads, d), each[1].expand(shape.num_kv_heads, d)])
        take.named.update({norms[0]: qk_norm[0], norms[1]: qk_norm[shape.num_heads]})
    return Layer(
        input_norm=take(f"{name}.input_layernorm.weight", (c,)),
        qkv=take.linear(
            f"{name}.self_attn", ("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow), in_features=c
        ),
        qk_norm=qk_norm,
        o=take.linear(f"{name}.self_attn", ("o_proj", c), in_features=wide),
        post_norm=take(f"{name}.post_attention_layernorm.weight", (c,)),
        mlp=(_read_sparse if f"{name}.mlp.gate.weight" in take else _read_dense)(take, f"{name}.mlp", shape),
    )


def _read_dense(take: _Taker, name: str, shape: DecoderShape) -> DenseMlp:
    c, gate_name = shape.hidden_size, f"{name}.gate_proj.weight"
    ffn = take.tensors[gate_name].shape[0] if gate_name in take else 0
    return DenseMlp(
        gate_up=take.linear(name, ("gate_proj", ffn), ("up_proj", ffn), in_features=c),
        down=take.linear(name, ("down_proj", c), in_features=ffn),
    )


def _read_sparse(take: _Taker, name: str, shape: DecoderShape) -> SparseMlp:
    """Experts stacked in two tensors, as a trainer's model has them, or one by one, as checkpoints have them."""
    c, num = shape.hidden_size, shape.num_experts
    stacked, first = f"{name}.experts.down_proj", f"{name}.experts.0.down_proj.weight"
    if stacked in take:
        ffn = take.tensors[stacked].shape[-1]
        gate_up = take(f"{name}.experts.gate_up_proj", (num, 2 * ffn, c))
        down = take(stacked, (num, c, ffn))
    else:
        ffn = take.tensors[first].shape[-1] if first in take else 0

        def each(part: str, out: int, in_features: int) -> list[Tensor]:
            return [take(f"{name}.experts.{e}.{part}.weight", (out, in_features)) for e in range(num)]

        gate_up = torch.stack([torch.cat(pair) for pair in zip(each("gate_proj", ffn, c), each("up_proj", ffn, c))])
        down = torch.stack(each("down_proj", c, ffn))
    for stack in (f"{name}.experts.gate_up_proj", stacked):
        take.named.pop(stack, None)
    take.named.update(unstacked(f"{name}.experts.gate_up_proj", gate_up) | unstacked(stacked, down))
    return SparseMlp(
        router=take(f"{name}.gate.weight", (num, c)),
        gate_up=gate_up,
        down=down,
        top_k=shape.top_k,
        normalize=shape.normalize_routing,
    )


def unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The experts of a stacked tensor under the names that checkpoints have; any other tensor as it is."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts") or last not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
        return {name: tensor}
    if last == "down_proj":
        return {f"{stem}.{e}.down_proj.weight": rows for e, rows in enumerate(tensor)}
    views = {}
    for e, rows in enumerate(tensor):
        views[f"{stem}.{e}.gate_proj.weight"], views[f"{stem}.{e}.up_proj.weight"] = rows.chunk(2)
    return views


def flat_names(model: DecoderModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a trainer or a checkpoint under the names that `model.named` has: stacked experts one by one, without
    the output projection of a model that has none of its own."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat |= unstacked(name, tensor)
    if model.shape.tied_embeddings:
        flat.pop("lm_head.weight", None)
    return flat


def load_config(model_dir: str | Path) -> Any:
    """The `transformers` config of a Hugging Face folder; CheckpointError where there is none."""
    from transformers import AutoConfig

    path = Path(model_dir)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected a Hugging Face model folder with config.json and *.safetensors.")
    try:
        return AutoConfig.from_pretrained(str(path))
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}/config.json cannot be read: {error}") from error


def load_tensors(model_dir: str | Path, *, dtype: torch.dtype | None, device: str) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, on `device`; `dtype` None keeps the stored one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model_dir}: no *.safetensors file. Other weight formats are not read.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded = load_file(str(file), device=device)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or unreadable: {error}") from error
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{file} cannot be loaded to the device {device!r}: {reason}") from error
        for name, tensor in loaded.items():
            tensors[name] = tensor if dtype is None else tensor.to(dtype)
    return tensors
