"""--custom-pg-loss-reducer-function-path: makes the reducer of pg_loss, once per micro-batch; nothing else uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooks_helpers import bound
from hooks_stage import SAMPLES, Stage

from miles.errors import HookError

MakeStage = Callable[..., Stage]


def test_the_published_call(stage: MakeStage) -> None:
    """`(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)` by position."""
    seen: list[Any] = []
    reduced: list[torch.Tensor] = []

    def make(*given: Any, **kwargs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        seen.append((given, kwargs))

        def reduce(values: torch.Tensor) -> torch.Tensor:
            reduced.append(values)
            return values.sum()

        return reduce

    s = stage("--micro-batch-size", 2, custom_pg_loss_reducer_function=make)
    s.train(s.rollout())
    assert len(seen) == len(reduced) == SAMPLES // 2
    for ((total, response, masks, per_token), kwargs), values in zip(seen, reduced):
        assert [len(m) for m in masks] == response and all(t > r for t, r in zip(total, response))
        assert per_token is False and kwargs == {} and values.shape == (sum(response),)
        assert all(isinstance(m, torch.Tensor) and m.tolist() == [1] * len(m) for m in masks)


def train(stage: MakeStage, *flags: object, **plug_ins: Any) -> dict[str, float]:
    s = stage(*flags, **plug_ins)
    return s.train(s.rollout()).metrics


def default(total_lengths: Any, response_lengths: Any, loss_masks: Any, calculate_per_token_loss: bool = False) -> Any:
    def reduce(values: torch.Tensor) -> torch.Tensor:
        rows = zip(torch.split(values, response_lengths), loss_masks)
        return torch.stack([(v * m).sum() / m.sum().clamp(min=1) for v, m in rows]).sum()

    return reduce


def half(*given: Any) -> Any:
    whole = default(*given)
    return lambda values: whole(values) / 2


def test_it_changes_the_policy_loss_alone(stage: MakeStage) -> None:
    plain = train(stage)
    same = train(stage, custom_pg_loss_reducer_function=default)
    halved = train(stage, custom_pg_loss_reducer_function=half)
    assert same["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=1e-4)
    assert halved["train/grad_norm"] == pytest.approx(plain["train/grad_norm"] / 2, rel=1e-4)
    for name in ("train/ppo_kl", "train/pg_clipfrac", "train/entropy_loss"):
        assert halved[name] == pytest.approx(plain[name], abs=1e-6)


def test_it_gets_the_masks_of_the_importance_function(stage: MakeStage) -> None:
    seen: list[Any] = []

    def tis(**given: Any) -> Any:
        return given["pg_loss"], [torch.zeros_like(m) for m in given["loss_masks"]], {}

    def make(total_lengths: Any, response_lengths: Any, loss_masks: Any, calculate_per_token_loss: bool) -> Any:
        seen.extend(float(m.sum()) for m in loss_masks)
        return lambda values: values.sum() * 0

    train(stage, "--use-tis", custom_tis_function=tis, custom_pg_loss_reducer_function=make)
    assert seen == [0.0] * SAMPLES


def test_per_token_loss_is_told(stage: MakeStage) -> None:
    seen: list[bool] = []

    def make(total: Any, response: Any, masks: Any, calculate_per_token_loss: bool = False) -> Any:
        seen.append(calculate_per_token_loss)
        return lambda values: values.sum()

    train(stage, "--calculate-per-token-loss", custom_pg_loss_reducer_function=make)
    assert set(seen) == {True}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "returned None, expected a function of the flat loss"),
        (0.5, "returned a float, expected a function of the flat loss"),
        (lambda values: values, "expected a scalar tensor"),
        (lambda values: 0.5, "returned float 0.5, expected a scalar tensor"),
        (lambda values: None, "expected a scalar tensor"),
        (lambda values: values / [], "TypeError: "),
    ],
)
def test_what_reduces_nothing(made: Any, says: str, stage: MakeStage) -> None:
    s = stage(custom_pg_loss_reducer_function=lambda *given: made)
    with pytest.raises(HookError) as caught:
        s.train(s.rollout())
    assert says in str(caught.value) and "test_custom_pg_loss_reducer_function.py:" in str(caught.value)


def test_from_another_file() -> None:
    reduce = bound("custom_pg_loss_reducer_function", "training:reducer")([3], [2], [], True)
    assert float(reduce(torch.tensor([1.0, 2.0]))) == pytest.approx(0.03)
