"""Log-probs and entropies: values against a loop, gradients by finite differences, chunks against one chunk."""

from __future__ import annotations

from typing import Any

import loss_reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miles.loss import linear_log_probs, log_probs_from_logits


def problem(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary * 10 + width)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@given(st.integers(0, 7), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1.0, 0.7, 2.0]), st.integers(1, 8))
def test_values_against_the_loop(tokens: int, vocabulary: int, width: int, temperature: float, chunk: int) -> None:
    hidden, weight, targets = problem(tokens, vocabulary, width)
    fused = linear_log_probs(hidden, weight, targets, temperature=temperature, with_entropy=True, chunk_tokens=chunk)
    plain = log_probs_from_logits(hidden @ weight.T, targets, temperature=temperature, with_entropy=True)
    expected = [
        loss_reference.log_prob_and_entropy(h, weight.tolist(), y, temperature)
        for h, y in zip(hidden.tolist(), targets.tolist())
    ]
    for got in (fused, plain):
        assert got.entropy is not None
        assert got.log_probs.tolist() == pytest.approx([lp for lp, _ in expected], abs=1e-12)
        assert got.entropy.tolist() == pytest.approx([h for _, h in expected], abs=1e-12)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("outputs", ["log_probs", "entropy", "sum"])
def test_gradients(chunk: int, temperature: float, outputs: str) -> None:
    hidden, weight, targets = problem(5, 7, 3)

    def function(h: Tensor, w: Tensor) -> Any:
        got = linear_log_probs(h, w, targets, temperature=temperature, with_entropy=True, chunk_tokens=chunk)
        assert got.entropy is not None
        return {"log_probs": got.log_probs, "entropy": got.entropy, "sum": got.log_probs + 0.3 * got.entropy}[outputs]

    assert torch.autograd.gradcheck(function, (hidden, weight), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    hidden, weight, targets = problem(5, 7, 3)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, targets, chunk_tokens=2).log_probs, (hidden, weight)
    )


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tokens_have_zero_gradient(with_entropy: bool) -> None:
    hidden, weight, targets = problem(0, 7, 3)
    got = linear_log_probs(hidden, weight, targets, with_entropy=with_entropy)
    got.log_probs.sum().backward()
    assert got.log_probs.shape == (0,) and weight.grad is not None and not weight.grad.any()


def test_unused_outputs_give_zero_gradient() -> None:
    """A loss that reads only the detached entropy must not fail in backward."""
    hidden, weight, targets = problem(3, 5, 2)
    got = linear_log_probs(hidden, weight, targets, with_entropy=True)
    assert got.entropy is not None
    (got.log_probs * 0).sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("chunk", [None, 64])
def test_bf16_projections_have_fp32_statistics(chunk: int | None) -> None:
    """The chunked weight gradient of bf16 weights is summed in fp32: as close to fp64 as one product is."""
    hidden, weight, targets = problem(512, 33, 16, torch.bfloat16)
    got = linear_log_probs(hidden, weight, targets, chunk_tokens=chunk)
    assert got.log_probs.dtype == torch.float32
    got.log_probs.mean().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = log_probs_from_logits(exact_hidden @ exact_weight.T, targets)
    exact.log_probs.mean().backward()
    assert exact_weight.grad is not None
    torch.testing.assert_close(got.log_probs.double(), exact.log_probs, atol=0.1, rtol=0)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=2e-3, rtol=2e-2)


def test_chunks_equal_one_chunk_in_fp32() -> None:
    results = []
    for chunk in (None, 7):
        hidden, weight, targets = problem(50, 53, 8, torch.float32)
        got = linear_log_probs(hidden, weight, targets, with_entropy=True, chunk_tokens=chunk, temperature=0.8)
        assert got.entropy is not None
        (got.log_probs.sum() + 0.1 * got.entropy.sum()).backward()
        results.append((got.log_probs, got.entropy, hidden.grad, weight.grad))
    for one, many in zip(*results):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


def test_large_vocabularies_never_exist_as_a_whole() -> None:
    """With 400 tokens of a vocabulary of 20,000, no tensor of [tokens, vocabulary] is made, forward or backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight, targets = problem(400, 20_000, 2, torch.float32)
    with Watch():
        got = linear_log_probs(hidden, weight, targets, with_entropy=True, chunk_tokens=40)
        got.log_probs.sum().backward()
    assert largest == 40 * 20_000


def test_impossible_tokens() -> None:
    """-inf logits: probability 0, no contribution to the entropy, no NaN in the gradient."""
    logits = torch.tensor([[0.0, 1.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    got = log_probs_from_logits(logits, torch.tensor([1]), with_entropy=True)
    short = log_probs_from_logits(logits[:, :2], torch.tensor([1]), with_entropy=True)
    assert got.entropy is not None and short.entropy is not None
    torch.testing.assert_close(got.entropy, short.entropy)
    (got.log_probs.sum() + 3 * got.entropy.sum()).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
