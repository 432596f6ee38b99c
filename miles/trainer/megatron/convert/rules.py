"""How one Megatron-Core parameter corresponds to tensors of a Hugging Face folder, as data, and what follows from it.

A `Rule` is a line of a table: names on both sides, the sizes of the Hugging Face tensors, how they are joined into one
parameter, along which axis tensor parallelism cuts it. `segments` turns a rule into ranges, of which loading copies one
way and export the other, so that there is one description of each layout and no second one to keep in step. The tables
are in `families/`, what a whole model consists of is in `layout.py`. Nothing here imports Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Join = Literal["one", "groups", "gates"]
"""How the tensors lie in the parameter: one tensor as it is; per query group its queries, key and value, group after
group; the gate above the up projection."""


@dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Example (the first projection of an expert)::

        Rule(
            "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
            {
                "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
                "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
            },
            join="gates", cut=0, layers="sparse", stacked="model.layers.{layer}.mlp.experts.gate_up_proj",
        )

    Sizes are those of `Sizes`. `cut` is the axis that tensor parallelism divides (0: output rows, 1: input columns,
    None: every rank has all of it). `stacked` is the tensor `[experts, rows, columns]` in which transformers keeps all
    experts of a layer, the tensors of `hugging_face` one below the other.
    """

    megatron: str
    hugging_face: Mapping[str, tuple[str, ...]]
    join: Join = "one"
    cut: int | None = None
    layers: Literal["none", "every", "dense", "sparse"] = "every"
    stacked: str | None = None

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron


@dataclass(frozen=True)
class Family:
    """One architecture: the name in `config.json` and its rules. A new dense architecture is one more of these."""

    architecture: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Sizes:
    """The lengths that rules speak of; `query` and `key` are heads times head size.

    Example: `Sizes({"hidden": 64, "query": 64, "key": 32, "head": 16, "ffn": 128, "vocab": 100}, num_groups=2,
    padded_vocab=128)`
    """

    named: Mapping[str, int]
    num_groups: int
    padded_vocab: int

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.named[dim] for dim in dims)


@dataclass(frozen=True)
class Segment:
    """`length` rows (or columns) of Hugging Face tensor number `part` are those of the parameter from `local` on."""

    part: int
    whole: int
    local: int
    length: int


@dataclass(frozen=True)
class Place:
    """Where one tensor of a rule is found: as `tensor` itself, or in it at `index` from row `row` on.

    Example: the up projection of expert 3 as transformers keeps it is
    `Place("model.layers.0.mlp.experts.gate_up_proj", (8, 256, 64), rows=128, index=3, row=128)`.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: int
    index: int | None = None
    row: int = 0


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model, on one pipeline stage, for one expert.

    `local` is how its holders call it: number of the model chunk, then the name in it with local layer and expert.
    Example: `0.decoder.layers.1.mlp.linear_fc1.weight`, which is layer 3 of the model on stage 1.
    """

    rule: Rule
    sizes: Sizes
    stage: int
    local: str
    layer: int | None = None
    expert: int | None = None
    exported: bool = True
    parts: tuple[tuple[str, tuple[int, ...]], ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = tuple((self._named(n), self.sizes.shape(dims)) for n, dims in self.rule.hugging_face.items())
        object.__setattr__(self, "parts", parts)

    def _named(self, pattern: str) -> str:
        return pattern.format(layer=self.layer, expert=self.expert)

    @property
    def stacked(self) -> str | None:
        return self._named(self.rule.stacked) if self.rule.stacked else None

    @property
    def axis(self) -> int:
        return self.rule.cut or 0

    def shape(self, size: int) -> tuple[int, ...]:
        """Of the parameter on each of `size` ranks."""
        (_, first), *others = self.parts
        rows = self.sizes.padded_vocab if self._of_vocabulary else first[0] + sum(s[0] for _, s in others)
        whole = [rows, *first[1:]]
        if self.rule.cut is not None:
            whole[self.rule.cut] //= size
        return tuple(whole)

    @property
    def _of_vocabulary(self) -> bool:
        return any(dims[0] == "vocab" for dims in self.rule.hugging_face.values())

    def places(self, *, stacked: bool) -> list[Place]:
        """Of each of its tensors, by themselves or in the tensor of all experts."""
        if not stacked or self.stacked is None:
            return [Place(name, shape, shape[0]) for name, shape in self.parts]
        rows = sum(shape[0] for _, shape in self.parts)
        whole = (self.sizes.named["experts"], rows, *self.parts[0][1][1:])
        places, row = [], 0
        for _, shape in self.parts:
            places.append(Place(self.stacked, whole, shape[0], self.expert, row))
            row += shape[0]
        return places

    def segments(self, rank: int, size: int) -> list[Segment]:
        """What rank `rank` of `size` tensor-parallel ranks holds. Rows of a padded vocabulary belong to none."""
        lengths = [shape[self.axis] for _, shape in self.parts]
        if self.rule.cut is None:
            rank, size = 0, 1
        if self.rule.join == "gates":
            each = [length // size for length in lengths]
            return [Segment(i, rank * n, sum(each[:i]), n) for i, n in enumerate(each)]
        if self.rule.join == "groups":
            blocks = [
                (part, group * (n // self.sizes.num_groups), n // self.sizes.num_groups)
                for group in range(self.sizes.num_groups)
                for part, n in enumerate(lengths)
            ]
            return _within(blocks, rank, sum(lengths) // size)
        total = self.sizes.padded_vocab if self._of_vocabulary else lengths[0]
        return _within([(0, 0, lengths[0])], rank, total // size)


def _within(blocks: list[tuple[int, int, int]], rank: int, each: int) -> list[Segment]:
    """The blocks (part, start, length), laid end to end, as far as they lie in rank's `each` rows."""
    found, begin, end, at = [], rank * each, (rank + 1) * each, 0
    for part, start, length in blocks:
        first, last = max(at, begin), min(at + length, end)
        if first < last:
            found.append(Segment(part, start + first - at, first - begin, last - first))
        at += length
    return found
