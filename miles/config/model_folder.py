"""What can be said about a model folder without loading it: its config.json, and the heads of its safetensors files.

A damaged file, a missing shard or a folder of another kind of model is answered here in milliseconds, before anything
heavy is imported. Whether the weights fit the architecture in every name and shape is left to whoever loads them.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.errors import CheckpointError

FLAG = "--hf-checkpoint"

# How the class of a model that writes text is named.
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# A safetensors file begins with the length of its head, 8 bytes, and no head is longer than this.
HEAD_LENGTH = struct.Struct("<Q")
MAX_HEAD = 100_000_000

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Tensors = dict[str, list[int]]
"""Name -> shape, from the heads of the files."""


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of config.json that settings are checked against; None where it does not say.

    Example: `ModelFacts(architecture="Qwen3ForCausalLM", vocab_size=53, context_length=128, num_layers=3)`
    """

    architecture: str | None
    vocab_size: int | None
    context_length: int | None
    num_layers: int | None


def facts_of(folder: str) -> ModelFacts | None:
    """None for what is no folder here: the name of a model on the hub, or nothing at all. Raises CheckpointError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    return _facts(path, _read_config(path))


def config_of(folder: str) -> dict[str, Any] | None:
    """config.json; None as with `facts_of`. Raises CheckpointError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    config = _read_config(path)
    _facts(path, config)
    return config


def check(folder: str) -> None:
    """Raise CheckpointError where `folder` is there and cannot be a model that this run trains or serves."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return
    facts = _facts(path, _read_config(path))
    if facts.architecture is not None and not facts.architecture.endswith(GENERATES):
        raise CheckpointError(
            f"{FLAG} {folder}: a {facts.architecture} does not write text. Expected a causal language model, whose "
            "architecture in config.json ends in ForCausalLM, such as Qwen3ForCausalLM."
        )
    tensors = _tensors(path)
    if tensors is not None:
        _check_layers(path, facts, tensors)


def _facts(folder: Path, config: dict[str, Any]) -> ModelFacts:
    names = config.get("architectures")
    text = config.get("text_config")
    # Models with images keep the numbers of their decoder one level deeper.
    numbers = {**config, **text} if isinstance(text, dict) else config

    def number(key: str) -> int | None:
        value = numbers.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(
                f"{FLAG} {folder}: config.json: {key}: expected a number >= 1, got {value!r}. {_COPY}"
            )
        return value

    for key in ("hidden_size", "num_attention_heads"):
        number(key)
    return ModelFacts(
        architecture=str(names[0]) if isinstance(names, list) and names else None,
        vocab_size=number("vocab_size"),
        context_length=None if _is_stretched(numbers) else number("max_position_embeddings"),
        num_layers=number("num_hidden_layers"),
    )


def _is_stretched(numbers: dict[str, Any]) -> bool:
    """Whether rotary scaling makes the context longer than max_position_embeddings says."""
    scaling = numbers.get("rope_scaling") or numbers.get("rope_parameters")
    return isinstance(scaling, dict) and scaling.get("factor", 1.0) != 1.0


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{FLAG} {folder}: expected a Hugging Face model folder with a config.json, found {_listing(folder)}."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{FLAG} {folder}: config.json cannot be read ({error}). {_COPY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{FLAG} {folder}: config.json holds no JSON object. {_COPY}")
    return content


_COPY = "Copy the folder of the model again."


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(p.name for p in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


# ---- weights -----------------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> Tensors | None:
    """Every tensor of the folder's safetensors files; None where it has no such files."""
    files = list(_files(folder))
    if not files:
        return None
    tensors: Tensors = {}
    for file in files:
        tensors |= _read_head(file)
    return tensors


def _files(folder: Path) -> Iterable[Path]:
    """The files that belong together: those of the index, else the single one, else whatever there is."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no index of safetensors files ({error!r}). {_COPY}") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{FLAG} {folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:4])}. "
            + _COPY
        )
    return [folder / name for name in names]


def _read_head(file: Path) -> Tensors:
    """Names and shapes; CheckpointError where head and size of the file contradict each other."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            (length,) = HEAD_LENGTH.unpack(stream.read(HEAD_LENGTH.size))
            if length > min(MAX_HEAD, size):
                raise ValueError("it does not begin with the head of a safetensors file")
            head = json.loads(stream.read(length))
        head.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in head.values()), default=0)
        if size != HEAD_LENGTH.size + length + end:
            raise ValueError(f"{size} bytes long, but its head speaks of {HEAD_LENGTH.size + length + end}")
        return {name: entry["shape"] for name, entry in head.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file}: damaged ({error}). Copy the file again.") from None


def _check_layers(folder: Path, facts: ModelFacts, tensors: Tensors) -> None:
    """A layer that config.json names and no file holds would be trained from random numbers."""
    found = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
    if facts.num_layers is not None and found and facts.num_layers > len(found):
        raise CheckpointError(
            f"{FLAG} {folder}: config.json speaks of {facts.num_layers} layers, the weights hold {len(found)}. {_COPY}"
        )
    embedding = next((s for n, s in tensors.items() if n.endswith("embed_tokens.weight")), None)
    if facts.vocab_size is not None and embedding is not None and embedding[0] != facts.vocab_size:
        raise CheckpointError(
            f"{FLAG} {folder}: config.json speaks of {facts.vocab_size} tokens, the weights hold {embedding[0]}. "
            + _COPY
        )
