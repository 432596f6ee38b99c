"""`--megatron-to-hf-mode bridge` does what raw does: losses, weights, exports, snapshots; on one rank and on two.

Against a miniature of Megatron-Bridge, which cannot be imported with Python 3.11: this proves that miles calls what it
was written for, not that the library does what it says.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_cases import BUCKET, CASES, make_models
from rank_programs import run_ranks
from safetensors.torch import load_file

BOUND = 1e-5


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge")
    make_models(folder)
    for size in (1, 2):
        run_ranks(Path(__file__).with_name("bridge_cases.py"), size, folder)
    return folder


def of(name: str, mode: str, traces: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(traces / f"{name} {mode}.pt")
    return found


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert float((ours[name] - tensor).abs().max()) <= BOUND, name


@pytest.mark.parametrize("name", CASES)
def test_training_equals_raw(name: str, traces: Path) -> None:
    bridge, raw = of(name, "bridge", traces), of(name, "raw", traces)
    assert raw["steps"] and len(bridge["steps"]) == len(raw["steps"])
    for ours, theirs in zip(bridge["steps"], raw["steps"]):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=BOUND)
    assert bridge["rollout"] == pytest.approx(raw["rollout"], rel=1e-4, abs=BOUND)
    close(bridge["weights"], raw["weights"])


@pytest.mark.parametrize("name", CASES)
def test_the_library_builds_loads_and_exports(name: str, traces: Path) -> None:
    bridge = of(name, "bridge", traces)
    built = name != "provider"  # --custom-model-provider-path takes precedence
    assert ("to_megatron_provider" in bridge["calls"]) == built
    assert (bridge["model"] == "GPTModelProvider") == built
    assert {"from_hf_pretrained", "load_hf_weights", "export_hf_weights"} <= set(bridge["calls"])
    assert not of(name, "raw", traces)["calls"]


@pytest.mark.parametrize("name", CASES)
def test_buckets_follow_the_layout(name: str, traces: Path) -> None:
    bridge, raw = of(name, "bridge", traces), of(name, "raw", traces)
    layout, buckets = bridge["layout"], bridge["buckets"]
    assert dict(layout) == dict(raw["layout"])
    assert [name for bucket in buckets for name in bucket] == list(layout)
    assert len(buckets) > 1
    for bucket in buckets:
        assert sum(4 * prod(layout[name][0]) for name in bucket) <= BUCKET or len(bucket) == 1


@pytest.mark.parametrize("name", CASES)
def test_exports_equal_raw(name: str, traces: Path) -> None:
    files = [load_file(traces / f"{name} {mode}" / "model.safetensors") for mode in ("bridge", "raw")]
    close(*files)


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_of_a_folder_leaves_the_model_alone(name: str, traces: Path) -> None:
    bridge, raw = of(name, "bridge", traces), of(name, "raw", traces)
    assert bridge["is as before"]
    assert bridge["reference"].keys() == raw["reference"].keys()
    for weight, tensor in raw["reference"].items():
        assert torch.equal(bridge["reference"][weight], tensor), weight
        assert not torch.equal(bridge["weights"][weight], tensor), weight


def test_experts_are_stacked(traces: Path) -> None:
    layout = of("ep", "bridge", traces)["layout"]
    assert layout["model.layers.0.mlp.experts.gate_up_proj"][0] == (4, 48, 32)
    assert layout["model.layers.0.mlp.experts.down_proj"][0] == (4, 32, 24)


def test_a_run_can_start_from_a_checkpoint(traces: Path) -> None:
    first, model = torch.load(traces / "from a checkpoint.pt"), load_file(traces / "qwen3 reference/model.safetensors")
    assert first.keys() == model.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in model.items())


def test_what_users_are_told(traces: Path) -> None:
    folder, tensors = torch.load(traces / "refusals.pt")
    assert folder.startswith(f"--ref-load {traces / 'qwen2'}: Megatron-Bridge (--megatron-to-hf-mode bridge) cannot")
    assert "use --megatron-to-hf-mode raw." in folder
    assert tensors == (
        "--megatron-to-hf-mode bridge: Megatron-Bridge exports no model.norm.weight, which --hf-checkpoint has. "
        "Use --megatron-to-hf-mode raw."
    )
