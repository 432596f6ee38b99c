"""Checkpoints of Megatron trainers: what one layout saves, another goes on from, place by place.

What the ranks do is in `megatron_checkpoints`, which runs once with one process and once with four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron_checkpoints import CASES, DAMAGE, MODELS, TRAINED, make_folders

EVERY = [(name, size) for size, cases in CASES.items() for name in cases]
EVERY_TRAINED = [(name, size) for size, cases in TRAINED.items() for name in cases]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every rank has left what it found."""
    folder = tmp_path_factory.mktemp("megatron")
    make_folders(folder)
    for size in CASES:
        run_ranks(Path(__file__).with_name("megatron_checkpoints.py"), size, folder)
    return folder


def of(left: Path, name: str) -> Any:
    return torch.load(left / f"{name}.pt")


@pytest.mark.parametrize(("case", "size"), EVERY)
def test_every_place_of_every_moment_is_where_it_belongs(case: str, size: int, left: Path) -> None:
    """Weights, masters, both moments, steps; learning rates and other settings are those of the flags."""
    found = [of(left, f"{size} {case} {rank}") for rank in range(size)]
    assert [problem for of_rank in found for problem in of_rank[1:]] == []
    seen = sum(int(of_rank[0].split()[0]) for of_rank in found)
    assert seen >= sum(t.numel() for t in _codes(left, CASES[size][case].family).values())


def _codes(left: Path, family: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(left / f"{family} codes" / "model.safetensors")
    return {name: t for name, t in tensors.items() if name != "lm_head.weight"}  # a critic has none


def test_codes_say_everything(left: Path) -> None:
    """No value is there twice, so that nothing can be exchanged unseen."""
    for family in MODELS:
        values = torch.cat([t.reshape(-1) for t in _codes(left, family).values()])
        assert len(values.unique()) == len(values) and float(values.max()) < 2**24


@pytest.mark.parametrize(("case", "size"), EVERY_TRAINED)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, size: int, left: Path) -> None:
    """On the same layout bit for bit; on another as near as the layouts are to each other."""
    trained, found = TRAINED[size][case], of(left, f"trained {size} {case}")
    assert found["steps"] == (6, 6)
    assert _distance(found["half"], found["there"]) == 0
    assert _distance(found["half"], found["expected"]) > 5e-3
    assert _distance(found["expected"], found["found"]) <= (0 if trained.saved == trained.loaded else 1e-6)


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 30
    return max(float((a[name] - b[name]).abs().max()) for name in a)


SAYS = {
    "description that runs a command": "it refers to posix.system, which no checkpoint needs",
    "description that reaches further": "it refers to torch.distributed.checkpoint.planner.io.StringIO",
    "description that names a function": "it refers to torch.distributed.checkpoint.planner.reduce",
    "description that makes a writer": "it refers to torch.PyTorchFileWriter",
    "description cut short": "UnpicklingError: pickle data was truncated",
    "description gone": "No such file or directory",
    "common part that runs a command": "Weights only load failed",
    "common part gone": "No such file or directory",
    "mark": "JSONDecodeError",
    "pieces cut short": "cannot be read",
    "a piece gone": "No such file or directory",
    "bytes for a tensor": "decoder.final_layernorm.weight: not in the checkpoint",
    "a moment gone": "exp_avg.decoder.final_layernorm.weight: not in the checkpoint",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named_and_nothing_in_it_runs(name: str, left: Path) -> None:
    found = of(left, "refusals")
    assert found[name].startswith("--load") and SAYS[name] in found[name] and f"bad {name}" in found[name]
    assert not found[f"{name} ran"]


def test_a_checkpoint_of_another_model_or_optimizer(left: Path) -> None:
    found = of(left, "refusals")
    assert found["good"] == "loaded"
    said = found["other optimizer"]
    assert "Resume with --use-distributed-optimizer, or without the optimizer's state: --no-load-optim" in said
    for name, sentence in (
        ("other architecture", "linear_proj.weight: [4, 32, 64] in the checkpoint, [4, 32, 32] in the model"),
        ("fewer layers", "linear_proj.weight: [4, 32, 64] in the checkpoint, [2, 32, 64] in the model"),
    ):
        assert "of another architecture than --hf-checkpoint" in found[name] and sentence in found[name]


def test_of_megatron_s_own_checkpoints_the_weights_are_taken(left: Path) -> None:
    """Masters follow; the objects in it, which are pickles, are not read."""
    found = of(left, "of_others")
    assert found["weights"] == [] and found["masters"] and found["steps"] == 0
    assert found["is there"] and not found["ran"]


def test_other_weights_are_kept_in_folders_of_the_same_form(left: Path) -> None:
    found = of(left, "snapshots")
    assert found["read"] and found["kept"]
    assert "was written with --train-backend fsdp, this run has --train-backend megatron" in found["said"]
