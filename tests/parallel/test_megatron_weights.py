"""Weights between Hugging Face folders and Megatron-Core models of one, two and four processes.

Logits beside transformers say that tensors are where they belong; folders that come out bit for bit say it for every
layout. What the ranks do is in `megatron_weights`, which runs once for each number of processes.
"""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron_models import FAMILIES, make_folder, reference_logits
from megatron_weights import BAD, BUCKETS, CASES

DENSE_BOUND, MOE_BOUND = 2e-6, 1e-5
EVERY = [(name, size) for size, cases in CASES.items() for name in cases]
MODES = ("each", "stacked")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all models, good and bad, in which every rank has left what came out."""
    folder = tmp_path_factory.mktemp("megatron")
    for name in FAMILIES:
        make_folder(folder / name, name)
    make_folder(folder / "qwen2 sharded", "qwen2", shard="40KB")
    assert len(list((folder / "qwen2 sharded").glob("*.safetensors"))) > 2
    stack_experts(folder / "moe", folder / "moe stacked")
    for name in BAD:
        make_bad(folder, name)
    for size in CASES:
        run_ranks(Path(__file__).with_name("megatron_weights.py"), size, folder)
    return folder


def stack_experts(source: Path, target: Path) -> None:
    """The folder as a `state_dict` of transformers has it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file(tensors, target / "model.safetensors")


def make_bad(folder: Path, name: str) -> None:
    sharded = name in ("lost shard", "bad index")
    bad = shutil.copytree(folder / ("qwen2 sharded" if sharded else "qwen2"), folder / f"bad {name}")
    file = bad / "model.safetensors"
    if sharded:
        if name == "lost shard":
            sorted(bad.glob("*.safetensors"))[1].unlink()
        else:
            (bad / "model.safetensors.index.json").write_text("{}")
        return
    tensors = load_file(file)
    if name == "missing":
        del tensors["model.layers.3.self_attn.k_proj.bias"], tensors["model.norm.weight"]
    elif name == "extra":
        tensors["model.layers.4.input_layernorm.weight"] = torch.ones(32)
    elif name == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)
        tensors["model.embed_tokens.weight"] = torch.zeros(64, 32)
    elif name == "many":
        tensors = {f"other.{i}": torch.zeros(1) for i in range(3)}
    save_file(tensors, file)
    if name == "torn":
        file.write_bytes(file.read_bytes()[:2000])
    elif name == "no weights":
        file.unlink()
    elif name == "no config":
        (bad / "config.json").unlink()
    elif name == "unknown":
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForTokenClassification"]}))


def of(left: Path, case: str, size: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(left / f"{case} {size} {rank}.pt")


def expected(left: Path, family: str, mode: str) -> dict[str, Tensor]:
    if mode == "stacked" and FAMILIES[family].model_type == "qwen3_moe":
        model = AutoModelForCausalLM.from_pretrained(left / family, dtype=torch.float32)
        tied = FAMILIES[family].tie_word_embeddings
        return {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    return load_file(left / family / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, left: Path) -> None:
    ours, theirs = of(left, family, 1)["logits"], reference_logits(left / family)
    assert theirs.std() > 0.1
    bound = MOE_BOUND if "moe" in family else DENSE_BOUND
    assert (ours - theirs).abs().max() < bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "size"), EVERY)
def test_the_folder_comes_out_bit_for_bit(case: str, size: int, mode: str, left: Path) -> None:
    whole = expected(left, CASES[size][case].family, mode)
    for bucket_bytes in BUCKETS:
        buckets = of(left, case, size)[f"{mode} {bucket_bytes}"]
        exported = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
        assert exported.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(whole[name], exported[name])] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "size"), EVERY)
def test_every_rank_knows_what_comes_and_only_the_first_gets_it(case: str, size: int, mode: str, left: Path) -> None:
    first = of(left, case, size)
    layout = first[f"layout {mode}"]
    for bucket_bytes in BUCKETS:
        buckets = first[f"{mode} {bucket_bytes}"]
        shapes = [(name, (tuple(t.shape), t.dtype)) for bucket in buckets for name, t in bucket.items()]
        assert shapes == list(layout.items())
        for rank in range(1, size):
            other = of(left, case, size, rank)
            assert other[f"layout {mode}"] == layout
            assert other[f"{mode} {bucket_bytes}"] == [{} for _ in buckets]


def test_buckets_hold_at_most_their_bytes(left: Path) -> None:
    found = of(left, "tp2 pp2 qwen3", 4)
    sizes = [[prod(t.shape) * t.element_size() for t in bucket.values()] for bucket in found["each 20000"]]
    assert all(sum(bucket) <= 20_000 for bucket in sizes) and 3 < len(sizes) < 20
    assert len(found[f"each {BUCKETS[-1]}"]) == 1


@pytest.mark.parametrize("bucket_bytes", [4_000, 20_000])
@pytest.mark.parametrize("family", ["qwen3", "moe"])
def test_memory_is_one_bucket_and_the_largest_parameter(family: str, bucket_bytes: int, left: Path) -> None:
    largest = (4 + 2 + 2) * 16 * 32 if family == "qwen3" else 4 * 2 * 24 * 32  # queries, keys, values; all experts
    peaks = [torch.load(left / f"memory {rank}.pt")[f"{family} {bucket_bytes}"] for rank in range(4)]
    assert bucket_bytes < peaks[0] <= bucket_bytes + 4 * largest
    assert all(peak < peaks[0] for peak in peaks[1:])


@pytest.mark.parametrize(("case", "size"), EVERY)
def test_reading_is_loading_without_the_model(case: str, size: int, left: Path) -> None:
    for rank in range(size):
        found = of(left, case, size, rank)
        assert found["untouched"] and found["read is loaded"]


def test_rows_that_pad_the_vocabulary_are_nothing(left: Path) -> None:
    assert of(left, "llama", 1)["padding"] == [0.0, 0.0]
    assert of(left, "pp2 tied", 2)["padding"] == [0.0] == of(left, "pp2 tied", 2, 1)["padding"]


def test_an_output_layer_of_one_s_own_is_kept_and_not_exported(left: Path) -> None:
    found = torch.load(left / "own head.pt")
    assert found["kept"] and "model.norm.weight" in found["names"] and len(found["names"]) > 40
    assert "lm_head.weight" not in found["names"] and not [n for n in found["read"] if "output_layer" in n]


def test_wrapped_models_of_another_dtype(left: Path) -> None:
    found = torch.load(left / "bfloat16.pt")
    whole = load_file(left / "llama" / "model.safetensors")
    exported = {name: t for bucket in found["buckets"] for name, t in bucket.items()}
    assert {dtype for _, dtype in found["layout"].values()} == {torch.bfloat16}
    assert all(torch.equal(exported[name], t.bfloat16()) for name, t in whole.items())


def test_only_what_lies_scattered_is_copied(left: Path) -> None:
    copied = torch.load(left / "bfloat16.pt")["copied"]
    assert len(copied) == 12 and all(name.split(".")[4] in ("q_proj", "k_proj", "v_proj") for name in copied)


@pytest.mark.parametrize("source", ["moe stacked", "qwen2 sharded"])
def test_folders_of_other_forms(source: str, left: Path) -> None:
    assert torch.load(left / "stored.pt")[source] == []


def test_names_of_other_modules(left: Path) -> None:
    found = torch.load(left / "spelled.pt")
    assert found["wrong"] == []
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in found["names"]
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in found["names"]
    whole = load_file(left / "moe and dense" / "model.safetensors")
    assert found["exported"].keys() == whole.keys()
    assert all(torch.equal(found["exported"][name], t) for name, t in whole.items())


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("missing", ["model.layers.3.self_attn.k_proj.bias: not in the folder", "model.norm.weight: not in"]),
        ("extra", ["model.layers.4.input_layernorm.weight: not in the model"]),
        (
            "shape",
            [
                "model.layers.1.mlp.up_proj.weight: [40, 32] in the folder, [48, 32] in the model",
                "model.embed_tokens.weight: [64, 32] in the folder, [53, 32] in the model",
            ],
        ),
        ("many", ["model.embed_tokens.weight: not in the folder", "and 34 more"]),
        ("torn", ["model.safetensors is missing, damaged or unreadable"]),
        ("no weights", ["no *.safetensors file"]),
        ("no config", ["expected a Hugging Face model folder with config.json"]),
        ("unknown", ["no table of weights for Qwen2ForTokenClassification", "LlamaForCausalLM"]),
        ("lost shard", ["is missing, damaged or unreadable"]),
        ("bad index", ["model.safetensors.index.json cannot be read"]),
    ],
)
def test_bad_folders(name: str, sentences: list[str], left: Path) -> None:
    said = torch.load(left / "refused 1 0.pt")[name]
    assert said.startswith(f"--ref-load {left / f'bad {name}'}: ")
    assert [sentence for sentence in sentences if sentence not in said] == []


def test_all_ranks_refuse_alike(left: Path) -> None:
    said = [torch.load(left / f"refused 2 {rank}.pt") for rank in range(2)]
    assert said[0] == said[1] and all("not in" in text or "in the model" in text for text in said[0].values())
