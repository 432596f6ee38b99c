"""Every layout of Megatron trains a model as Hugging Face with AdamW does: losses, gradient norms, weights, metrics."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from megatron_cases import CASES, FAMILIES, PPO, Case, make_models, run
from parallel_cases import PER_STEP, STEPS, VOCABULARY, Trace, rollout
from rank_programs import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

SIZES = (1, 2, 4)
LR, CLIP_GRAD, EPS_LOW, EPS_HIGH = 5e-3, 0.5, 0.1, 0.15

# The loss of a step is near 0: its terms are of the size of 1, and their sum has their rounding.
LOSS, RELATIVE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one, two and four ranks have left a trace of every case."""
    folder = tmp_path_factory.mktemp("megatron")
    make_models(folder)
    for size in SIZES:
        run_ranks(Path(__file__).with_name("megatron_cases.py"), size, folder)
    return folder


def trace_of(name: str, traces: Path) -> Trace:
    return Trace(**torch.load(traces / f"{name}.pt"))


@functools.cache
def fsdp(model: str, flags: tuple[str, ...], traces: Path) -> Trace:
    """The Hugging Face model in one process, which the tests of the actor compare with plain loops."""
    return run(Case(1, model, flags=flags), traces, None)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_alike(name: str, traces: Path) -> None:
    case = CASES[name]
    got, want = trace_of(name, traces), fsdp(case.model, case.flags, traces)
    assert len(want.steps) == STEPS * (2 if case.flags == PPO else 1)  # with those of the critic
    for ours, theirs in zip(got.steps, want.steps, strict=True):
        assert ours == pytest.approx(theirs, rel=10 * case.bound, abs=case.bound)
    assert got.rollout == pytest.approx(want.rollout, rel=10 * case.bound, abs=case.bound)
    assert got.weights.keys() == want.weights.keys()
    for weight, tensor in want.weights.items():
        assert float((got.weights[weight] - tensor).abs().max()) <= case.bound, weight


@functools.cache
def hugging_face(model: str, traces: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain loop: one forward pass per sample, `torch.optim.AdamW`."""
    own = AutoModelForCausalLM.from_pretrained(
        traces / model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    optimizer = torch.optim.AdamW(own.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    batch = rollout("mixed")
    rows = torch.from_numpy(batch.tokens).split(batch.total_lengths.tolist())
    lengths = batch.response_lengths.tolist()
    masks = torch.from_numpy(batch.loss_masks).float().split(lengths)
    rewards = torch.as_tensor(batch.rewards)

    def log_probs(row: Tensor, length: int) -> Tensor:
        log_p = own(row[None]).logits[0].log_softmax(-1)
        return log_p[-length - 1 : -1].gather(1, row[-length:, None]).squeeze(1)

    with torch.no_grad():
        old = [log_probs(row, length) for row, length in zip(rows, lengths)]
    outcome = []
    for start in range(0, len(rows), PER_STEP):
        total = torch.zeros(())
        for i in range(start, start + PER_STEP):
            ratio = torch.exp(log_probs(rows[i], lengths[i]) - old[i])
            worst = torch.minimum(ratio * rewards[i], ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * rewards[i])
            total = total - (worst * masks[i]).sum() / masks[i].sum().clamp(min=1)
        optimizer.zero_grad()
        (total / PER_STEP).backward()
        norm = torch.nn.utils.clip_grad_norm_(own.parameters(), CLIP_GRAD)
        optimizer.step()
        outcome.append((float(total.detach()) / PER_STEP, float(norm)))
    return outcome


PLAIN = [name for name, case in CASES.items() if not case.flags and case.bound == 1e-5]


@pytest.mark.parametrize("name", PLAIN)
def test_three_steps_equal_hugging_face_and_adamw(name: str, traces: Path) -> None:
    got = trace_of(name, traces)
    for ours, (loss, norm) in zip(got.steps, hugging_face(CASES[name].model, traces), strict=True):
        assert ours["train/loss"] == pytest.approx(loss, abs=LOSS)
        assert ours["train/grad_norm"] == pytest.approx(norm, rel=RELATIVE)


def test_there_is_something_to_compare(traces: Path) -> None:
    """Losses differ from step to step and from model to model, gradients are clipped, and weights have moved."""
    for model in FAMILIES:
        steps = hugging_face(model, traces)
        assert all(abs(loss) > 1e-3 for loss, _ in steps[1:]) and all(norm > CLIP_GRAD for _, norm in steps)
    assert len({hugging_face(model, traces)[2] for model in FAMILIES}) == len(FAMILIES)
    assert VOCABULARY < 53


def test_half_precision_is_half_and_its_masters_are_whole(traces: Path) -> None:
    got, want = trace_of("bfloat16", traces), fsdp("qwen3", (), traces)
    assert {tensor.dtype for tensor in got.weights.values()} == {torch.bfloat16}
    assert any(abs(a["train/loss"] - b["train/loss"]) > 1e-4 for a, b in zip(got.steps, want.steps))
