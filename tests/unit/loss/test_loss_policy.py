"""The policy loss as a whole against the loop reference: values, metrics, gradients, plug-ins, samples left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import loss_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import Row
from torch import Tensor

from miles.errors import UsageError
from miles.loss import (
    LossInputs,
    LossPlugins,
    LossSettings,
    compute_loss,
    icepop_function,
    loss_scale,
    policy_loss,
    step_count,
    trained_tokens,
    zero_gradient_rows,
)
from miles.loss.reduce import ids_of

number = st.floats(-2, 2).map(lambda x: round(x, 3))


@st.composite
def rows_of(draw: Any) -> list[Row]:
    rows = []
    for length in draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)):
        column = st.lists(number, min_size=length, max_size=length)
        constant = draw(st.sampled_from([0.0, 1.0, -0.7]))
        rows.append(
            Row(
                current=draw(column),
                mask=draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)),
                old=draw(column),
                rollout=draw(column),
                ref=draw(column),
                entropy=draw(column),
                advantage=[constant] * length,
            )
        )
    return rows


def flat(rows: list[Row], name: str) -> Tensor:
    return torch.tensor([x for row in rows for x in getattr(row, name)], dtype=torch.float64)


def inputs_of(rows: list[Row]) -> LossInputs:
    lengths = [len(row.mask) for row in rows]
    return LossInputs(
        log_probs=flat(rows, "current").requires_grad_(),
        entropy=flat(rows, "entropy").requires_grad_(),
        loss_mask=flat(rows, "mask").to(torch.int32),
        sample_ids=ids_of(lengths, torch.device("cpu")),
        response_lengths=lengths,
        total_lengths=[n + 2 for n in lengths],
        old_log_probs=flat(rows, "old"),
        rollout_log_probs=flat(rows, "rollout"),
        ref_log_probs=flat(rows, "ref"),
        advantages=flat(rows, "advantage"),
    )


estimators = st.sampled_from(["grpo", "gspo", "cispo"])
some_settings = st.builds(
    LossSettings,
    advantage_estimator=estimators,
    calculate_per_token_loss=st.booleans(),
    eps_clip_high=st.sampled_from([None, 0.28]),
    eps_clip_c=st.sampled_from([None, 1.5]),
    entropy_coef=st.sampled_from([0.0, 0.3]),
    use_kl_loss=st.booleans(),
    kl_loss_coef=st.sampled_from([0.0, 0.5]),
    kl_loss_type=st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
    use_unbiased_kl=st.booleans(),
    use_opsm=st.booleans(),
    use_tis=st.booleans(),
    get_mismatch_metrics=st.booleans(),
) | st.one_of(
    st.builds(LossSettings, use_rollout_logprobs=st.just(True), advantage_estimator=estimators),
    st.builds(
        LossSettings,
        advantage_estimator=st.just("dr_grpo"),
        rollout_max_response_len=st.just(7),
        use_tis=st.booleans(),
        entropy_coef=st.sampled_from([0.0, 0.3]),
    ),
)


@settings(max_examples=300)
@given(rows_of(), some_settings)
def test_values_against_the_loop(rows: list[Row], flags: LossSettings) -> None:
    output = policy_loss(inputs_of(rows), flags, LossPlugins())
    expected = loss_reference.policy(rows, flags)
    assert {k: float(v) for k, v in output.metrics.items()} == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert float(output.loss.detach()) == pytest.approx(expected["loss"], abs=1e-9, rel=1e-9)
    assert not any(value.requires_grad for value in output.metrics.values())


def smooth(rows: list[Row], flags: LossSettings) -> bool:
    """No token stands at a kink, where the loss has no derivative to compare with."""

    def near(x: float, kinks: list[float]) -> bool:
        return any(abs(x - kink) < 1e-3 for kink in kinks)

    for row in rows:
        count = max(sum(row.mask), 1)
        drift = sum(o - c for o, c, m in zip(row.old, row.current, row.mask) if m) / count
        for c, o, r in zip(row.current, row.old, row.ref):
            log_ratio = drift if flags.advantage_estimator == "gspo" else o - c
            ratio = 2.718281828459045**-log_ratio
            k = loss_reference.kl("k3", c - r, 2.718281828459045 ** (c - o) if flags.use_unbiased_kl else 1.0)
            if near(ratio, [0.8, 1.2, 1.28, 1.5]) or near(drift, [flags.opsm_delta]) or near(k, [10.0]):
                return False
    return True


@given(rows_of(), some_settings)
def test_gradients_against_differences(rows: list[Row], flags: LossSettings) -> None:
    flags = replace(flags, use_rollout_logprobs=False)
    if not smooth(rows, flags) or flags.advantage_estimator == "cispo":  # whose weight is a constant: see below
        return
    inputs = inputs_of(rows)
    policy_loss(inputs, flags, LossPlugins()).loss.backward()
    got = inputs.log_probs.grad
    assert got is not None
    expected = []
    for row in rows:
        for t, value in enumerate(row.current):

            def loss_at(x: float, row: Row = row, t: int = t) -> float:
                before, row.current[t] = row.current[t], x
                result = loss_reference.policy(rows, flags)["loss"]
                row.current[t] = before
                return result

            expected.append(loss_reference.slope(loss_at, value))
    assert got.tolist() == pytest.approx(expected, abs=1e-6, rel=1e-5)


def test_rows_in_any_micro_batches_give_the_same_sum() -> None:
    rows = [Row([-0.1, -0.4], [1, 1], [-0.2, -0.1], [-0.2, -0.1], [0, 0], [1, 2], [1, 1]) for _ in range(3)]
    rows += [Row([-0.3], [0], [-0.2], [-0.2], [0], [1], [1]), Row([], [])]
    flags = LossSettings(entropy_coef=0.1)
    whole = policy_loss(inputs_of(rows), flags, LossPlugins()).loss
    parts = [policy_loss(inputs_of([row]), flags, LossPlugins()).loss for row in rows]
    assert float(whole.detach()) == pytest.approx(float(sum(parts).detach()), abs=1e-12)


# ---- scale -------------------------------------------------------------------------------------------------------


def test_per_token_loss_is_the_mean_over_all_tokens() -> None:
    rows = [
        Row([-0.1, -0.4, -1.0], [1, 0, 1], [-0.2] * 3, [], [], [], [1.0] * 3),
        Row([-0.3], [1], [-0.2], [], [], [], [-1.0]),
    ]
    inputs = replace(inputs_of(rows), entropy=None, rollout_log_probs=None, ref_log_probs=None)
    flags = LossSettings(calculate_per_token_loss=True, eps_clip=100.0)
    tokens = trained_tokens(inputs.loss_mask)
    got = compute_loss(inputs, flags, LossPlugins(), loss_scale(flags, num_samples=2, num_tokens=tokens))
    losses = [-torch.exp(torch.tensor(c - o)) * a for c, o, a in [(-0.1, -0.2, 1), (-1.0, -0.2, 1), (-0.3, -0.2, -1)]]
    assert tokens == 3 and float(got.loss.detach()) == pytest.approx(float(sum(losses)) / 3)


@pytest.mark.parametrize(
    ("per_token", "dp_size", "expected"), [(False, 1, 1 / 8), (False, 2, 2 / 8), (True, 1, 1 / 50), (True, 2, 2 / 50)]
)
def test_scale(per_token: bool, dp_size: int, expected: float) -> None:
    flags = LossSettings(calculate_per_token_loss=per_token)
    assert loss_scale(flags, 8, 50, dp_size=dp_size) == expected


def test_a_step_without_trained_tokens_has_a_finite_scale() -> None:
    assert step_count(LossSettings(calculate_per_token_loss=True), 8, 0) == 1


def test_sft_loss() -> None:
    rows = [Row([-0.5, -2.0, -0.25], [1, 0, 1]), Row([-3.0], [0]), Row([], [])]
    inputs = replace(
        inputs_of(rows), entropy=None, old_log_probs=None, rollout_log_probs=None, ref_log_probs=None, advantages=None
    )
    for per_token, expected in ((False, 0.375), (True, 0.75)):
        flags = LossSettings(loss_type="sft_loss", calculate_per_token_loss=per_token)
        output = compute_loss(inputs, flags, LossPlugins(), 0.5)
        assert float(output.loss.detach()) == expected / 2 and float(output.metrics["loss"]) == expected


def test_unknown_loss() -> None:
    with pytest.raises(UsageError, match="expected one of policy_loss, value_loss, sft_loss, got 'custom_loss'"):
        compute_loss(inputs_of([Row([], [])]), LossSettings(loss_type="custom_loss"), LossPlugins(), 1.0)


@given(rows_of(), st.booleans())
def test_cispo_has_the_gradient_of_reinforce_with_a_constant_weight(rows: list[Row], per_token: bool) -> None:
    flags = LossSettings(
        advantage_estimator="cispo", eps_clip=0.3, eps_clip_high=0.4, calculate_per_token_loss=per_token
    )
    inputs = inputs_of(rows)
    policy_loss(inputs, flags, LossPlugins()).loss.backward()
    assert inputs.log_probs.grad is not None
    expected = []
    for row in rows:
        count = 1 if per_token else max(sum(row.mask), 1)
        for c, o, a, m in zip(row.current, row.old, row.advantage, row.mask):
            expected.append(-m / count * a * min(max(math.exp(c - o), 0.7), 1.4))
    assert inputs.log_probs.grad.tolist() == pytest.approx(expected, abs=1e-12)


@given(rows_of(), st.booleans())
def test_value_loss_against_the_loop(rows: list[Row], per_token: bool) -> None:
    flags = LossSettings(loss_type="value_loss", value_clip=0.5, calculate_per_token_loss=per_token)
    for row in rows:  # any three columns of numbers
        row.value, row.old_value, row.target = row.current, row.old, row.ref
    micro = inputs_of(rows)
    now, before = flat(rows, "value").requires_grad_(), flat(rows, "old_value")
    inputs = replace(micro, values=now, old_values=before, returns=flat(rows, "target"))
    output = compute_loss(inputs, flags, LossPlugins(), 1.0)
    expected = loss_reference.value(rows, flags)
    assert {k: float(v) for k, v in output.metrics.items()} == pytest.approx(expected, abs=1e-12)
    assert float(output.loss.detach()) == pytest.approx(expected["value_loss"], abs=1e-12)
    output.loss.backward()
    assert inputs.values is not None and inputs.values.grad is not None
    slopes = []
    for row in rows:
        count = 1 if per_token else max(sum(row.mask), 1)
        for v, old, target, m in zip(row.value, row.old_value, row.target, row.mask):
            near = min(max(v, old - 0.5), old + 0.5)
            active = (v - target) ** 2 >= (near - target) ** 2
            tie = (v - target) ** 2 == (near - target) ** 2 and v != near
            slopes.append(None if tie or abs(abs(v - old) - 0.5) < 1e-9 else m / count * 2 * (v - target) * active)
    got = inputs.values.grad.tolist()
    assert [g for g, s in zip(got, slopes) if s is not None] == pytest.approx([s for s in slopes if s is not None])


every_loss = some_settings | st.builds(
    LossSettings, loss_type=st.sampled_from(["sft_loss", "value_loss"]), calculate_per_token_loss=st.booleans()
)


@given(rows_of(), every_loss, st.data())
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(
    rows: list[Row], flags: LossSettings, data: Any
) -> None:
    """Sums over samples: 1e-10 in double precision."""
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    order = sorted(range(len(rows)), key=lambda i: parts[i])
    micros = [[rows[i] for i in order if parts[i] == part] for part in sorted(set(parts))]

    def run(some: list[Row]) -> tuple[float, list[float], dict[str, float]]:
        inputs = inputs_of(some)
        values = flat(some, "current").requires_grad_()
        inputs = replace(inputs, values=values, old_values=flat(some, "old"), returns=flat(some, "ref"))
        output = compute_loss(inputs, flags, LossPlugins(), 0.25)
        output.loss.backward()
        grad = values.grad if flags.loss_type == "value_loss" else inputs.log_probs.grad
        assert grad is not None
        return float(output.loss.detach()), grad.tolist(), {k: float(v) for k, v in output.metrics.items()}

    loss, grad, metrics = run([rows[i] for i in order])
    split = [run(micro) for micro in micros]
    assert sum(s[0] for s in split) == pytest.approx(loss, abs=1e-10)
    assert [g for s in split for g in s[1]] == pytest.approx(grad, abs=1e-10)
    assert {name: sum(s[2][name] for s in split) for name in metrics} == pytest.approx(metrics, abs=1e-10)


# ---- missing columns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("advantages", {}, "--disable-compute-advantages-and-returns"),
        ("old_log_probs", {}, "--disable-compute-advantages-and-returns"),
        ("rollout_log_probs", {"use_tis": True}, "--use-tis"),
        ("rollout_log_probs", {"use_rollout_logprobs": True}, "sample.rollout_log_probs"),
        ("ref_log_probs", {"use_kl_loss": True}, "--ref-load"),
        ("entropy", {"entropy_coef": 0.1}, "--entropy-coef"),
    ],
)
def test_missing_columns_name_the_flag(missing: str, flags: dict[str, Any], message: str) -> None:
    inputs = replace(inputs_of([Row([-1.0], [1], [-1.0], [-1.0], [-1.0], [1.0], [1.0])]), **{missing: None})
    with pytest.raises(UsageError, match=message):
        policy_loss(inputs, LossSettings(**flags), LossPlugins())


def test_metrics_appear_only_with_their_columns() -> None:
    rows = [Row([-1.0], [1], [-1.0], [-1.0], [-1.0], [1.0], [1.0])]
    inputs = replace(inputs_of(rows), entropy=None, rollout_log_probs=None, ref_log_probs=None)
    assert list(policy_loss(inputs, LossSettings(), LossPlugins()).metrics) == [
        "loss",
        "pg_loss",
        "pg_clipfrac",
        "ppo_kl",
    ]


# ---- plug-ins ----------------------------------------------------------------------------------------------------

PLUGIN_ROWS = [
    Row([-0.5, -0.6], [1, 1], [-0.4, -0.7], [-1.9, -0.7], [-0.5, -0.5], [1.0, 1.0], [1.0, 1.0]),
    Row([-0.1, -0.2, -0.3], [1, 0, 1], [-0.1, -0.2, -0.3], [-0.1, -0.2, -0.4], [0.0] * 3, [1.0] * 3, [-1.0] * 3),
]


def test_custom_importance_function_is_called_as_published() -> None:
    seen: dict[str, Any] = {}
    args = object()

    def tis(**kwargs: Any) -> Any:
        seen.update(kwargs)
        masks = [m.clone() for m in kwargs["loss_masks"]]
        masks[0][0] = 0
        return kwargs["pg_loss"] * 2, masks, {"seen": torch.ones_like(kwargs["pg_loss"])}

    inputs = inputs_of(PLUGIN_ROWS)
    output = policy_loss(inputs, LossSettings(use_tis=True), LossPlugins(tis=tis, args=args))
    assert set(seen) == {
        "args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks",
        "total_lengths", "response_lengths", "parallel_state",
    }  # fmt: skip
    assert seen["args"] is args and seen["response_lengths"] == [2, 3] and seen["total_lengths"] == [4, 5]
    assert [x.tolist() for x in seen["train_log_probs"]] == [row.old for row in PLUGIN_ROWS]
    assert [x.tolist() for x in seen["rollout_log_probs"]] == [row.rollout for row in PLUGIN_ROWS]
    # The loss and its clip fraction use the returned masks, the function's own metrics the original ones.
    changed = [replace(PLUGIN_ROWS[0], mask=[0, 1]), PLUGIN_ROWS[1]]
    expected = loss_reference.policy(changed, LossSettings())
    assert float(output.metrics["pg_loss"]) == pytest.approx(2 * expected["pg_loss"])
    assert float(output.metrics["ppo_kl"]) == pytest.approx(expected["ppo_kl"])
    assert float(output.metrics["entropy_loss"]) == pytest.approx(expected["entropy_loss"])
    assert float(output.metrics["seen"]) == 2.0


def test_masks_changed_in_place_leave_the_batch_alone() -> None:
    def tis(**kwargs: Any) -> Any:
        for mask in kwargs["loss_masks"]:
            mask.zero_()
        return kwargs["pg_loss"], kwargs["loss_masks"], {}

    inputs = inputs_of(PLUGIN_ROWS)
    output = policy_loss(inputs, LossSettings(use_tis=True), LossPlugins(tis=tis))
    assert float(output.loss.detach()) == 0.0 and inputs.loss_mask.tolist() == [1, 1, 1, 0, 1]


def test_mismatch_metrics_only_measure() -> None:
    """Whatever the function returns as loss and masks: only --use-tis applies it."""
    flags = LossSettings(get_mismatch_metrics=True, tis_clip=2.0, tis_clip_low=0.5)

    def wild(**kwargs: Any) -> Any:
        return kwargs["pg_loss"] * 100, [mask * 0 for mask in kwargs["loss_masks"]], {"seen": kwargs["pg_loss"] * 0 + 1}

    plain = policy_loss(inputs_of(PLUGIN_ROWS), LossSettings(), LossPlugins())
    measured = policy_loss(inputs_of(PLUGIN_ROWS), flags, LossPlugins(tis=wild, args=flags))
    applied = policy_loss(inputs_of(PLUGIN_ROWS), replace(flags, use_tis=True), LossPlugins(tis=wild, args=flags))
    assert float(measured.loss.detach()) == float(plain.loss.detach()) != float(applied.loss.detach())
    assert {name: measured.metrics[name] for name in plain.metrics} == plain.metrics
    assert float(measured.metrics["seen"]) == 2.0


def test_mismatch_metrics_with_icepop() -> None:
    flags = LossSettings(get_mismatch_metrics=True, tis_clip=2.0, tis_clip_low=0.5)
    output = policy_loss(inputs_of(PLUGIN_ROWS), flags, LossPlugins(tis=icepop_function, args=flags))
    # Only the first token's ratio, exp(1.5), leaves the interval; its sample has two trained tokens.
    assert float(output.metrics["tis_clipfrac"]) == pytest.approx(0.5)
    assert {"ois", "tis", "tis_abs"} <= set(output.metrics)


def test_the_importance_function_compares_trainer_and_engine_even_with_rollout_logprobs() -> None:
    """`train_log_probs` are the recomputed ones, not whatever stands for the old policy."""
    flags = LossSettings(use_rollout_logprobs=True, get_mismatch_metrics=True)
    seen: dict[str, Any] = {}

    def measure(**kwargs: Any) -> Any:
        seen.update(kwargs)
        return kwargs["pg_loss"], kwargs["loss_masks"], {}

    policy_loss(inputs_of(PLUGIN_ROWS), flags, LossPlugins(tis=measure))
    assert [x.tolist() for x in seen["train_log_probs"]] == [row.old for row in PLUGIN_ROWS]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda k: k["pg_loss"], r"expected a tuple \(pg_loss, loss_masks, metrics\), got Tensor"),
        (lambda k: (k["pg_loss"][:1], k["loss_masks"], {}), r"pg_loss has shape \(1,\), expected \(5,\)"),
        (lambda k: (k["pg_loss"], k["loss_masks"], {"m": torch.zeros(2)}), r"m has shape \(2,\)"),
        (lambda k: (k["pg_loss"], k["loss_masks"][:1], {}), "masks have lengths"),
    ],
)
def test_bad_results_of_the_importance_function(result: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy_loss(inputs_of(PLUGIN_ROWS), LossSettings(use_tis=True), LossPlugins(tis=lambda **k: result(k)))


def test_custom_reducer_reduces_the_policy_gradient_alone() -> None:
    seen: list[Any] = []

    def dr_grpo(total_lengths: Any, response_lengths: Any, masks: Any, per_token: Any) -> Any:
        seen.extend([total_lengths, response_lengths, [m.tolist() for m in masks], per_token])
        return lambda x: sum((piece * mask).sum() / 10 for piece, mask in zip(torch.split(x, response_lengths), masks))

    inputs = inputs_of(PLUGIN_ROWS)
    output = policy_loss(inputs, LossSettings(), LossPlugins(pg_reducer=dr_grpo))
    assert seen == [[4, 5], [2, 3], [[1, 1], [1, 0, 1]], False]
    token_sum = loss_reference.policy(PLUGIN_ROWS, LossSettings(calculate_per_token_loss=True))["pg_loss"]
    assert float(output.metrics["pg_loss"]) == pytest.approx(token_sum / 10)
    assert float(output.metrics["ppo_kl"]) == pytest.approx(
        loss_reference.policy(PLUGIN_ROWS, LossSettings())["ppo_kl"]
    )


def test_a_reducer_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"--custom-pg-loss-reducer-function-path: expected a callable .* NoneType"):
        policy_loss(inputs_of(PLUGIN_ROWS), LossSettings(), LossPlugins(pg_reducer=lambda *a: None))  # type: ignore[arg-type,return-value]


# ---- garbage at masked tokens ------------------------------------------------------------------------------------


def test_garbage_at_masked_tokens_reaches_no_gradient() -> None:
    """Tool output has no meaningful old log-probs; a ratio of infinity there must not turn the gradient into NaN."""
    rows = [replace(PLUGIN_ROWS[1], old=[-0.1, -1e6, -0.3], rollout=[-0.1, -1e6, -0.3], ref=[0.0, -1e6, 0.0])]
    inputs = inputs_of(rows)
    flags = LossSettings(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type="k3", use_unbiased_kl=True, use_opsm=True)
    policy_loss(inputs, flags, LossPlugins()).loss.backward()
    assert inputs.log_probs.grad is not None
    assert torch.isfinite(inputs.log_probs.grad).all() and inputs.log_probs.grad[1] == 0


# ---- samples that are left out -----------------------------------------------------------------------------------


def zero_rows(rows: list[Row], flags: LossSettings, plugins: LossPlugins) -> list[bool]:
    inputs = inputs_of(rows)
    result = zero_gradient_rows(inputs.advantages, inputs.loss_mask, inputs.sample_ids, len(rows), flags, plugins)
    assert result.dtype == torch.bool
    return result.tolist()


@settings(max_examples=200)
@given(rows_of(), some_settings)
def test_leaving_zero_rows_out_changes_no_gradient(rows: list[Row], flags: LossSettings) -> None:
    """Bitwise: the rows that stay have the same gradient with and without the others, which have none."""
    zero = zero_rows(rows, flags, LossPlugins())
    inputs = inputs_of(rows)
    policy_loss(inputs, flags, LossPlugins()).loss.backward()
    kept_rows = [row for row, out in zip(rows, zero) if not out]
    grads = torch.split(inputs.log_probs.grad, inputs.response_lengths)  # type: ignore[arg-type]
    assert not any(grad.any() for grad, out in zip(grads, zero) if out)
    if inputs.entropy is not None and inputs.entropy.grad is not None:
        entropy_grads = torch.split(inputs.entropy.grad, inputs.response_lengths)
        assert not any(grad.any() for grad, out in zip(entropy_grads, zero) if out)
    if kept_rows:
        kept = inputs_of(kept_rows)
        policy_loss(kept, flags, LossPlugins()).loss.backward()
        assert kept.log_probs.grad is not None
        assert torch.equal(kept.log_probs.grad, torch.cat([g for g, out in zip(grads, zero) if not out]))


FLAT = [Row([-0.5], [1], [-0.5], [-0.5], [-0.5], [1.0], [advantage]) for advantage in (0.0, 1.0)]
MASKED = [Row([-0.5], [0], [-0.5], [-0.5], [-0.5], [1.0], [1.0])]


@pytest.mark.parametrize(
    ("flags", "plugins", "expected"),
    [
        ({}, {}, [True, False, True]),
        ({"use_tis": True}, {}, [True, False, True]),
        ({"use_kl_loss": True, "kl_loss_coef": 0.0}, {}, [False, False, True]),  # measured
        ({"advantage_estimator": "cispo"}, {}, [True, False, True]),
        ({"loss_type": "value_loss"}, {}, [False, False, True]),
        ({"entropy_coef": 0.1}, {}, [False, False, True]),
        ({"use_kl_loss": True, "kl_loss_coef": 0.1}, {}, [False, False, True]),
        ({"loss_type": "sft_loss"}, {}, [False, False, True]),
        ({"loss_type": "custom_loss"}, {}, [False, False, False]),
        ({"use_tis": True}, {"tis": icepop_function}, [False, False, False]),
        ({}, {"tis": icepop_function}, [True, False, True]),
        ({}, {"pg_reducer": lambda *a: None}, [False, False, False]),
    ],
)
def test_which_rows_are_zero(flags: dict[str, Any], plugins: dict[str, Any], expected: list[bool]) -> None:
    assert zero_rows(FLAT + MASKED, LossSettings(**flags), LossPlugins(**plugins)) == expected
