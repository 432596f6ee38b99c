"""Reduction, KL estimators, importance functions, advantages: each against a loop."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import loss_reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import UsageError
from miles.loss import (
    AdvantageInputs,
    LossSettings,
    ParallelState,
    SumOfSampleMean,
    compute_advantages,
    compute_approx_kl,
    compute_policy_loss,
    get_sum_of_sample_mean,
    icepop_function,
    vanilla_tis_function,
)
from miles.loss.reduce import ids_of, segment_sum

ONE = ParallelState.single_process()
number = st.floats(-3, 3)
ragged = st.lists(st.lists(st.tuples(number, st.integers(0, 1)), max_size=6), min_size=1, max_size=6)


# ---- reduction ---------------------------------------------------------------------------------------------------


@given(ragged, st.booleans())
def test_sum_of_sample_mean(rows: list[list[tuple[float, int]]], per_token: bool) -> None:
    values = [[x for x, _ in row] for row in rows]
    masks = [[m for _, m in row] for row in rows]
    lengths = [len(row) for row in rows]
    reduce = get_sum_of_sample_mean(
        [n + 3 for n in lengths], lengths, [torch.tensor(m, dtype=torch.int32) for m in masks], ONE, per_token
    )
    flat = torch.tensor([x for row in values for x in row], dtype=torch.float64)
    expected = loss_reference.sum_of_means(
        [loss_reference.Row(current=[], mask=mask) for mask in masks], values, per_token
    )
    assert float(reduce(flat)) == pytest.approx(expected, abs=1e-12)


@given(ragged)
def test_segment_sum(rows: list[list[tuple[float, int]]]) -> None:
    flat = torch.tensor([x for row in rows for x, _ in row], dtype=torch.float64)
    ids = ids_of([len(row) for row in rows], torch.device("cpu"))
    assert segment_sum(flat, ids, len(rows)).tolist() == pytest.approx(
        [sum(x for x, _ in row) for row in rows], abs=1e-12
    )


def test_masked_tokens_take_no_part_whatever_they_are() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), 3.0], requires_grad=True)
    reduce = SumOfSampleMean(torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), 2)
    reduce(values).backward()
    assert float(reduce(values.detach())) == 4.0
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_reducer_of_an_empty_micro_batch() -> None:
    assert float(get_sum_of_sample_mean([], [], [], ONE)(torch.empty(0))) == 0.0


def test_reducer_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"lengths \[2\] do not fit responses of lengths \[3\]"):
        get_sum_of_sample_mean([5], [3], [torch.ones(2)], ONE)


# ---- KL ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["k1", "k2", "k3", "low_var_kl"]), st.lists(st.tuples(number, number, number)), st.booleans())
def test_kl(kind: str, entries: list[tuple[float, float, float]], weighted: bool) -> None:
    current, base, old = (torch.tensor([e[i] for e in entries], dtype=torch.float64) for i in range(3))
    got = compute_approx_kl(current, base, kind, torch.exp(current - old) if weighted else None)
    expected = [loss_reference.kl(kind, c - b, math.exp(c - o) if weighted else 1.0) for c, b, o in entries]
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


def test_kl_estimates_agree_with_the_divergence_in_expectation() -> None:
    """k1, k3 and k2's gradient, averaged over the current distribution, are KL(current || base) and its gradient."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    base = torch.log_softmax(torch.tensor([0.0, 0.4, 0.2], dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    fixed = log_p.detach()
    exact = (log_p.exp() * (log_p - base)).sum()
    for kind in ("k1", "k3", "low_var_kl"):
        assert float((fixed.exp() * compute_approx_kl(fixed, base, kind)).sum()) == pytest.approx(
            float(exact.detach()), abs=1e-12
        )
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (k2_gradient,) = torch.autograd.grad((log_p.exp().detach() * compute_approx_kl(log_p, base, "k2")).sum(), logits)
    torch.testing.assert_close(k2_gradient, gradient)


def test_unknown_kl_estimator() -> None:
    with pytest.raises(UsageError, match="--kl-loss-type: expected one of k1, k2, k3, low_var_kl, got 'k4'"):
        compute_approx_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_low_var_kl_is_clamped() -> None:
    assert compute_approx_kl(torch.tensor([-9.0]), torch.tensor([0.0]), "low_var_kl").tolist() == [10.0]


# ---- importance --------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(number, number, number), max_size=4), min_size=1, max_size=4), st.booleans())
def test_importance_functions(rows: list[list[tuple[float, float, float]]], icepop: bool) -> None:
    args = Namespace(tis_clip=1.5, tis_clip_low=0.5)
    train, rollout, pg = ([torch.tensor([e[i] for e in row], dtype=torch.float64) for row in rows] for i in range(3))
    masks = [torch.ones(len(row), dtype=torch.int32) for row in rows]
    loss, out_masks, metrics = (icepop_function if icepop else vanilla_tis_function)(
        args,
        pg_loss=torch.cat(pg),
        train_log_probs=train,
        rollout_log_probs=rollout,
        loss_masks=masks,
        total_lengths=[0] * len(rows),
        response_lengths=[len(row) for row in rows],
        parallel_state=ONE,
    )
    expected, clipped = [], []
    for t, r, x in (entry for row in rows for entry in row):
        ratio = math.exp(t - r)
        weight = min(max(ratio, 0.5), 1.5)
        if icepop and weight != ratio:
            weight = 0.0
        expected.append(x * weight)
        clipped.append(float(weight != ratio))
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert out_masks is masks
    assert set(metrics) == {"tis", "tis_clipfrac", "tis_abs"} and metrics["tis_clipfrac"].tolist() == clipped


# ---- the surrogate -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(number, number), min_size=1, max_size=10), st.sampled_from([None, 1.5, 3.0]))
def test_clipped_surrogate(entries: list[tuple[float, float]], c: float | None) -> None:
    kl, advantages = (torch.tensor([e[i] for e in entries], dtype=torch.float64) for i in range(2))
    loss, clipfrac = compute_policy_loss(kl, advantages, 0.2, 0.28, c)
    expected = [loss_reference.token_loss(k, a, 0.2, 0.28, c) for k, a in entries]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], abs=1e-12)
    assert clipfrac.tolist() == [e[1] for e in expected]


def test_dual_clip_bounds_the_loss_of_a_huge_ratio() -> None:
    kl, advantage = torch.tensor([-5.0]), torch.tensor([-1.0])
    assert compute_policy_loss(kl, advantage, 0.2, 0.2)[0].item() == pytest.approx(math.exp(5))
    assert compute_policy_loss(kl, advantage, 0.2, 0.2, 3.0)[0].item() == 3.0
    with pytest.raises(ValueError, match="eps_clip_c must be > 1"):
        compute_policy_loss(kl, advantage, 0.2, 0.2, 1.0)


# ---- advantages and settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "rloo", "dr_grpo", "cispo"])
def test_every_token_gets_the_reward_of_its_sample(estimator: str) -> None:
    got = compute_advantages(estimator, AdvantageInputs(torch.tensor([0.5, 9.0, -2.0]), [2, 0, 1]))
    assert got.advantages.tolist() == got.returns.tolist() == [0.5, 0.5, -2.0]


def test_unknown_estimator() -> None:
    with pytest.raises(UsageError, match=r"--advantage-estimator: expected one of grpo, gspo, .*, got 'nope'"):
        compute_advantages("nope", AdvantageInputs(torch.zeros(1), [1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps_clip_c": 1.0}, "--eps-clip-c: expected a number > 1"),
        ({"use_tis": True, "use_rollout_logprobs": True}, "--use-tis: .*--use-rollout-logprobs"),
        ({"advantage_estimator": "dr_grpo"}, "--advantage-estimator dr_grpo: needs --rollout-max-response-len"),
        (
            {"advantage_estimator": "dr_grpo", "rollout_max_response_len": 9, "calculate_per_token_loss": True},
            "--advantage-estimator dr_grpo: excludes --calculate-per-token-loss",
        ),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LossSettings(**changes)


def test_settings_come_from_anything_with_the_flags() -> None:
    args = Namespace(**vars(LossSettings(eps_clip=0.1, use_tis=True)), lr=1.0)
    assert LossSettings.of(args) == LossSettings(eps_clip=0.1, use_tis=True)
    first = Namespace(eps_clip=0.3, eps_clip_high=None)
    assert LossSettings.of(first, args) == LossSettings(eps_clip=0.3, use_tis=True)
    with pytest.raises(AttributeError, match="loss_type"):
        LossSettings.of(first)
