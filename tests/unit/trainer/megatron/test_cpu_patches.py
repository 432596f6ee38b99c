"""Every row of the tables in `cpu` is needed, does what it is for, and is left alone where CUDA is available."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
if torch.cuda.is_available():
    pytest.skip("nothing is patched where CUDA is available", allow_module_level=True)

from patched_calls import NEEDED_BY, rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]


def run(*arguments: object) -> str:
    """A Python of its own, from the repository's root; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """Row -> what went wrong without it, and with it."""
    folder = tmp_path_factory.mktemp("calls")
    run(HERE / "patched_calls.py", folder)
    return {row: tuple(both) for row, both in json.loads((folder / "calls.json").read_text()).items()}


def test_every_row_has_a_call_that_needs_it() -> None:
    assert set(NEEDED_BY) == set(rows())


NO_CUDA = ("Torch not compiled with CUDA", "requires CUDA", "pin_memory=True requires", "Found no NVIDIA driver")

# What is no refusal of PyTorch's to do without CUDA.
OTHERWISE = {
    "torch.cuda.manual_seed": "the seed has no effect",
    "Tensor.type": "Wrapped parameters must be one of torch.cuda.FloatTensor",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "all_to_all_single(): incompatible",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "what was drawn apart has changed the rest",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": "name 'te_general_gemm' is not defined",
}


@pytest.mark.parametrize("row", NEEDED_BY)
def test_without_the_row_the_call_fails_and_with_it_it_works(
    row: str, outcomes: dict[str, tuple[list[str], list[str]]]
) -> None:
    without, with_it = outcomes[row]
    expected = (OTHERWISE[row],) if row in OTHERWISE else NO_CUDA
    assert without and any(words in text for text in without for words in expected), without
    assert with_it == []


def test_nothing_is_patched_where_cuda_is_available() -> None:
    """But the gaps, which have to do with another library, are filled."""
    program = """
import importlib
import torch
torch.cuda.is_available = lambda: True
before = {(owner, name): getattr(owner, name, None)
          for owner in (torch, torch.cuda, torch.cuda.random, torch.Tensor) for name in dir(owner)}
import megatron.core.tensor_parallel.random as of_megatron
set_state = of_megatron._set_cuda_rng_state
from miles.trainer.megatron import cpu
changed = [str(p) for p in cpu.PATCHES if before[p.owner, p.name] is not getattr(p.owner, p.name)]
gaps = [getattr(importlib.import_module(module), name) for module, name in cpu.GAPS]
print(changed, cpu._replaced, of_megatron._set_cuda_rng_state is set_state, gaps)
"""
    assert run("-c", program).splitlines()[-1] == "[] {} True [None]"


def test_what_stands_in_the_places() -> None:
    """Patched once; no function stands for two, which torch._dynamo takes for a mistake; and models can be made
    without memory, by factories that know nothing of their replacements."""
    program = """
import torch
from miles.trainer.megatron import cpu
there = [getattr(p.owner, p.name) for p in cpu.PATCHES]
cpu.install()
once = all(old is getattr(p.owner, p.name) for old, p in zip(there, cpu.PATCHES))
with torch.device("meta"):
    made = {torch.zeros(2).device.type, torch.tensor([1.0]).device.type, torch.nn.Linear(2, 2).weight.device.type}
print(once, len({id(f) for f in there}) == len(cpu.PATCHES), made)
"""
    assert run("-c", program).splitlines()[-1] == "True True {'meta'}"
