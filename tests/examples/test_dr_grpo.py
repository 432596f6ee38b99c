"""Dr.GRPO's reducer: exact against a loop over tokens, and in a run the only reducer of pg_loss."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from examples.DrGRPO import custom_reducer
from miles.loss.reduce import get_sum_of_sample_mean
from miles.loss.types import ParallelState

CONFIG = "examples/DrGRPO/dr_grpo.yaml"
SMALL = ("--num-rollout", 2, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1)
QUIET = ("--lr", "0", "--eval-interval", 100, "--skip-eval-before-train")


def reducer(masks: list[torch.Tensor], per_token: bool = False):
    lengths = [len(m) for m in masks]
    return custom_reducer.get_pg_loss_reducer([n + 5 for n in lengths], lengths, masks, per_token)


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_tokens(seed: int) -> None:
    rng = random.Random(seed)
    masks = [torch.tensor([rng.randrange(2) for _ in range(rng.randrange(0, 6))]) for _ in range(rng.randrange(1, 7))]
    loss = torch.randn(sum(len(m) for m in masks), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss.requires_grad_()
    place, expected = 0, 0.0
    for mask in masks:
        for bit in mask.tolist():
            expected += loss[place].item() * bit / custom_reducer.DIVISOR
            place += 1
    reduced = reducer(masks)(loss)
    assert reduced.item() == pytest.approx(expected, abs=1e-12)
    reduced.backward()
    flat = torch.cat(masks).double()
    assert torch.equal(loss.grad, flat / custom_reducer.DIVISOR)


def test_tokens_of_long_and_short_responses_count_alike() -> None:
    masks = [torch.ones(2), torch.ones(20)]
    loss = torch.ones(22, requires_grad=True)
    reducer(masks)(loss).backward()
    assert loss.grad is not None and len(loss.grad.unique()) == 1
    default = torch.ones(22, requires_grad=True)
    state = ParallelState.single_process()
    get_sum_of_sample_mean([7, 25], [2, 20], masks, state)(default).backward()
    assert default.grad is not None and default.grad[0] == 10 * default.grad[-1]


def test_what_is_masked_takes_no_part() -> None:
    masks = [torch.tensor([1, 0, 1])]
    loss = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    reduced = reducer(masks)(loss)
    reduced.backward()
    assert float(reduced) == pytest.approx(3 / custom_reducer.DIVISOR)
    assert loss.grad is not None and torch.isfinite(loss.grad).all()
    assert float(reducer([])(torch.empty(0))) == 0.0


def test_refuses_context_parallelism_and_a_second_denominator() -> None:
    with pytest.raises(ValueError, match="--context-parallel-size 1"):
        reducer([torch.ones(8)])(torch.ones(4))
    with pytest.raises(ValueError, match="--calculate-per-token-loss"):
        reducer([torch.ones(8)], True)


def test_a_run_divides_by_the_constant(train, metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rollouts three times, while no weight changes: default, Dr.GRPO, Dr.GRPO with half the divisor."""
    from miles.hooks import load_function

    plug_in = "examples/DrGRPO/custom_reducer.py:get_pg_loss_reducer"
    dr = train(CONFIG, *SMALL, *QUIET)
    module = load_function(plug_in).__globals__
    monkeypatch.setitem(module, "DIVISOR", custom_reducer.DIVISOR / 2)
    half = train(CONFIG, *SMALL, *QUIET)
    default = train(without_plug_in(CONFIG, dr), *SMALL, *QUIET)

    norms = {run: metrics(run, "train/grad_norm") for run in (dr, half, default)}
    assert all(norm > 0 for norm in norms[dr])
    assert norms[half] == pytest.approx([2 * norm for norm in norms[dr]], rel=1e-4)
    assert norms[default] != pytest.approx(norms[dr], rel=1e-2)
    assert metrics(dr, "train/ppo_kl") == pytest.approx(metrics(default, "train/ppo_kl"), abs=1e-6)


def without_plug_in(config: str, folder: Path) -> Path:
    root = Path(__file__).resolve().parents[2]
    lines = (root / config).read_text().splitlines(keepends=True)
    copy = folder / "without.yaml"
    copy.write_text("".join(line for line in lines if not line.startswith("custom-pg-loss")))
    return copy
