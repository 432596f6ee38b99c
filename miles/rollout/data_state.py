"""The saved state of a data source: a torch file that loads with `weights_only=True`, written whole or not at all.

Samples are stored as their `to_dict`, with what such a file cannot hold replaced by tagged values:

    numpy array   {"__kind__": "ndarray", "value": tensor}        Failure   {"__kind__": "failure", "value": {...}}
    PIL image     {"__kind__": "image", "value": PNG bytes}       tuple, set likewise; an Enum as its value

What has no such form (an open socket that a plug-in hung on a sample) is left out, with one warning per attribute.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from miles.errors import CheckpointError
from miles.types import Failure, Group, Sample

logger = logging.getLogger(__name__)

KIND = "__kind__"
PLAIN_TYPES = {str, int, float, bool, bytes, type(None)}


class _NoForm(Exception):
    """A value that the file cannot hold."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, so that a reader finds the old file or the new one at any moment. Raises OSError."""
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getbuffer())


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `path`, durably, so that a reader sees the old content or the new, never part of it. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """The state that `write` stored, or that the published class stored. Raises CheckpointError."""
    import torch

    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise CheckpointError(
            f"{path}: not readable as the state of a data source ({type(error).__name__}). Resume from an earlier "
            "checkpoint, or delete the file to start the data at the beginning."
        ) from error
    wanted = ("sample_offset", "epoch_id", "sample_group_index", "sample_index", "metadata")
    missing = [key for key in wanted if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path}: expected the state of a data source, {', '.join(missing)} is missing.")
    return state


def encode_group(group: Group) -> list[dict[str, Any]]:
    return [encode_sample(sample) for sample in group]


def decode_group(group: list[dict[str, Any]]) -> Group:
    return [decode_sample(sample) for sample in group]


def encode_sample(sample: Sample) -> dict[str, Any]:
    """All attributes of a sample, declared or not, as values that the file can hold."""
    encoded = {}
    for name, value in sample.to_dict().items():
        try:
            encoded[name] = _encoded(value)
        except _NoForm as error:
            _warn_once(name, str(error))
    return encoded


def decode_sample(encoded: dict[str, Any]) -> Sample:
    return Sample.from_dict({name: _restored(value) for name, value in encoded.items()})


def encode_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Raises TypeError for a value that the file cannot hold: what the source itself keeps must not be lost."""
    try:
        return _encoded(metadata)
    except _NoForm as error:
        raise TypeError(f"the data source's metadata holds {error}, which a checkpoint cannot hold") from error


def decode_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    return _restored(metadata)


def _encoded(value: Any) -> Any:
    if type(value) in PLAIN_TYPES:
        return value
    if isinstance(value, dict):
        pairs = [(_encoded(k), _encoded(v)) for k, v in value.items()]
        return {KIND: "dict", "value": pairs} if KIND in value else dict(pairs)
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    if isinstance(value, tuple):
        return {KIND: "tuple", "value": [_encoded(v) for v in value]}
    if isinstance(value, set):
        return {KIND: "set", "value": sorted((_encoded(v) for v in value), key=repr)}
    return _encoded_object(value)


def _encoded_object(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return _encoded(value.value)
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {KIND: "ndarray", "value": torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, Failure):
        return {KIND: "failure", "value": asdict(value)}
    if type(value).__module__.startswith("PIL."):
        content = io.BytesIO()
        value.save(content, format="PNG")
        return {KIND: "image", "value": content.getvalue()}
    raise _NoForm(f"a {type(value).__module__}.{type(value).__qualname__}")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(v) for v in value]
    if not isinstance(value, dict):
        return value
    if KIND in value:
        return _RESTORE[value[KIND]](value["value"])
    return {k: _restored(v) for k, v in value.items()}


def _image(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content))


_RESTORE: dict[str, Callable[[Any], Any]] = {
    "dict": lambda pairs: {_restored(k): _restored(v) for k, v in pairs},
    "tuple": lambda items: tuple(_restored(v) for v in items),
    "set": lambda items: {_restored(v) for v in items},
    "ndarray": lambda tensor: tensor.numpy(),
    "failure": lambda fields: Failure(**fields),
    "image": _image,
}

_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, what: str) -> None:
    if (name, what) not in _warned:
        _warned.add((name, what))
        logger.warning(
            "samples in the buffer: attribute %s is %s, which a checkpoint cannot hold; left out", name, what
        )
