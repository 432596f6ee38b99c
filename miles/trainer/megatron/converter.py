"""Who converts between Hugging Face folders and the model chunks of this rank: miles (`convert`), or Megatron-Bridge.

    converter_of(settings)   `Tables` for --megatron-to-hf-mode raw, `bridge.Bridge` for bridge
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from miles.trainer.megatron import convert
from miles.trainer.megatron.model import Provider
from miles.trainer.megatron.settings import MegatronSettings
from miles.weights import Weights

Experts = Literal["each", "stacked"]
"""One by one, as folders on a disk have them, or all of a layer in one tensor, as the embedded engine reads them."""


class Converter(Protocol):
    """Weights of `models`, one unwrapped chunk per virtual stage. Every rank calls every method alike."""

    def provider(self) -> Provider | None:
        """What builds the chunks of a run without --custom-model-provider-path; None: `model.own_provider`."""

    def load(self, models: Sequence[Any], folder: Path, *, flag: str, own_head: bool = False) -> None:
        """Fill the parameters in place, in their dtype. With `own_head` (a critic) the output layer stays as it is.
        CheckpointError, which names `flag`, for a folder of another model."""

    def read(self, models: Sequence[Any], folder: Path, *, flag: str) -> dict[str, Tensor]:
        """What `load` would fill in, by the names of `convert.local_parameters`; the model is as before."""

    def weights(self, models: Sequence[Any], *, experts: Experts) -> Weights:
        """The live weights under Hugging Face names, without what pads the vocabulary."""


class Tables:
    """Implements `Converter` with the tables of `convert.families`. `folder` is --hf-checkpoint."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def provider(self) -> Provider | None:
        return None

    def load(self, models: Sequence[Any], folder: Path, *, flag: str, own_head: bool = False) -> None:
        convert.load_hf(folder, models, models[0].config, flag=flag, own_head=own_head)

    def read(self, models: Sequence[Any], folder: Path, *, flag: str) -> dict[str, Tensor]:
        return convert.read_hf(folder, models, models[0].config, flag=flag)

    def weights(self, models: Sequence[Any], *, experts: Experts) -> Weights:
        return convert.Exporter(self.folder, models, models[0].config, experts=experts)


def converter_of(settings: MegatronSettings) -> Converter:
    if not settings.bridge:
        return Tables(settings.folder)
    from miles.trainer.megatron.bridge import Bridge

    return Bridge(settings)
