"""A Hugging Face model folder as converters see it: which architecture, which tensors of which shapes, slices of them.

Only what is asked for is read from the disk: safetensors files are mapped, and a slice touches its own pages.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from miles.errors import CheckpointError
from miles.trainer.megatron.convert.families import FAMILIES
from miles.trainer.megatron.convert.rules import Family, Place, Segment

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HfModel:
    """What `config.json` says that converters need.

    Example: `HfModel(FAMILIES["Qwen3ForCausalLM"], vocab_size=151936, tied=True)`
    """

    family: Family
    vocab_size: int
    tied: bool

    @classmethod
    def of(cls, folder: str | Path, flag: str) -> HfModel:
        """CheckpointError for a folder without a config that can be read, and for architectures without a table."""
        from transformers import AutoConfig

        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(
                f"{flag} {folder}: expected a Hugging Face model folder with config.json and *.safetensors."
            )
        try:
            config = AutoConfig.from_pretrained(str(folder))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{flag} {folder}: config.json cannot be read: {error}") from error
        names = config.architectures or [type(config).__name__.replace("Config", "ForCausalLM")]
        if names[0] not in FAMILIES:
            raise CheckpointError(
                f"{flag} {folder}: the Megatron backend has no table of weights for {names[0]}; it has "
                f"{', '.join(FAMILIES)}. Give a folder of one of these, or use --train-backend fsdp."
            )
        return cls(FAMILIES[names[0]], config.vocab_size, bool(config.tie_word_embeddings))


class Folder:
    """The tensors of a folder. A context manager: files stay mapped inside.

    `shapes`: name -> shape of every tensor. CheckpointError, which names `flag`, for files that are missing or damaged.
    """

    def __init__(self, path: str | Path, flag: str) -> None:
        self.path, self.flag = Path(path), flag
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Folder:
        try:
            for file in self._files():
                self._map(file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._slices.clear()
        self._stack.close()

    def _files(self) -> list[Path]:
        index = self.path / INDEX
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{self.flag} {self.path}: {INDEX} cannot be read: {error!r}") from error
            files = sorted(self.path / name for name in names)
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.flag} {self.path}: no *.safetensors file. Other weight formats are not read; save the model "
                "with transformers' save_pretrained."
            )
        return files

    def _map(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(str(file), framework="pt"))
            for name in opened.keys():  # noqa: SIM118
                self._slices[name] = opened.get_slice(name)
                self.shapes[name] = tuple(self._slices[name].get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.flag} {self.path}: {file.name} is missing, damaged or unreadable ({error}). Copy the folder "
                "again, or give another one."
            ) from error

    def read(self, place: Place, segment: Segment, axis: int) -> Tensor:
        """The rows (axis 0) or columns (axis 1) of a segment, in the dtype of the folder, on the CPU."""
        stored = self._slices[place.tensor]
        first, last = segment.whole, segment.whole + segment.length
        rows = slice(place.row, place.row + place.rows) if axis else slice(place.row + first, place.row + last)
        if place.index is None:
            tensor: Tensor = stored[rows, first:last] if axis else stored[rows]
            return tensor
        whole: Tensor = stored[place.index : place.index + 1, rows]
        return whole[0, :, first:last] if axis else whole[0]
