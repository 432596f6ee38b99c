"""The learning-rate schedule, against its formulas at chosen steps."""

import math

import pytest
import torch

from miles.errors import FlagError
from miles.trainer.schedule import ParamScheduler, Schedule

SPAN = {"max_lr": 1.0, "min_lr": 0.2, "warmup": 10, "decay": 110}


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        ("constant", 0, 0.1),
        ("constant", 9, 1.0),
        ("constant", 10_000, 1.0),
        ("linear", 10, 1.0),
        ("linear", 60, 0.6),
        ("linear", 110, 0.2),
        ("linear", 500, 0.2),
        ("cosine", 60, 0.6),
        ("cosine", 35, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 110, 0.2),
        ("inverse-square-root", 40, 0.5),
        ("inverse-square-root", 100_000, 0.2),
    ],
)
def test_rate_at_step(style: str, step: int, expected: float) -> None:
    assert Schedule(style=style, **SPAN).lr(step) == pytest.approx(expected)


@pytest.mark.parametrize("anneal", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_stays_then_anneals_to_the_minimum(anneal: str) -> None:
    schedule = Schedule(style="WSD", wsd_decay=50, wsd_style=anneal, **SPAN)
    assert schedule.lr(60) == 1.0
    assert 0.2 < schedule.lr(85) < 1.0
    assert schedule.lr(110) == pytest.approx(0.2)


def test_unknown_style_names_the_flag() -> None:
    with pytest.raises(FlagError, match="--lr-decay-style: expected one of WSD, constant"):
        Schedule(max_lr=1.0, style="step")


def test_scheduler_sets_groups_and_resumes() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    scheduler = ParamScheduler(optimizer, Schedule(style="linear", **SPAN))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    for _ in range(60):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.6)

    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    resumed = ParamScheduler(other, Schedule(style="linear", **SPAN))
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(0.6)
