"""Weights to engines through a folder that they can read: for servers elsewhere, and where nothing faster works.

A version is written beside its place and moved there when it is whole; engines are told only then. The one before it is
removed when all engines have the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from miles.errors import RunDirError
from miles.weights.delivery import Failures
from miles.weights.gather import buckets
from miles.weights.round import UPDATE_S, Round, update

if TYPE_CHECKING:
    from miles.engine.member import Member

# What a model folder holds beside the weights, and how large such a file is at most.
DESCRIBING, LARGEST = (".json", ".jinja", ".model", ".txt"), 2**26


class DiskDelivery:
    """Implements `Delivery` for engines that read `root`, under the same path.

    `model` is the Hugging Face folder whose configuration and tokenizer go with the weights.
    """

    def __init__(self, root: Path, model: Path, bucket_bytes: int, *, timeout_s: float = UPDATE_S) -> None:
        self.root, self.model, self.bucket_bytes, self.timeout_s = root.absolute(), model, bucket_bytes, timeout_s
        self._written: tuple[str, Path] | None = None

    def before_writing(self, members: Sequence[Member]) -> Failures:
        """Engines have copies of their own and may go on until `deliver`."""
        return {}

    def deliver(self, members: Sequence[Member], tensors: Mapping[str, Tensor], version: str) -> Failures:
        """RunDirError where the folder cannot be written."""
        before = self._written
        folder = self._folder(tensors, version)
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}

        def send(now: Round) -> None:
            now.call("/update_weights_from_disk", body)

        failures = update(members, version, send, self.timeout_s)
        if before is not None and before[1] != folder:
            shutil.rmtree(before[1], ignore_errors=True)
        return failures

    def _folder(self, tensors: Mapping[str, Tensor], version: str) -> Path:
        """The folder of this version, written unless this object did so already (an engine that was replaced)."""
        if self._written is not None and self._written[0] == version:
            return self._written[1]
        folder = self.root / f"weights_{version}"
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            write_model(beside, self.model, tensors, self.bucket_bytes)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise RunDirError(f"{folder}: the weights for the engines cannot be written: {error}") from error
        self._written = version, folder
        return folder


def write_model(folder: Path, model: Path, tensors: Mapping[str, Tensor], bucket_bytes: int) -> None:
    """A Hugging Face folder: the tensors in files of about `bucket_bytes`, an index, and what else `model` holds."""
    from safetensors.torch import save_file

    for file in sorted(model.iterdir()):
        describes = file.suffix in DESCRIBING and not file.name.endswith(".index.json")
        if describes and file.is_file() and file.stat().st_size <= LARGEST:
            shutil.copyfile(file, folder / file.name)
    parts = list(buckets(tensors, bucket_bytes))
    places: dict[str, str] = {}
    for i, names in enumerate(parts):
        file_name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(_unshared(part), folder / file_name, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file_name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors takes no two tensors of one piece of memory, in which views of the run's memory all are."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
