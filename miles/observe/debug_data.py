"""Rollouts as files for debugging: `--save-debug-rollout-data`, `--load-debug-rollout-data`, `--dump-details`.

The file is the published one: `torch.save({"rollout_id": n, "samples": [Sample.to_dict(), ...]})`. Reading does not
execute anything that the file contains (`weights_only`).
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from miles.errors import CheckpointError, DataError, RunDirError
from miles.types import Sample


def save(template: str, rollout_id: int | str, samples: list[Sample]) -> Path:
    """Write `samples` to `template` with `{rollout_id}` filled in ("eval_<n>" for evaluations)."""
    path = Path(template.format(rollout_id=rollout_id))
    data = {"rollout_id": rollout_id, "samples": [_plain(s.to_dict()) for s in samples]}
    write_torch(path, data, flag="--save-debug-rollout-data")
    return path


def load(template: str, rollout_id: int, subsample: float | None = None) -> list[Sample]:
    """The samples of one rollout; `subsample` keeps that share, half of it from each end."""
    path = Path(template.format(rollout_id=rollout_id))
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
        samples = [Sample.from_dict(d) for d in stored["samples"]]
    except FileNotFoundError as error:
        raise DataError(
            str(path), f"no such file, for rollout {rollout_id}.",
            remedy="--load-debug-rollout-data takes the template that --save-debug-rollout-data wrote with, and "
            "--num-rollout at most as many rollouts as were saved.",
        ) from error  # fmt: skip
    except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError, EOFError) as error:
        raise DataError(
            str(path), f"expected a file of --save-debug-rollout-data ({type(error).__name__}: {error}).",
            remedy="Record the rollout again.",
        ) from error  # fmt: skip
    if subsample is None:
        return samples
    keep = int(len(samples) * subsample)
    return samples[: keep // 2] + samples[len(samples) - (keep - keep // 2) :]


def write_torch(path: Path, data: Any, *, flag: str) -> None:
    """`torch.save` into place: the file is complete or absent."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(data, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise RunDirError(
            f"{flag}: {path} cannot be written ({error}). Free some space, or name another place."
        ) from error


def unreadable(data: Any) -> str | None:
    """Why `read_torch` would not read `data` back; None where it would."""
    buffer = io.BytesIO()
    try:
        torch.save(data, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickling runs code of the data's own classes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def read_torch(path: Path, *, flag: str) -> Any:
    """What `write_torch` wrote; executes nothing that the file contains. CheckpointError for a damaged file."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{flag}: {path} cannot be read ({type(error).__name__}: {error}). Resume from an earlier checkpoint."
        ) from error


def _plain(value: Any) -> Any:
    """What `weights_only` reads back: arrays become tensors, failures dicts, unknown objects their text."""
    import numpy as np

    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if hasattr(value, "__dict__"):
        return {k: _plain(v) for k, v in vars(value).items()}
    return str(value)
