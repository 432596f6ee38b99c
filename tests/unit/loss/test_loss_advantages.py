"""Every estimator against the loop reference; the scan behind GAE and returns; whitening."""

from __future__ import annotations

import math
from typing import Any

import advantage_reference
import numpy as np
import pytest
import torch
from advantage_reference import Response
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miles.batch.rewards import CENTRED, LEFT_OUT, SCALED, default_rewards
from miles.errors import UsageError
from miles.loss.advantages import ESTIMATORS, FROM_A_TEACHER, PENALIZED, AdvantageInputs, compute_advantages
from miles.loss.scan import discounted_sums, following
from miles.loss.types import LossSettings
from miles.loss.whiten import whiten
from miles.types import Failure, Sample

number = st.floats(-2, 2).map(lambda x: round(x, 3))
lengths_of = st.lists(st.integers(0, 7), min_size=1, max_size=6)
OF_REWARDS = sorted(set(ESTIMATORS) - FROM_A_TEACHER)


@st.composite
def responses(draw: Any) -> list[Response]:
    rows = []
    for length in draw(lengths_of):
        column = st.lists(number, min_size=length, max_size=length)
        mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        rows.append(Response(draw(number), mask, draw(column), draw(column), draw(column)))
    return rows


def flat(rows: list[Response], name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([x for row in rows for x in getattr(row, name)], dtype=dtype)


def inputs_of(rows: list[Response], settings: LossSettings) -> AdvantageInputs:
    return AdvantageInputs(
        torch.tensor([row.reward for row in rows], dtype=torch.float64),
        [len(row.mask) for row in rows],
        loss_mask=flat(rows, "mask", torch.int32),
        settings=settings,
        old_log_probs=flat(rows, "old"),
        ref_log_probs=flat(rows, "ref"),
        values=flat(rows, "value"),
    )


@pytest.mark.parametrize("estimator", OF_REWARDS)
@given(
    rows=responses(),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lambd=st.sampled_from([1.0, 0.95, 0.0]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
)
def test_estimators_against_the_loop(
    estimator: str, rows: list[Response], gamma: float, lambd: float, kl_coef: float, kind: str
) -> None:
    settings = LossSettings(gamma=gamma, lambd=lambd, kl_coef=kl_coef, kl_loss_type=kind)
    got = compute_advantages(estimator, inputs_of(rows, settings))
    expected = advantage_reference.advantages(
        estimator, rows, gamma=gamma, lambd=lambd, kl_coef=kl_coef, kl_loss_type=kind
    )
    # The result is float32, made in float64.
    assert got.advantages.dtype == got.returns.dtype == torch.float32
    assert got.advantages.tolist() == pytest.approx(expected[0], abs=1e-6, rel=1e-6)
    assert got.returns.tolist() == pytest.approx(expected[1], abs=1e-6, rel=1e-6)


def test_what_estimators_read() -> None:
    """Every estimator is in exactly the tables that say what it reads and how its rewards are prepared."""
    assert set(ESTIMATORS) == CENTRED | PENALIZED | FROM_A_TEACHER
    assert SCALED | LEFT_OUT <= CENTRED and not SCALED & LEFT_OUT


def test_without_a_reference_pass_there_is_no_penalty() -> None:
    """Rollouts that train the critic alone are not evaluated by the policy."""
    rows = [Response(1.0, [1, 1], [0.5, 0.5], [0.1, 0.1], [0.2, 0.3])]
    inputs = inputs_of(rows, LossSettings(kl_coef=0.5))
    bare = AdvantageInputs(
        inputs.rewards, inputs.response_lengths, inputs.loss_mask, inputs.settings, values=inputs.values
    )
    assert compute_advantages("ppo", bare).returns.tolist() == pytest.approx([1.0, 1.0])
    assert compute_advantages("ppo", inputs).returns.tolist() == pytest.approx([0.6, 0.8])


def test_a_removed_sample_and_an_empty_response_have_no_outcome() -> None:
    removed = Response(5.0, [0, 0], [0.0] * 2, [0.0] * 2, [0.0] * 2)
    masked_end = Response(1.0, [1, 0], [0.0] * 2, [0.0] * 2, [0.0] * 2)
    rows = [removed, Response(7.0, []), masked_end]
    got = compute_advantages("reinforce_plus_plus", inputs_of(rows, LossSettings()))
    assert got.advantages.tolist() == [0.0, 0.0, 1.0, 0.0]


# ---- rewards of groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", OF_REWARDS)
@given(
    groups=st.lists(st.lists(st.none() | number, min_size=1, max_size=5), min_size=1, max_size=4),
    std=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_rewards_against_the_loop(
    estimator: str, groups: list[list[float | None]], std: bool, shuffle: Any
) -> None:
    """Unequal groups, in any order, with failed scores and groups of one."""
    samples, expected = [], []
    for g, rewards in enumerate(groups):
        wanted = [0.0 if r is None else r for r in rewards]
        if estimator in CENTRED:
            wanted = (
                advantage_reference.group_relative(rewards, estimator, std=std)
                if any(r is not None for r in rewards)
                else [0.0] * len(rewards)
            )
        for reward, want in zip(rewards, wanted):
            sample = Sample(group_index=g, index=len(samples), reward=reward)
            if reward is None:
                sample.failure = Failure("--custom-rm-path", "my.rm", "none", "None", "rm.py:1")
            samples.append(sample)
            expected.append(want)
    order = list(range(len(samples)))
    shuffle.shuffle(order)
    _, got = default_rewards(
        [samples[i] for i in order],
        reward_key=None,
        estimator=estimator,
        normalization=True,
        std_normalization=std,
        n_samples_per_prompt=3,
    )
    # Rewards that are all but equal are divided by the epsilon: compare relative to what a rounding makes of that.
    assert got.tolist() == pytest.approx([expected[i] for i in order], abs=1e-5, rel=1e-5)


# ---- the scan ------------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.lists(number, max_size=20), max_size=5), decay=st.floats(0, 1), chunk=st.integers(1, 9))
def test_discounted_sums_in_chunks(rows: list[list[float]], decay: float, chunk: int) -> None:
    values = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    expected: list[float] = []
    for row in rows:
        expected += [sum(decay ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
    got = discounted_sums(values, [len(row) for row in rows], decay, chunk=chunk)
    assert got.tolist() == pytest.approx(expected, abs=1e-10)
    shifted = [x for row in rows for x in [*row[1:], 0.0][: len(row)]]
    assert following(values, [len(row) for row in rows]).tolist() == shifted


def test_long_responses() -> None:
    """Many chunks, at the recursion's own precision."""
    values = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = [3000, 0, 1999, 1]
    expected, carry, ends = [0.0] * 5000, 0.0, set(np.cumsum(lengths).tolist())
    for t in reversed(range(5000)):
        carry = float(values[t]) + (0.0 if t + 1 in ends else 0.999 * carry)
        expected[t] = carry
    assert discounted_sums(values, lengths, 0.999).tolist() == pytest.approx(expected, abs=1e-10)


# ---- whitening -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(number, st.integers(0, 1)), min_size=1, max_size=12).filter(lambda xs: any(m for _, m in xs)))
def test_whitening(entries: list[tuple[float, int]]) -> None:
    values, mask = [x for x, _ in entries], [m for _, m in entries]
    got = whiten(torch.tensor(values, dtype=torch.float64), torch.tensor(mask), lambda x: x)
    assert got.tolist() == pytest.approx(advantage_reference.whitened(values, mask), abs=1e-7, rel=1e-7)


def test_whitening_over_ranks_is_whitening_of_everything() -> None:
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(50) % 3 != 0).int()
    whole = whiten(values, mask, lambda x: x)
    parts = [slice(0, 7), slice(7, 50)]
    # Each "rank" sees the sums of all: first pass (count, sum), second pass the squares.
    first = sum(torch.stack([mask[p].sum().double(), values[p][mask[p] != 0].sum()]) for p in parts)
    center = first[1] / first[0]
    squares = sum((values[p][mask[p] != 0] - center).square().sum()[None] for p in parts)
    for part in parts:
        totals = iter([first, squares])
        got = whiten(values[part], mask[part], lambda x, totals=totals: next(totals))
        assert got.tolist() == pytest.approx(whole[part].tolist(), abs=1e-12)


def test_nothing_to_whiten() -> None:
    with pytest.raises(UsageError, match="--normalize-advantages: no response token of this step is trained"):
        whiten(torch.ones(2), torch.zeros(2), lambda x: x)
    assert math.isfinite(float(whiten(torch.ones(1), torch.ones(1), lambda x: x)))
