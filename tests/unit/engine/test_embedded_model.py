"""Checkpoints that the embedded engine cannot run are refused with a sentence; the cache's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_tiny import COMMON, make_checkpoint
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.cache import KVCache, common_prefix
from miles.engine.embedded.model import DecoderModel, DecoderShape, load_config, load_tensors
from miles.engine.embedded.scheduler import _prefill_batches
from miles.errors import CheckpointError


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def damage_weights(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not a safetensors header")
    return folder


def without(name: str):
    def remove(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return remove


WRONG = {
    "architecture": (
        lambda f: edit_config(f, architectures=["MixtralForCausalLM"]),
        "cannot run a MixtralForCausalLM checkpoint. It runs LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    ),
    "shape": (
        lambda f: edit_config(f, intermediate_size=48, hidden_size=64),
        "expected shape [47, 64] from config.json, got [47, 32]",
    ),
    "too many layers": (
        lambda f: edit_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "The weights have no tensor 'model.layers.2.input_layernorm.weight'",
    ),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type: miles knows default, linear, llama3, yarn, got 'dynamic'",
    ),
    "no config": (without("config.json"), "expected a Hugging Face model folder with config.json"),
    "no weights": (without("model.safetensors"), "no *.safetensors file"),
    "damaged weights": (damage_weights, "model.safetensors: damaged or unreadable"),
    "unknown type": (lambda f: edit_config(f, model_type="nobody-knows"), "config.json cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    folder = change(make_checkpoint(tmp_path / "model", "qwen3"))
    with pytest.raises(CheckpointError) as caught:
        EmbeddedEngine.from_folder(folder)
    assert message in str(caught.value)


def test_a_folder_without_a_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    for path in folder.glob("*token*"):
        path.unlink()
    assert EmbeddedEngine.from_folder(folder).tokenizer is None


def test_sliding_windows_are_refused_unless_they_cover_the_context() -> None:
    window = {"use_sliding_window": True, "max_window_layers": 0}
    with pytest.raises(CheckpointError, match="window of 16 tokens"):
        DecoderShape.from_config(Qwen2Config(**COMMON, sliding_window=16, **window))
    DecoderShape.from_config(Qwen2Config(**COMMON, sliding_window=4096, **window))


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "model"))
    tensors = dict(model.named_parameters()) | {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"model.norm.weight is torch.bfloat16 on cpu"):
        EmbeddedEngine(model.config, tensors, None)


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [(LlamaConfig(**COMMON), 8), (Qwen3Config(**COMMON, head_dim=16), 16), (Qwen2Config(**COMMON), 8)],
)
def test_shapes_are_read_from_configs(config: object, head_dim: int) -> None:
    shape = DecoderShape.from_config(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.context_length) == (4, 2, head_dim, 128)


def small_cache(**limits: int) -> KVCache:
    shape = DecoderShape.from_config(LlamaConfig(**COMMON))
    return KVCache(shape, torch.float32, torch.device("cpu"), **({"max_slots": 8, "max_total_tokens": 512} | limits))


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    cache = small_cache()
    assert cache.reserve(2, 10)
    cache.kv.copy_(torch.randn_like(cache.kv))
    cache.contents[1] = [4, 5]
    held = cache.kv.clone()
    assert not cache.reserve(2, 32)
    assert cache.reserve(3, 40)
    assert (cache.num_slots, cache.length) == (4, 64)
    torch.testing.assert_close(cache.kv[:, :2, :32], held)
    assert cache.contents[1] == [4, 5]
    assert cache.fits(4, 128) and not cache.fits(5, 128) and not cache.fits(9, 8)
    assert cache.reserve(4, 128)
    assert cache.num_slots * cache.length <= 512


def test_slots_are_given_up_for_length_when_the_budget_is_tight() -> None:
    cache = small_cache()
    cache.reserve(8, 32)
    cache.reserve(2, 100)
    assert (cache.num_slots, cache.length) == (4, 128)


def test_swapping_and_sharing_move_keys_values_and_contents() -> None:
    cache = small_cache()
    cache.reserve(4, 32)
    for slot in range(4):
        cache.kv[:, slot] = slot
        cache.contents[slot] = [slot] * 9
    cache.swap([0, 1], [3, 2], used=9)
    assert [cache.kv[0, slot, 0, 0, 0].item() for slot in range(4)] == [3, 2, 1, 0]
    assert cache.kv[0, 0, 9, 0, 0].item() == 0  # beyond `used` nothing moves
    assert [c[0] for c in cache.contents] == [3, 2, 1, 0]
    cache.copy_prefixes([0, 1], [1, 0], [8, 4])
    assert cache.contents[:2] == [[2] * 4, [3] * 8]
    assert [cache.kv[1, slot, 3, 0, 0].item() for slot in range(2)] == [2, 3]


def test_prefixes_are_found_only_where_they_are_worth_it() -> None:
    cache = small_cache()
    cache.reserve(3, 32)
    cache.contents[:] = [[1, 2, 3], list(range(20)), list(range(12)) + [99, 98]]
    lookup = cache.prefix_lookup()
    assert cache.find_prefix(lookup, list(range(30)), 29) == (1, 20)
    assert cache.find_prefix(lookup, list(range(30)), 15) == (1, 15)
    assert cache.find_prefix(lookup, [*range(12), 99, 98, 97], 14) == (2, 14)
    assert cache.find_prefix(lookup, [1, 2, 3, 4], 3) is None
    assert cache.find_prefix(lookup, [7] * 20, 19) is None
    cache.flush()
    assert cache.prefix_lookup() == {} and cache.epoch == 1


@pytest.mark.parametrize("same", [0, 1, 2, 7, 8, 63, 64])
def test_common_prefix(same: int) -> None:
    a, b = list(range(64)), [*range(same), *(-1 for _ in range(64 - same))]
    assert common_prefix(a, b, 100) == same
    assert common_prefix(a, b, 5) == min(same, 5)


def test_prefill_batches_hold_similar_lengths() -> None:
    class Fake:
        def __init__(self, length: int) -> None:
            self.ids = [0] * (length + 1)

    work = [(Fake(n), 0) for n in (5, 4000, 8, 7, 3000, 2600, 2)]
    sizes = [[len(r.ids) - 1 - offset for r, offset in batch] for batch in _prefill_batches(work)]
    assert sizes == [[4000, 3000], [2600], [8, 7, 5], [2]]


@pytest.mark.parametrize("kind", ["llama-mha-bias-rope3", "qwen2", "qwen3", "qwen3-moe", "qwen3-moe-mixed"])
def test_the_weights_in_use_have_the_names_and_values_of_the_checkpoint(
    checkpoints: dict[str, Path], kind: str
) -> None:
    stored = load_tensors(checkpoints[kind], dtype=None, device="cpu")
    named = EmbeddedEngine.from_folder(checkpoints[kind]).model.named
    assert set(named) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(named[name], tensor), name


def test_projections_that_follow_each_other_in_memory_are_not_copied(checkpoints: dict[str, Path]) -> None:
    """As shared memory lays them out: what is written there is what the engine computes with."""
    stored = load_tensors(checkpoints["llama"], dtype=None, device="cpu")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    memory = torch.cat([stored[name].flatten() for name in names])
    parts = memory.split([stored[name].numel() for name in names])
    adjacent = {name: part.view(stored[name].shape) for name, part in zip(names, parts)}
    model = DecoderModel(load_config(checkpoints["llama"]), stored | adjacent)
    assert model.layers[0].qkv.weight.data_ptr() == memory.data_ptr()
    assert torch.equal(model.layers[0].qkv.weight, torch.cat([stored[name] for name in names]))
    assert model.layers[1].qkv.weight.data_ptr() != stored["model.layers.1.self_attn.q_proj.weight"].data_ptr()
