"""The sums of the true on-policy mode: one value in any order, any batch and any layout, and close to the true one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles import exact

SEEDS = st.integers(0, 2**31)


def wild(generator: torch.Generator, *shape: int) -> Tensor:
    """float32 over many powers of two, as no trained model has them."""
    size = torch.randint(-20, 15, shape, generator=generator).float().exp2()
    return torch.randn(shape, generator=generator) * size


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 300), st.integers(1, 40))
def test_a_projection_is_the_same_in_any_order_batch_and_cut(seed: int, rows: int, terms: int, out: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = wild(g, rows, terms), wild(g, out, terms)
    grid = exact.on_grid(weight)
    whole = exact.linear(x, grid)
    order = torch.randperm(terms, generator=g)
    assert torch.equal(exact.linear(x[:, order], grid[:, order]), whole)
    for i in range(rows):
        assert torch.equal(exact.linear(x[i], grid), whole[i])
        assert torch.equal(exact.linear(x[i : i + 1], grid[:1]), whole[i : i + 1, :1])


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 300))
def test_every_partial_sum_of_products_is_exact(seed: int, terms: int) -> None:
    """Against `math.fsum`, which rounds once; the products themselves must be exact for that."""
    g = torch.Generator().manual_seed(seed)
    x, w = exact.on_grid(wild(g, terms)), exact.on_grid(wild(g, terms))
    products = (x * w).tolist()
    total = 0.0
    for product in products:
        total += product
    assert total == math.fsum(products) == float(x @ w)


def test_the_grid_is_as_fine_as_float32_for_usual_rows() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert (exact.on_grid(x) - x.double()).abs().max() < 4.0 * 2.0**-22
    assert exact.grid_bits(128) == 23 and exact.grid_bits(4096) == 20 and exact.grid_bits(1) == 26


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-40, 0.0], [1e38, -1e-38]])
def test_rows_at_the_edges_of_float32(row: list[float]) -> None:
    x = torch.tensor(row)
    torch.testing.assert_close(exact.on_grid(x).float(), x)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_numbers_that_are_not_finite_stay_so(bad: float) -> None:
    x = torch.tensor([[1.0, bad], [1.0, 2.0]])
    out = exact.linear(x, exact.on_grid(torch.ones(1, 2)))
    assert not out[0].isfinite() and out[1] == 3.0
    assert not exact.log_softmax(torch.tensor([1.0, math.nan])).isfinite().any()


def test_exp() -> None:
    x = -torch.cat([torch.linspace(0, 3, 5001), torch.linspace(3, 63, 5001)]).double()
    assert (exact.exp(x.clone()) / x.exp() - 1).abs().max() < 3e-12
    assert exact.exp(torch.zeros(1, dtype=torch.float64)).item() == 1.0
    parts = torch.cat([exact.exp(part.clone()) for part in x.split(7)])
    assert torch.equal(parts, exact.exp(x.clone()))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 400))
def test_softmaxes_in_any_order_and_beside_masked_places(seed: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, width, generator=g) * 6
    order = torch.randperm(width, generator=g)
    log_p = exact.log_softmax(logits)
    torch.testing.assert_close(log_p, logits.log_softmax(-1), atol=2e-6, rtol=1e-6)
    assert torch.equal(exact.log_softmax(logits[:, order]), log_p[:, order])
    assert torch.equal(exact.log_softmax(logits[1]), log_p[1])
    probs = exact.softmax(logits)
    torch.testing.assert_close(probs, logits.double().softmax(-1), atol=1e-9, rtol=1e-6)
    padded = torch.cat([logits.double(), torch.full((3, 5), -math.inf, dtype=torch.float64)], -1)
    assert torch.equal(exact.softmax(padded)[:, :width], probs) and not exact.softmax(padded)[:, width:].any()


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(1, 70), st.sampled_from([8, 16, 64]))
def test_attention_in_any_order_of_keys_and_any_cut_of_queries(seed: int, heads: int, keys: int, dim: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, keys, dim, generator=g) * 2 for _ in range(3))
    mask = torch.full((keys, keys), -math.inf, dtype=torch.float64).triu(1).expand(heads, -1, -1)
    query, key, values = exact.on_grid(q), exact.on_grid(k), exact.split_values(v)
    whole = exact.attend(query, key, *values, mask, dim**-0.5)
    plain = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(whole, plain, atol=1e-5, rtol=1e-5)
    order = torch.randperm(keys, generator=g)
    moved = exact.attend(query, key[:, order], *(part[:, order] for part in values), mask[:, :, order], dim**-0.5)
    assert torch.equal(moved, whole)
    last = exact.attend(query[:, -1:], key, *values, mask[:, -1:], dim**-0.5)
    assert torch.equal(last, whole[:, -1:])


def test_queries_are_cut_where_scores_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.full((30, 30), -math.inf, dtype=torch.float64).triu(1).expand(2, -1, -1)
    given = (exact.on_grid(q), exact.on_grid(k), *exact.split_values(v), mask, 0.3)
    whole = exact.attend(*given)
    monkeypatch.setattr(exact, "SCORES", 250)  # four queries at a time
    assert torch.equal(exact.attend(*given), whole)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 200))
def test_norm_silu_and_rotation_agree_with_the_usual_ones(seed: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(4, 2 * width, generator=g) * 3, torch.randn(2 * width, generator=g)
    norm = exact.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(norm, torch.nn.functional.rms_norm(x, (2 * width,), weight, 1e-6), atol=1e-5, rtol=1e-5)
    assert torch.equal(exact.rms_norm(x[2], weight, 1e-6), norm[2])
    torch.testing.assert_close(exact.silu(x), torch.nn.functional.silu(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([exact.silu(part) for part in x.flatten().split(3)]), exact.silu(x).flatten())


def test_rotary_tables_do_not_depend_on_their_length() -> None:
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 32, 2) / 32)
    short, long = exact.rotary_table(inv_freq, 1.0, 3), exact.rotary_table(inv_freq, 1.0, 2000)
    assert len(short[0]) == 512 and len(long[0]) == 2048
    for a, b in zip(short, long):
        assert torch.equal(a, b[:512])
    torch.testing.assert_close(long[1][777, 3], (777 * inv_freq[3]).sin(), atol=1e-6, rtol=1e-5)


def test_equal_probabilities_are_routed_by_number() -> None:
    probs = torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert exact.route(probs, 2).tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(exact.normalized(probs[:, :3]), probs[:, :3] / probs[:, :3].sum(1, keepdim=True))
    parts = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(exact.weighted_sum(parts, probs[:, :3]), torch.einsum("nkc,nk->nc", parts, probs[:, :3]))
