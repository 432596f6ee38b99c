"""--custom-loss-function-path: once per micro-batch, with the published batch; its gradient is what is trained."""

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
CUSTOM = ("--loss-type", "custom_loss")
VOCABULARY = 53


def nothing(logits: torch.Tensor) -> torch.Tensor:
    return logits.sum() * 0


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, parallel_state, batch, logits, sum_of_sample_mean)` by position, once per micro-batch."""
    seen: list[Any] = []

    def loss(*given: Any, **kwargs: Any) -> Any:
        seen.append((given, kwargs))
        return nothing(given[3]), {"mine": torch.tensor(2.0)}

    s = stage(*CUSTOM, "--hook-form", "custom-loss-function=parallel-state", "--micro-batch-size", 2,
              custom_loss_function=loss)  # fmt: skip
    report = s.train(s.rollout())
    assert len(seen) == SAMPLES // 2
    for (args, parallel_state, batch, logits, reduce), kwargs in seen:
        assert args is s.args and isinstance(parallel_state, ParallelState) and kwargs == {}
        assert logits.dtype == torch.float32 and logits.shape == (1, sum(batch["total_lengths"]), VOCABULARY)
        assert logits.requires_grad and len(batch["unconcat_tokens"]) == 2
        assert {"tokens", "loss_masks", "log_probs", "advantages", "rollout_log_probs"} <= set(batch)
        ones = torch.ones(sum(batch["response_lengths"]))
        assert float(reduce(ones)) == 2.0, "a sum over samples of per-sample means"
    assert report.metrics["train/mine"] == pytest.approx(2 * 2.0 / SAMPLES), "summed, then divided by the samples"


def test_slimes_call_has_no_parallel_state(stage: MakeStage) -> None:
    seen: list[Any] = []

    def loss(args: Namespace, batch: dict[str, Any], logits: torch.Tensor, sum_of_sample_mean: Any) -> Any:
        seen.append((args, sorted(batch)))
        return nothing(logits), {}

    s = stage(*CUSTOM, custom_loss_function=loss)
    s.train(s.rollout())
    assert s.hooks.custom_loss_function.form == "no-parallel-state" and seen[0][0] is s.args


def test_its_gradient_is_what_is_trained(stage: MakeStage) -> None:
    """Twice the loss, twice the gradient: the loss counts as a sum over samples."""
    norms = []
    for factor in (1.0, 2.0):

        def loss(args: Any, parallel_state: Any, batch: Any, logits: Any, reduce: Any, factor: float = factor) -> Any:
            rows = [logits[0, e - r - 1 : e - 1] for e, r in ends(batch)]
            log_probs = torch.cat([row.log_softmax(-1)[:, 7] for row in rows])
            return -factor * reduce(log_probs), {}

        s = stage(*CUSTOM, custom_loss_function=loss)
        norms.append(s.train(s.rollout()).metrics["train/grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


def ends(batch: Any) -> list[tuple[int, int]]:
    positions, end = [], 0
    for total, response in zip(batch["total_lengths"], batch["response_lengths"]):
        end += total
        positions.append((end, response))
    return positions


def test_it_is_not_called_for_another_loss_type() -> None:
    hook = bound("custom_loss_function", "training:loss_five")
    assert hook.form == "parallel-state" and hook.stats.calls == 0


@pytest.mark.parametrize(
    ("name", "form", "metrics"),
    [
        ("loss_five", "parallel-state", {"parallel_state": 7}),
        ("loss_four", "no-parallel-state", {"batch": 8}),
        ("loss_four_with_option", "no-parallel-state", {"scale": 1.0}),
    ],
)
def test_forms(name: str, form: str, metrics: dict[str, Any]) -> None:
    hook = bound("custom_loss_function", f"training:{name}")
    logits = torch.tensor(2.0, requires_grad=True)
    loss, got = hook(Namespace(), 7, 8, logits, lambda x: x + 1)
    assert (float(loss.detach()), got) == (3.0, metrics) and hook.form == form


def test_ambiguous_ones_name_the_flag() -> None:
    with pytest.raises(UsageError, match=r"fits several forms(.|\n)*--hook-form custom-loss-function="):
        bound("custom_loss_function", "training:loss_anything")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda x: None, "returned None, expected (loss, metrics)"),
        (lambda x: x.sum(), "expected (loss, metrics)"),
        (lambda x: (0.5, {}), "returned float 0.5, expected a scalar tensor"),
        (lambda x: (x.sum(-1), {}), "expected a scalar tensor"),
        (lambda x: (torch.ones(()), {}), "returned a loss without gradient"),
        (lambda x: (x.sum(), None), "expected (loss, metrics) with a dict of metrics"),
        (lambda x: (x.sum(), {"kl": "low"}), "metric 'kl' is str 'low', expected a number"),
        (lambda x: (x.sum(), {"kl": torch.ones(3)}), "metric 'kl' is Tensor"),
        (lambda x: (x.sum(), {}, {}), "returned 3 values, expected (loss, metrics)"),
    ],
)
def test_a_loss_that_cannot_be_trained_on(value: Any, says: str, stage: MakeStage) -> None:
    s = stage(*CUSTOM, custom_loss_function=lambda args, parallel_state, batch, logits, reduce: value(logits))
    with pytest.raises(HookError) as caught:
        s.train(s.rollout())
    assert says in str(caught.value)


def test_nan_is_told_and_changes_no_weight(stage: MakeStage) -> None:
    def loss(args: Any, parallel_state: Any, batch: Any, logits: torch.Tensor, reduce: Any) -> Any:
        return logits.sum() * float("nan"), {}

    s = stage(*CUSTOM, custom_loss_function=loss)
    before = [p.detach().clone() for p in s.actor.backend.params]  # type: ignore[attr-defined]
    report = s.train(s.rollout())
    assert report.metrics["train/skipped_step"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, s.actor.backend.params))  # type: ignore[attr-defined]


def test_metrics_must_be_the_same_in_each_micro_batch(stage: MakeStage) -> None:
    calls: list[int] = []

    def loss(args: Any, parallel_state: Any, batch: Any, logits: torch.Tensor, reduce: Any) -> Any:
        calls.append(1)
        return nothing(logits), {f"m{len(calls)}": 1.0}

    s = stage(*CUSTOM, "--micro-batch-size", 2, custom_loss_function=loss)
    with pytest.raises(HookError, match=r"--custom-loss-function-path(.|\n)*\['m1'\](.|\n)*\['m2'\]"):
        s.train(s.rollout())
