"""Models and weights by Megatron-Bridge (`--megatron-to-hf-mode bridge`). Nothing else of miles imports that library.

    provider    the library's provider of the architecture, with this run's layout, dtypes and flags
    load, read  its `load_hf_weights`
    weights     its `export_hf_weights`: every rank gets every whole tensor, one after the other; rank 0 keeps them,
                without what pads the vocabulary, and with the experts of a layer in one tensor for the engine

Written for megatron-bridge 0.6.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import AutoConfig

from miles.errors import CheckpointError, FlagError, UsageError
from miles.trainer.megatron import convert
from miles.trainer.megatron.convert.folder import Folder, HfModel
from miles.trainer.megatron.convert.load import IGNORED_ENDINGS, OUTPUT_NAME
from miles.trainer.megatron.convert.rules import Family, Place
from miles.trainer.megatron.converter import Experts
from miles.trainer.megatron.model import Provider, ValueHead
from miles.trainer.megatron.settings import MegatronSettings
from miles.trainer.ranks import own_device
from miles.trainer.snapshots import holding
from miles.weights import Bucket, Shapes

MODE = "--megatron-to-hf-mode bridge"
# What the library raises for folders and models that it cannot convert.
REFUSALS = (ValueError, KeyError, AttributeError, NotImplementedError, OSError)
# Tensors that one message lists.
SHOWN = 5


class Bridge:
    """Implements `converter.Converter`. CheckpointError for a folder that the library cannot read, FlagError where the
    library itself cannot be imported."""

    def __init__(self, settings: MegatronSettings) -> None:
        self.settings, self.folder = settings, Path(settings.folder)
        auto_bridge = _library()
        with refusing("--hf-checkpoint", self.folder):
            self._bridge = auto_bridge.from_hf_pretrained(settings.folder)

    def provider(self) -> Provider:
        """`provide` of the library's provider, which is the models' TransformerConfig as well."""
        settings = self.settings
        with refusing("--hf-checkpoint", self.folder):
            made = self._bridge.to_megatron_provider(load_weights=False)
        values = settings.transformer_values(own_device())
        values.pop("transformer_impl", None)  # what layers there are, the library knows
        unknown = [name for name in settings.transformer if name in values and not hasattr(made, name)]
        if unknown:
            raise UsageError(
                f"{MODE}: {type(made).__name__} of Megatron-Bridge has no {', '.join(unknown)}. Leave out the flags of "
                f"{'this field' if len(unknown) == 1 else 'these fields'}, or use --megatron-to-hf-mode raw."
            )
        values |= {
            "vocab_size": settings.vocabulary(AutoConfig.from_pretrained(settings.folder)).padded,
            "should_pad_vocab": False,
            "fp16": False,
            "autocast_dtype": settings.dtype,
        }
        for name, value in values.items():
            if hasattr(made, name):
                setattr(made, name, value)
        made._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        with refusing("--hf-checkpoint", self.folder):
            made.finalize()
        return made.provide  # type: ignore[no-any-return]

    def load(self, models: Sequence[Any], folder: Path, *, flag: str, own_head: bool = False) -> None:
        for model in models:  # where the library looks for it, also for models of the user's own and a critic's
            model.config.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        with without_heads(models), refusing(flag, folder):
            self._bridge.load_hf_weights(list(models), hf_path=str(folder))

    def read(self, models: Sequence[Any], folder: Path, *, flag: str) -> dict[str, Tensor]:
        live = {name: tensor.detach() for name, tensor in convert.local_parameters(models).items()}
        with holding(live, live):
            self.load(models, folder, flag=flag)
            return {name: tensor.clone() for name, tensor in live.items()}

    def weights(self, models: Sequence[Any], *, experts: Experts) -> Exported:
        return Exported(self._bridge, models, Names.of(self.folder, experts))


def _library() -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise FlagError(
            MODE,
            given=f"Megatron-Bridge cannot be imported ({error}).",
            remedy="Use --megatron-to-hf-mode raw, or install what it needs.",
        ) from error
    return AutoBridge


@contextmanager
def refusing(flag: str, folder: Path) -> Iterator[None]:
    """The door to the library: what it raises becomes a CheckpointError that names `flag`."""
    try:
        yield
    except REFUSALS as error:
        raise CheckpointError(
            f"{flag} {folder}: Megatron-Bridge ({MODE}) cannot convert between this folder and the model "
            f"({type(error).__name__}: {error}). Give a folder of an architecture that it knows, with the sizes of the "
            "model of --hf-checkpoint, or use --megatron-to-hf-mode raw."
        ) from error


@contextmanager
def without_heads(models: Sequence[Any]) -> Iterator[None]:
    """Critics without their projection to values, which the library takes for one to the vocabulary."""
    with ExitStack() as stack:
        for model in models:
            head = getattr(model, "output_layer", None)
            if isinstance(head, ValueHead):
                del model.output_layer
                stack.callback(setattr, model, "output_layer", head)
        yield


# ---- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a model of the folder's architecture is exported as.

    `rows`: of every tensor of the folder. `places`: where those lie that are a part of a stacked one. `expected`: the
    names of whole tensors. `skipped`: what is no weight of its own.
    """

    rows: Mapping[str, int]
    places: Mapping[str, Place]
    expected: frozenset[str]
    skipped: frozenset[str]

    @classmethod
    def of(cls, folder: Path, experts: Experts) -> Names:
        """CheckpointError for a folder without weights, and for an architecture without a table."""
        model = HfModel.of(folder, "--hf-checkpoint")
        with Folder(folder, "--hf-checkpoint") as opened:
            shapes = {name: shape for name, shape in opened.shapes.items() if not name.endswith(IGNORED_ENDINGS)}
        skipped = frozenset({OUTPUT_NAME} if model.tied else ())
        places = stacked_places(shapes, model.family) if experts == "stacked" else {}
        expected = {places[name].tensor if name in places else name for name in shapes} - skipped
        return cls({name: shape[0] for name, shape in shapes.items()}, places, frozenset(expected), skipped)


def stacked_places(shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, Place]:
    """For tensors of single experts, where they lie in the tensor of all experts of their layer.

    Example: `{"model.layers.0.mlp.experts.3.up_proj.weight":
    Place("model.layers.0.mlp.experts.gate_up_proj", (8, 256, 64), rows=128, index=3, row=128)}`
    """
    found: dict[str, Place] = {}
    for rule in family.rules:
        if rule.stacked is None:
            continue
        first, *_ = parts = list(rule.hugging_face)
        pattern = re.escape(first).replace(r"\{layer\}", r"(\d+)").replace(r"\{expert\}", r"(\d+)")
        numbers = [tuple(map(int, match.groups())) for name in shapes if (match := re.fullmatch(pattern, name))]
        counts = {layer: sum(other == layer for other, _ in numbers) for layer, _ in numbers}
        for layer, expert in numbers:
            names = [part.format(layer=layer, expert=expert) for part in parts]
            rows = [shapes[name][0] for name in names]
            whole = (counts[layer], sum(rows), *shapes[names[0]][1:])
            tensor = rule.stacked.format(layer=layer)
            for i, name in enumerate(names):
                found[name] = Place(tensor, whole, rows[i], expert, sum(rows[:i]))
    return found


@dataclass(frozen=True)
class Whole:
    """A whole tensor; `tensor` is None where it is not kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Stack:
    """A tensor of all experts on its way: `num_parts` come one by one. Without `keep` only its shape is wanted."""

    def __init__(self, num_parts: int, *, keep: bool) -> None:
        self._num_missing, self._keep = num_parts, keep
        self._tensor: Tensor | None = None

    def add(self, place: Place, part: Tensor) -> Whole | None:
        """The whole tensor with the last part of it; None before."""
        if self._keep:
            if self._tensor is None:
                self._tensor = part.new_empty(place.shape)
            self._tensor[place.index, place.row : place.row + place.rows].copy_(part)
        self._num_missing -= 1
        return None if self._num_missing else Whole(place.tensor, place.shape, part.dtype, self._tensor)


class Exported:
    """Implements `miles.weights.Weights`. The first `layout` is a pass over all weights, of every rank. UsageError, at
    the end of a pass, where the library gives other tensors than the folder has."""

    def __init__(self, bridge: Any, models: Sequence[Any], names: Names) -> None:
        self._bridge, self._models, self._names = bridge, list(models), names
        self._num_parts = Counter(place.tensor for place in names.places.values())
        self._layout: Shapes | None = None

    def layout(self) -> Shapes:
        if self._layout is None:
            self._layout = {whole.name: (whole.shape, whole.dtype) for whole in self._wholes(keep=False)}
        return self._layout

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        bucket: Bucket = {}
        filled = 0
        for whole in self._wholes(keep=dist.get_rank() == 0):
            if filled and filled + whole.bytes > bucket_bytes:
                yield bucket
                bucket, filled = {}, 0
            filled += whole.bytes
            if whole.tensor is not None:
                bucket[whole.name] = whole.tensor
        yield bucket

    def _wholes(self, *, keep: bool) -> Iterator[Whole]:
        """In the library's order; a stacked tensor comes with its last part."""
        found: set[str] = set()
        stacks: dict[str, Stack] = {}
        for name, tensor in self._tensors():
            place = self._names.places.get(name)
            if place is None:
                whole: Whole | None = Whole(name, tuple(tensor.shape), tensor.dtype, tensor if keep else None)
            else:
                if place.tensor not in stacks:
                    stacks[place.tensor] = Stack(self._num_parts[place.tensor], keep=keep)
                whole = stacks[place.tensor].add(place, tensor)
            if whole is not None:
                stacks.pop(whole.name, None)
                found.add(whole.name)
                yield whole
        if found != self._names.expected:
            raise UsageError(f"{MODE}: {differing(found, self._names.expected)}. Use --megatron-to-hf-mode raw.")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As the library gives them, without rows that belong to no token."""
        exported = iter(self._bridge.export_hf_weights(self._models, cpu=False, show_progress=False))
        while True:
            with torch.no_grad():  # not around the yield: it would hold where the tensors are used
                pair = next(exported, None)
            if pair is None:
                return
            name, tensor = pair
            if name not in self._names.skipped:
                yield name, tensor.detach()[: self._names.rows.get(name, len(tensor))]


def differing(found: AbstractSet[str], expected: AbstractSet[str]) -> str:
    """Example: `Megatron-Bridge exports no a.weight, b.weight and 3 more, which --hf-checkpoint has`"""
    parts = []
    for verb, names, which in (
        ("exports no", expected - found, "which --hf-checkpoint has"),
        ("exports", found - expected, "which --hf-checkpoint has not"),
    ):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        if names:
            parts.append(f"{verb} {', '.join(sorted(names)[:SHOWN])}{more}, {which}")
    return "Megatron-Bridge " + "; it ".join(parts)
