"""Any number of processes does to a model what one process with one micro batch does: gradients, weights, metrics."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from parallel_cases import CASES, STEPS, Trace, run
from torch import Tensor

from miles.trainer.ranks import Ranks

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}

# Metrics of quantities that are zero but for rounding.
ROUNDING = 2e-7


@functools.cache
def one_process(name: str, folder: Path) -> Trace:
    return run(CASES[name], folder, Ranks.alone())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        scale = max(float(tensor.abs().max()), 1e-6)
        assert float((got[name] - tensor).abs().max()) <= bound * scale, name


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.sizes])
def test_every_layout_trains_alike(name: str, size: int, layouts: Path) -> None:
    got, want = Trace(**torch.load(layouts / f"{size} {name}.pt")), one_process(name, layouts)
    case = CASES[name]
    bound = case.bound or RELATIVE[case.dtype]
    steps = 1 if name == "balanced" else STEPS
    assert len(want.gradients) == len(got.gradients) == steps
    for ours, theirs in zip(got.gradients, want.gradients):
        assert_close(ours, theirs, bound)
    assert_close(got.weights, want.weights, bound)
    for ours_m, theirs_m in zip(got.steps, want.steps, strict=True):
        assert ours_m == pytest.approx(theirs_m, rel=case.bound or 1e-5, abs=case.bound or ROUNDING)
    assert got.rollout == pytest.approx(want.rollout, rel=case.bound or 1e-5, abs=ROUNDING)


def test_the_gradients_are_none_that_would_always_agree(layouts: Path) -> None:
    """The comparison above is of something: every parameter has a gradient, and training has moved it."""
    trace = one_process("plain", layouts)
    assert all(float(g.abs().max()) > 1e-5 for g in trace.gradients[0].values())
    first, last = trace.gradients[0], trace.gradients[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first)


def test_a_step_in_which_nobody_has_work_is_a_step(layouts: Path) -> None:
    trace = one_process("nobody has work", layouts)
    assert [line["train/exactly_zero_samples"] for line in trace.steps] == [0, 8, 0]
    assert trace.steps[1]["train/loss"] == 0 and trace.steps[1]["train/grad_norm"] == 0


def test_narrow_passes_are_narrow(layouts: Path) -> None:
    """With --fsdp-param-dtype bfloat16 the passes round, and the weights do not."""
    got, want = torch.load(layouts / "2 bfloat16.pt"), one_process("bfloat16", layouts)
    assert all(tensor.dtype == torch.float32 for tensor in got["weights"].values())
    assert any(not torch.allclose(got["weights"][n], t, rtol=1e-4, atol=1e-7) for n, t in want.weights.items())


@pytest.mark.parametrize("size", [2, 4])
def test_other_weights_can_be_held_for_a_while(size: int, layouts: Path) -> None:
    assert torch.load(layouts / f"{size} held.pt") == {"others differ": True, "own again": True, "held": True}
