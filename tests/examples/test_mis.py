"""mis.py against a slow reference in double precision, at the edges, and in runs."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.train_infer_mismatch_helper.mis import METRICS, MisSettings, compute_mis_weights_with_cp
from miles.loss.parallel_state import ParallelState

CONFIG = "examples/train_infer_mismatch_helper/carry.yaml"
MIS = Path(__file__).resolve().parents[2] / "examples/train_infer_mismatch_helper/mis.yaml"
SMALL = ("--num-rollout", 2, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1)
NO_EVAL = ("--eval-interval", 100, "--skip-eval-before-train")

Row = list[tuple[float, float, int]]  # (trainer's log-prob, engine's log-prob, mask) of each token


def call(rows: list[Row], loss: list[float], **config: Any) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
    def column(i: int) -> list[torch.Tensor]:
        return [torch.tensor([token[i] for token in row], dtype=torch.float64) for row in rows]

    lengths = [len(row) for row in rows]
    return compute_mis_weights_with_cp(
        args=Namespace(**config),
        pg_loss=torch.tensor(loss, dtype=torch.float64),
        train_log_probs=column(0),
        rollout_log_probs=column(1),
        loss_masks=[mask.to(torch.int32) for mask in column(2)],
        total_lengths=[n + 3 for n in lengths],
        response_lengths=lengths,
        parallel_state=ParallelState.single_process(),
    )


# ---- the reference -------------------------------------------------------------------------------------------------


def log_ratio(row: Row, t: int, level: str) -> float:
    trained = [a - b for a, b, mask in row if mask]
    if level == "token":
        return row[t][0] - row[t][1]
    return sum(trained) / (len(trained) if level == "geometric" else 1)


def exp(x: float) -> float:
    return math.exp(min(max(x, -20.0), 20.0))


def weight(x: float, mode: str, lower: float, upper: float) -> float:
    if mode == "truncate":
        return min(exp(x), upper)
    if mode == "clip":
        return min(max(exp(x), lower), upper)
    return exp(x) if lower <= math.exp(x) <= upper else 0.0


def reference(rows: list[Row], loss: list[float], config: dict[str, Any]) -> tuple[list[float], list[list[int]]]:
    """Loss and masks, token by token, with Python's own floats."""
    masks, weights = [], []
    tis = config["tis_lower_bound"], config["tis_upper_bound"]
    for row in rows:
        veto = any(mask and a - b < math.log(config["rs_veto_threshold"]) for a, b, mask in row)
        kept = []
        for t, (_, _, mask) in enumerate(row):
            weights.append(weight(log_ratio(row, t, config["tis_level"]), config["tis_mode"], *tis) if mask else 1.0)
            if mask and config["use_rs"]:
                ratio = math.exp(log_ratio(row, t, config["rs_level"]))
                kept.append(int(not veto and config["rs_lower_bound"] <= ratio <= config["rs_upper_bound"]))
            else:
                kept.append(mask)
        masks.append(kept)
    flat = [m for kept in masks for m in kept]
    if config["tis_batch_normalize"] and sum(flat):
        mean = sum(w for w, m in zip(weights, flat) if m) / sum(flat)
        weights = [w / mean if mean else w for w in weights]
    original = [mask for row in rows for _, _, mask in row]
    weights = [w if m else 1.0 for w, m in zip(weights, original)]
    return [x * w for x, w in zip(loss, weights)], masks


tokens = st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.integers(0, 1))
configs = st.fixed_dictionaries(
    {
        "use_tis": st.just(True),
        "tis_level": st.sampled_from(["token", "sequence", "geometric"]),
        "tis_mode": st.sampled_from(["truncate", "clip", "mask"]),
        "tis_lower_bound": st.floats(0.01, 1),
        "tis_upper_bound": st.floats(1, 50),
        "tis_batch_normalize": st.booleans(),
        "use_rs": st.booleans(),
        "rs_level": st.sampled_from(["token", "sequence", "geometric"]),
        "rs_lower_bound": st.floats(0.01, 1),
        "rs_upper_bound": st.floats(1, 50),
        "rs_veto_threshold": st.floats(1e-4, 1e-2),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(tokens, max_size=6), max_size=5), configs, st.randoms(use_true_random=False))
def test_equals_the_reference(rows: list[Row], config: dict[str, Any], rng: Any) -> None:
    loss = [rng.uniform(-2, 2) for row in rows for _ in row]
    got, masks, metrics = call(rows, loss, **config)
    expected, expected_masks = reference(rows, loss, config)
    if not near_a_bound(rows, config):
        assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert [mask.tolist() for mask in masks] == expected_masks
    assert tuple(metrics) == METRICS
    assert all(values.shape == got.shape and torch.isfinite(values).all() for values in metrics.values())
    assert all(mask.dtype == torch.int32 for mask in masks)


def near_a_bound(rows: list[Row], config: dict[str, Any]) -> bool:
    """Whether rounding decides on which side of a bound a ratio lies."""
    bounds = [value for name, value in config.items() if name.endswith(("bound", "threshold"))]
    for row in rows:
        for t, (_, _, mask) in enumerate(row):
            for level in ("token", "sequence", "geometric") if mask else ():
                x = log_ratio(row, t, level)
                if any(abs(x - math.log(bound)) < 1e-9 for bound in bounds):
                    return True
    return False


# ---- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
@pytest.mark.parametrize("normalize", [False, True])
def test_extreme_ratios_give_finite_numbers(level: str, mode: str, normalize: bool) -> None:
    inf, nan = math.inf, math.nan
    rows: list[Row] = [
        [(-1.0, -500.0, 1), (-1e4, -0.1, 1)],
        [],
        [(nan, -1.0, 0), (-1.0, nan, 0)],  # all masked: whatever stands there does not matter
        [(-inf, -1.0, 1), (-1.0, -inf, 1)],
    ]
    config = {"tis_level": level, "tis_mode": mode, "tis_batch_normalize": normalize, "use_rs": True, "rs_level": level}
    loss, masks, metrics = call(rows, [1.0] * 6, use_tis=True, **config)
    assert torch.isfinite(loss).all()
    assert [len(mask) for mask in masks] == [2, 0, 2, 2]
    assert all(torch.isfinite(values).all() for values in metrics.values())
    assert loss[2:4].tolist() == [1.0, 1.0] and masks[2].tolist() == [0, 0]


def test_an_empty_batch() -> None:
    loss, masks, metrics = call([], [], use_tis=True, use_rs=True)
    assert loss.shape == (0,) and masks == [] and tuple(metrics) == METRICS


def test_equal_policies_change_nothing() -> None:
    rows: list[Row] = [[(-0.5, -0.5, 1), (-2.0, -2.0, 0)], [(-1.0, -1.0, 1)]]
    config = yaml.safe_load(MIS.read_text())
    loss, masks, metrics = call(rows, [0.3, -0.2, 0.7], **config)
    assert loss.tolist() == [0.3, -0.2, 0.7]
    assert [mask.tolist() for mask in masks] == [[1, 0], [1]]
    assert metrics["mis_rejected"].sum() == 0 and metrics["mis_kl"].sum() == 0


def test_a_veto_rejects_the_whole_response() -> None:
    rows: list[Row] = [[(-12.0, -0.5, 1), (-0.5, -0.5, 1), (-0.5, -0.5, 0)], [(-0.5, -0.5, 1)]]
    config = {"use_tis": False, "use_rs": True, "rs_lower_bound": 0.0, "rs_upper_bound": 1e9}
    _, masks, metrics = call(rows, [1.0] * 4, rs_veto_threshold=1e-4, **config)
    assert [mask.tolist() for mask in masks] == [[0, 0, 0], [1]]
    assert metrics["mis_vetoed"].tolist() == [1, 1, 1, 0]
    _, masks, _ = call(rows, [1.0] * 4, **config)
    assert [mask.tolist() for mask in masks] == [[1, 1, 0], [1]]


def test_measuring_changes_nothing() -> None:
    rows: list[Row] = [[(-3.0, -0.5, 1), (-0.5, -3.0, 1)]]
    loss, masks, metrics = call(rows, [1.0, 2.0], use_tis=False)
    assert loss.tolist() == [1.0, 2.0] and masks[0].tolist() == [1, 1]
    assert metrics["mis_ratio"].tolist() == pytest.approx([math.exp(-2.5), math.exp(2.5)])
    assert metrics["mis_above"].tolist() == [0, 1]


def test_weights_carry_no_gradient() -> None:
    train = torch.tensor([-0.5, -1.0], requires_grad=True)
    loss = torch.tensor([1.0, 2.0], requires_grad=True)
    corrected, _, _ = compute_mis_weights_with_cp(
        args=Namespace(use_tis=True), pg_loss=loss, train_log_probs=[train], rollout_log_probs=[torch.zeros(2)],
        loss_masks=[torch.ones(2)], total_lengths=[3], response_lengths=[2],
    )  # fmt: skip
    corrected.sum().backward()
    assert train.grad is None
    assert loss.grad is not None
    assert loss.grad.tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.0)])


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tis_level": "word"}, "tis_level: expected one of token, sequence, geometric, got 'word'."),
        ({"tis_mode": True}, "tis_mode: expected one of truncate, clip, mask, got True."),
        ({"rs_level": None}, "rs_level: expected one of"),
        ({"use_rs": "yes"}, "use_rs: expected true or false, got 'yes'."),
        ({"tis_upper_bound": None}, "tis_upper_bound: expected a number >= 0, got None."),
        ({"rs_veto_threshold": "1e-4"}, "rs_veto_threshold: expected a number >= 0, got '1e-4'."),
        ({"tis_lower_bound": 3.0}, "tis_lower_bound 3.0: expected at most tis_upper_bound, 2.0."),
        ({"rs_lower_bound": 1.2, "rs_upper_bound": 1.1}, "rs_lower_bound 1.2: expected at most rs_upper_bound, 1.1."),
        ({"tis_upper_bound": float("nan")}, "tis_upper_bound: expected a number >= 0, got nan."),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        MisSettings.of(Namespace(**config))
    assert says in str(caught.value)


def test_bounds_that_are_left_out() -> None:
    assert MisSettings(tis_upper_bound=4.0).tis_bounds == (0.25, 4.0)
    assert MisSettings(tis_upper_bound=4.0).rs_bounds == (0.25, 4.0)
    assert MisSettings(rs_upper_bound=10.0).rs_bounds == (0.1, 10.0)
    assert MisSettings(tis_upper_bound=0.0).tis_bounds == (0.0, 0.0)
    known = yaml.safe_load(MIS.read_text())
    assert set(known) == set(MisSettings.__dataclass_fields__), "mis.yaml shows every setting"


# ---- in a run ------------------------------------------------------------------------------------------------------


def test_a_run_corrects_and_reports(train, metrics) -> None:
    run = train(CONFIG, *SMALL, *NO_EVAL, "--num-rollout", 3, "--lr-warmup-iters", 0, "--lr", "1e-3")
    for name in METRICS:
        values = metrics(run, f"train/{name}")
        assert len(values) == 3 and all(math.isfinite(v) for v in values)
    # The first rollout was sampled from the trainer's weights; later ones began under older weights.
    fresh, *stale = metrics(run, "train/mis_log_ratio_abs")
    assert fresh < 1e-3 < max(stale)
    assert max(metrics(run, "train/mis_kl")) > 1e-5


def test_a_run_that_only_measures(train, metrics, tmp_path: Path) -> None:
    off = tmp_path / "off.yaml"
    off.write_text("use_tis: false\nuse_rs: false\ntis_upper_bound: 1.0\n")
    flags = (*SMALL, *NO_EVAL, "--lr", "0", "--custom-config-path", off)
    measured = train(CONFIG, *flags, "--get-mismatch-metrics")
    plain = train(CONFIG, *flags)
    assert len(metrics(measured, "train/mis_kl")) == 2 and metrics(plain, "train/mis_kl") == []
    assert metrics(measured, "train/grad_norm")[0] == pytest.approx(metrics(plain, "train/grad_norm")[0], rel=1e-4)


def test_what_is_rejected_is_not_trained(train, metrics, tmp_path: Path) -> None:
    """With bounds that no ratio can keep, every response is rejected, and no weight moves."""
    strict = tmp_path / "strict.yaml"
    strict.write_text("use_rs: true\nrs_level: token\nrs_lower_bound: 5.0\nrs_upper_bound: 6.0\n")
    run = train(CONFIG, *SMALL, *NO_EVAL, "--custom-config-path", strict)
    assert metrics(run, "train/mis_rejected") == pytest.approx([1.0, 1.0])
    assert metrics(run, "train/grad_norm") == [0.0, 0.0]
    assert metrics(run, "train/pg_loss") == [0.0, 0.0]
