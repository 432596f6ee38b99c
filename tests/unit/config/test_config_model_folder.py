"""Model folders, judged by config.json and the heads of their weight files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from miles.config.model_folder import ModelFacts, check, facts_of
from miles.errors import CheckpointError

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {"model.embed_tokens.weight": [8, 4]} | {f"model.layers.{i}.norm.weight": [4] for i in range(2)}


def safetensors(shapes: dict[str, list[int]], *, cut: int = 0) -> bytes:
    """A file of 2-byte numbers without its last `cut` bytes."""
    head, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        head[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}  # type: ignore[dict-item]
        end += size
    text = json.dumps(head).encode()
    return (struct.pack("<Q", len(text)) + text + bytes(end))[: -cut or None]


def folder(path: Path, config: object = CONFIG, **files: bytes) -> str:
    (path / "config.json").write_text(json.dumps(config))
    for name, content in (files or {"model": safetensors(SHAPES)}).items():
        (path / f"{name.replace('__', '.')}.safetensors").write_bytes(content)
    return str(path)


def test_a_sound_folder(tmp_path: Path) -> None:
    name = folder(tmp_path)
    check(name)
    assert facts_of(name) == ModelFacts("Qwen3ForCausalLM", vocab_size=8, context_length=64, num_layers=2)


def test_what_is_no_folder_is_left_to_who_loads_it() -> None:
    check("org/model")
    assert facts_of("org/model") is None


@pytest.mark.parametrize(
    ("changed", "context_length"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_context_length(changed: dict[str, object], context_length: int | None, tmp_path: Path) -> None:
    facts = facts_of(folder(tmp_path, CONFIG | changed))
    assert facts is not None and facts.context_length == context_length


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "config.json holds no JSON object"),
        (CONFIG | {"architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM does not write text"),
        (CONFIG | {"hidden_size": "4"}, "hidden_size: expected a number >= 1, got '4'"),
        (CONFIG | {"num_hidden_layers": -1}, "num_hidden_layers: expected a number >= 1, got -1"),
        (CONFIG | {"num_hidden_layers": 3}, "config.json speaks of 3 layers, the weights hold 2"),
        (CONFIG | {"vocab_size": 9}, "config.json speaks of 9 tokens, the weights hold 8"),
    ],
)
def test_configs_that_cannot_be_used(config: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        check(folder(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG | {"num_hidden_layers": 1},
        CONFIG | {"architectures": None},
        {**CONFIG, "architectures": ["GPT2LMHeadModel"]},
    ],
    ids=["more layers than said, as with multi-token prediction", "no architecture", "an older name"],
)
def test_configs_that_can(config: object, tmp_path: Path) -> None:
    check(folder(tmp_path, config))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b"1234567", "damaged"),
        (safetensors(SHAPES, cut=1), "damaged .*bytes long, but its head speaks of"),
        (safetensors(SHAPES) + b"x", "damaged .*bytes long, but its head speaks of"),
        (b"PK\x03\x04" + bytes(100), "damaged .it does not begin with the head of a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
    ],
)
def test_damaged_weights(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors: {says}"):
        check(folder(tmp_path, model=content))


def test_shards(tmp_path: Path) -> None:
    first, second = (dict(list(SHAPES.items())[:2]), dict(list(SHAPES.items())[2:]))
    name = folder(tmp_path, a=safetensors(first), b=safetensors(second))
    index = {"weight_map": dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(name)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing: b\.safetensors"):
        check(name)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no index of safetensors files"):
        check(name)
