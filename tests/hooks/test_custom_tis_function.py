"""--custom-tis-function-path: once per micro-batch, by keyword; its loss, its masks and its metrics are used."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooks_helpers import bound
from hooks_stage import SAMPLES, Stage

from miles.backends.training_utils.parallel import ParallelState
from miles.errors import HookError, UsageError

MakeStage = Callable[..., Stage]
TIS = ("--use-tis",)
KEYWORDS = {
    "args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths", "response_lengths",
    "parallel_state",
}  # fmt: skip


def test_the_published_call(stage: MakeStage) -> None:
    seen: list[dict[str, Any]] = []

    def tis(**given: Any) -> Any:
        seen.append(given)
        return given["pg_loss"], given["loss_masks"], {"mine": torch.full_like(given["pg_loss"], 3.0)}

    s = stage(*TIS, "--micro-batch-size", 2, custom_tis_function=tis)
    batch = s.rollout()
    report = s.train(batch)
    assert len(seen) == SAMPLES // 2 and s.hooks.custom_tis_function.form == "parallel-state"
    for given in seen:
        assert set(given) == KEYWORDS and given["args"] is s.args and isinstance(given["parallel_state"], ParallelState)
        lengths = given["response_lengths"]
        assert given["pg_loss"].shape == (sum(lengths),) and given["pg_loss"].requires_grad
        for column in ("train_log_probs", "rollout_log_probs", "loss_masks"):
            assert [len(row) for row in given[column]] == lengths
        assert torch.cat(given["rollout_log_probs"]).tolist() == [-0.5] * sum(lengths), "the engine's"
        assert all(t > r for t, r in zip(given["total_lengths"], lengths))
    assert report.metrics["train/mine"] == pytest.approx(3.0)


def test_slimes_call_has_no_parallel_state(stage: MakeStage) -> None:
    seen: list[Any] = []

    def tis(
        args: Any, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, total_lengths: Any,
        response_lengths: Any,
    ) -> Any:  # fmt: skip
        seen.append(args)
        return pg_loss, loss_masks, {}

    s = stage(*TIS, custom_tis_function=tis)
    s.train(s.rollout())
    assert s.hooks.custom_tis_function.form == "no-parallel-state" and all(args is s.args for args in seen)


def gradient(stage: MakeStage, tis: Any, *flags: object) -> float:
    s = stage(*flags, custom_tis_function=tis)
    return s.train(s.rollout()).metrics["train/grad_norm"]


def test_its_loss_and_masks_are_what_is_trained(stage: MakeStage) -> None:
    def unchanged(**given: Any) -> Any:
        return given["pg_loss"], given["loss_masks"], {}

    def doubled(**given: Any) -> Any:
        return 2 * given["pg_loss"], given["loss_masks"], {}

    def masked(**given: Any) -> Any:
        return given["pg_loss"], [torch.zeros_like(m) for m in given["loss_masks"]], {}

    plain = gradient(stage, None)
    assert gradient(stage, unchanged, *TIS) == pytest.approx(plain, rel=1e-5) and plain > 0
    assert gradient(stage, doubled, *TIS) == pytest.approx(2 * plain, rel=1e-4)
    assert gradient(stage, masked, *TIS) == 0.0


def test_masks_changed_in_place_change_no_batch(stage: MakeStage) -> None:
    def tis(**given: Any) -> Any:
        for mask in given["loss_masks"]:
            mask.zero_()
        return given["pg_loss"], given["loss_masks"], {}

    s = stage(*TIS, custom_tis_function=tis)
    report = s.rollout()
    s.train(report)
    assert report.shards[0].loss_masks.all()


def test_get_mismatch_metrics_calls_it_too(stage: MakeStage) -> None:
    calls: list[int] = []

    def tis(**given: Any) -> Any:
        calls.append(1)
        return given["pg_loss"], given["loss_masks"], {}

    s = stage("--get-mismatch-metrics", custom_tis_function=tis)
    s.train(s.rollout())
    assert len(calls) >= 1


@pytest.mark.parametrize(
    ("name", "form", "metrics"),
    [
        ("tis", "parallel-state", {"parallel_state"}),
        ("tis_keywords", "parallel-state", {"keys"}),
        ("tis_without_state", "no-parallel-state", set()),
    ],
)
def test_forms(name: str, form: str, metrics: set[str]) -> None:
    assert bound("custom_tis_function", f"training:{name}").form == form


def test_an_unknown_argument() -> None:
    with pytest.raises(UsageError, match="weights"):
        bound("custom_tis_function", "training:tis_unknown")


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (lambda loss, masks: None, "none", "returned None, expected (pg_loss, masks, metrics)"),
        (lambda loss, masks: loss, "type", "expected (pg_loss, masks, metrics)"),
        (lambda loss, masks: (loss, masks), "length", "returned 2 values, expected (pg_loss, masks, metrics)"),
        (lambda loss, masks: (loss.sum(), masks, {}), "length", "pg_loss has shape []"),
        (lambda loss, masks: (loss[:-1], masks, {}), "length", "one value per response token"),
        (lambda loss, masks: (0.5, masks, {}), "type", "pg_loss is float 0.5, expected a tensor"),
        (lambda loss, masks: (loss, None, {}), "none", "returned None, expected (pg_loss, masks, metrics) with a list"),
        (lambda loss, masks: (loss, masks[:-1], {}), "length", "returned 3 masks for 4 samples"),
        (lambda loss, masks: (loss, [m[:0] for m in masks], {}), "length", "masks[0] is [0], expected a tensor"),
        (lambda loss, masks: (loss, masks, None), "none", "with a dict of metrics"),
        (lambda loss, masks: (loss, masks, {"kl": 0.5}), "type", "metric 'kl' is float 0.5, expected a tensor"),
        (lambda loss, masks: (loss, masks, {"kl": loss.mean()}), "length", "metric 'kl' has shape []"),
    ],
)
def test_what_cannot_be_trained(value: Any, kind: str, says: str, stage: MakeStage) -> None:
    def tis(**given: Any) -> Any:
        return value(given["pg_loss"], given["loss_masks"])

    s = stage(*TIS, "--micro-batch-size", 4, custom_tis_function=tis)
    with pytest.raises(HookError) as caught:
        s.train(s.rollout())
    assert caught.value.failure.kind == kind and says in str(caught.value)


def test_nan_is_told_and_changes_no_weight(stage: MakeStage) -> None:
    s = stage(
        *TIS, custom_tis_function=lambda **given: (given["pg_loss"] * float("nan"), given["loss_masks"], {})
    )
    assert s.train(s.rollout()).metrics["train/skipped_step"] == 1.0


def test_called_as_the_catalogue_says_outside_of_a_trainer() -> None:
    loss, masks = torch.ones(3), [torch.ones(3)]
    given: dict[str, Any] = dict.fromkeys(KEYWORDS)
    given |= {"args": Namespace(), "pg_loss": loss, "loss_masks": masks}
    hook = bound("custom_tis_function", "training:tis_without_state")
    assert hook(**given) == (loss, masks, {})
