"""The embedded engine in `--true-on-policy-mode`: the decoder and its cache by the exact sums of `miles/exact.py`.

The log-prob of a token depends on the tokens before it alone: not on the other requests, not on whether its prefix was
computed, copied from a slot or decoded token by token. The trainer computes the same numbers in another layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miles import exact
from miles.engine.embedded.cache import KVCache
from miles.engine.embedded.mlp import DenseMlp, Linear, SparseMlp
from miles.engine.embedded.model import Attend, DecoderModel, DecoderShape, Layer, Record


@dataclass(frozen=True)
class _Linear:
    grid: Tensor  # float64 [out, in]
    bias: Tensor | None

    @classmethod
    def of(cls, linear: Linear) -> _Linear:
        return cls(exact.on_grid(linear.weight), linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return exact.linear(x, self.grid, self.bias)


@dataclass(frozen=True)
class _Dense:
    gate_up: _Linear
    down: _Linear

    def __call__(self, y: Tensor) -> Tensor:
        return self.down(_gated(self.gate_up(y)))


@dataclass(frozen=True)
class _Sparse:
    router: Tensor  # float64 [E, C]
    gate_up: Tensor  # float64 [E, 2F, C]
    down: Tensor  # float64 [E, C, F]
    top_k: int
    normalize: bool

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' weighted sum [N, C], and the experts int64 [N, top_k]."""
        probs = exact.softmax(exact.linear(y, self.router)).float()
        chosen = exact.route(probs, self.top_k)
        weights = probs.gather(1, chosen)
        if self.normalize:
            weights = exact.normalized(weights)
        parts = y.new_empty(len(y), self.top_k, y.shape[1])
        for e in chosen.unique().tolist():
            token, place = (chosen == e).nonzero(as_tuple=True)
            inner = _gated(exact.linear(y[token], self.gate_up[e]))
            parts[token, place] = exact.linear(inner, self.down[e])
        return exact.weighted_sum(parts, weights), chosen


@dataclass(frozen=True)
class _Layer:
    plain: Layer
    qkv: _Linear
    o: _Linear
    mlp: _Dense | _Sparse


class ExactModel(DecoderModel):
    """A `DecoderModel` of the same weights, which must be float32. It keeps them in float64 besides."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self._exact_layers = [
            _Layer(layer, _Linear.of(layer.qkv), _Linear.of(layer.o), _exact_mlp(layer.mlp)) for layer in self.layers
        ]
        self._head_grid = exact.on_grid(self.head)

    def forget(self) -> None:
        super().forget()
        self._exact_layers, self._head_grid = [], self.head

    def cover_positions(self, count: int) -> None:
        if count > self._num_positions:
            self._cos, self._sin = exact.rotary_table(self._inv_freq, self._rope_scale, count)
            self._num_positions = len(self._cos)

    def forward(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, record: Record) -> Tensor:
        h, k, d = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        cos = self._cos.index_select(0, positions_N).unsqueeze(1)
        sin = self._sin.index_select(0, positions_N).unsqueeze(1)
        eps = self.shape.norm_eps
        x = F.embedding(tokens_N, self.embed)
        for i, layer in enumerate(self._exact_layers):
            qkv = layer.qkv(exact.rms_norm(x, layer.plain.input_norm, eps)).view(-1, h + 2 * k, d)
            rotated = qkv[:, : h + k]
            if layer.plain.qk_norm is not None:
                rotated = exact.rms_norm(rotated, layer.plain.qk_norm, eps)
            qkv = torch.cat((exact.rotate(rotated, cos, sin), qkv[:, h + k :]), 1)
            x = x + layer.o(attend(i, qkv).flatten(1))
            y = exact.rms_norm(x, layer.plain.post_norm, eps)
            if isinstance(layer.mlp, _Sparse):
                added, chosen = layer.mlp(y)
                record(i, chosen)
            else:
                added = layer.mlp(y)
            x = x + added
        return exact.rms_norm(x, self.final_norm, eps)

    def logits(self, hidden_NC: Tensor) -> Tensor:
        return exact.linear(hidden_NC, self._head_grid)

    def log_softmax(self, logits: Tensor) -> Tensor:
        return exact.log_softmax(logits)

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float64


class ExactCache(KVCache):
    """Keys on their grid, and values as a coarse and a fine part: 3K heads of float64."""

    PLANES = 3

    def decode_attention(self, rows_N: Tensor, mask: Tensor, num: int, longest: int) -> Attend:
        write, seen = self._writer(rows_N), self._heads[:, :num, :, :longest]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            write(layer, _stored(self.shape, qkv))
            out = self._attend(qkv.unsqueeze(1), seen[layer], mask)
            return out.reshape(num, self.shape.num_heads, self.shape.head_dim)

        return attend

    def prefill_attention(
        self, slots: Sequence[int], offsets: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Attend]:
        slots_P, positions, rows = self._places(slots, offsets, width)
        reach = min(max(offsets) + width, self.length)
        beyond = torch.arange(reach, device=self.device) > positions[:, :, None]
        mask = torch.zeros(beyond.shape, dtype=torch.float64, device=self.device).masked_fill_(beyond, -torch.inf)
        write, num = self._writer(rows), len(slots)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            write(layer, _stored(self.shape, qkv))
            past = self.kv[layer, slots_P, :reach].transpose(1, 2)
            # Queries of one key head stand below each other: the mask repeats for each of them.
            out = self._attend(qkv.view(num, width, -1, self.shape.head_dim), past, mask.unsqueeze(1))
            return out.reshape(num * width, self.shape.num_heads, self.shape.head_dim)

        return positions.flatten(), rows, attend

    def _attend(self, qkv: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        """qkv [n, W, H + 2K, D], past [n, 3K, L, D], mask [n, 1, W, L] -> float32 [n, W, H, D]."""
        h, k, d = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        n, width = qkv.shape[:2]
        query = exact.on_grid(qkv[:, :, :h]).transpose(1, 2).reshape(n, k, h // k * width, d)
        key, coarse, fine = past.split(k, 1)
        wide = mask.expand(n, 1, width, -1).repeat(1, 1, h // k, 1)
        out = exact.attend(query, key, coarse, fine, wide, d**-0.5)
        return out.to(qkv.dtype).view(n, h, width, d).transpose(1, 2)


def _stored(shape: DecoderShape, qkv: Tensor) -> Tensor:
    """What the cache keeps of [N, H + 2K, D]: float64 [N, 3K, D]."""
    key, value = qkv[:, shape.num_heads :].chunk(2, 1)
    return torch.cat((exact.on_grid(key), *exact.split_values(value)), 1)


def _exact_mlp(mlp: DenseMlp | SparseMlp) -> _Dense | _Sparse:
    if isinstance(mlp, DenseMlp):
        return _Dense(_Linear.of(mlp.gate_up), _Linear.of(mlp.down))
    grids = [exact.on_grid(weight) for weight in (mlp.router, mlp.gate_up, mlp.down)]
    return _Sparse(*grids, top_k=mlp.top_k, normalize=mlp.normalize)


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return exact.silu(gate) * up
