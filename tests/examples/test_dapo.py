"""DAPO: groups without a signal are replaced, long responses lose reward, tokens of a step count alike."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.DAPO import overlong
from miles.observe.record import read_rollouts, recorded_rollouts
from miles.types import Sample

CONFIG = "examples/DAPO/dapo.yaml"
SMALL = ("--num-rollout", 2, "--rollout-batch-size", 4, "--over-sampling-batch-size", 6, "--num-steps-per-rollout", 1)
NO_EVAL = ("--eval-interval", 100, "--skip-eval-before-train", "--lr-warmup-iters", 0)


def settings(**more: Any) -> Namespace:
    return Namespace(
        **{"rollout_max_response_len": 20, "overlong_buffer_len": 5, "overlong_penalty_factor": 2.0, "reward_key": None}
        | more
    )


@pytest.mark.parametrize(
    ("length", "loses"), [(0, 0.0), (15, 0.0), (16, 0.4), (18, 1.2), (20, 2.0), (21, 2.0), (1000, 2.0)]
)
def test_the_penalty_is_equation_13(length: int, loses: float) -> None:
    assert overlong.penalty(settings(), length) == pytest.approx(-loses)


def samples(*given: tuple[int, float, int]) -> list[Sample]:
    return [Sample(group_index=g, reward=r, response_length=n) for g, r, n in given]


def test_rewards_are_relative_to_the_group_after_shaping() -> None:
    raw, rewards = overlong.shaped_rewards(
        settings(), samples((7, 1, 10), (3, 0, 10), (7, 1, 20), (3, 0, 10), (3, 1, 10))
    )
    assert raw == [1, 0, 1, 0, 1]
    assert rewards[0] == pytest.approx(1 / np.sqrt(2), rel=1e-4) and rewards[2] == pytest.approx(-rewards[0])
    assert rewards[4] > 0 > rewards[1] == rewards[3]
    assert sum(rewards) == pytest.approx(0)


def test_equal_rewards_and_a_group_of_one_teach_nothing() -> None:
    _, rewards = overlong.shaped_rewards(settings(), samples((1, 1, 10), (1, 1, 12), (2, 1, 10)))
    assert rewards == [0, 0, 0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"overlong_buffer_len": None}, "overlong_buffer_len: expected a whole number from 1 to"),
        ({"overlong_buffer_len": 21}, "--rollout-max-response-len 20, got 21"),
        ({"overlong_buffer_len": 0}, "got 0"),
        ({"overlong_buffer_len": "5"}, "got '5'"),
        ({"overlong_penalty_factor": -1}, "overlong_penalty_factor: expected a number >= 0, got -1"),
        ({"rollout_max_response_len": None}, "--rollout-max-response-len"),
    ],
)
def test_wrong_settings_are_named(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        overlong.penalty(settings(**more), 3)
    assert says in str(caught.value)


def test_a_run_trains_only_groups_with_a_signal(train, metrics) -> None:
    run = train(CONFIG, *SMALL, *NO_EVAL)
    dropped = [n for r in ("0.0", "1.0") for n in metrics(run, f"rollout/dynamic_filter/drop_zero_std_{r}")]
    assert sum(dropped) > 0
    for rollout_id in recorded_rollouts(run):
        rewards: dict[int, list[float]] = {}
        for sample in read_rollouts(run, rollout_id, kept_only=True):
            rewards.setdefault(sample.group_index, []).append(sample.reward)
        assert len(rewards) == 4
        assert all(len(set(group)) == 2 and len(group) == 8 for group in rewards.values())
    assert metrics(run, "train/exactly_zero_samples") == [0, 0]


def test_a_run_shapes_rewards_and_counts_tokens_alike(train, metrics, tmp_path: Path) -> None:
    """With the whole response as buffer, longer ones get less; the mean of advantages over all tokens shows it."""
    strict = tmp_path / "strict.yaml"
    strict.write_text("overlong_buffer_len: 36\noverlong_penalty_factor: 100.0\n")
    debug = ("--save-debug-train-data", tmp_path / "{rollout_id}_{rank}.pt", "--custom-config-path", strict)
    run = train(CONFIG, *SMALL, *NO_EVAL, *debug)
    import torch

    data = torch.load(tmp_path / "0_0.pt", weights_only=False)["rollout_data"]
    lengths, rewards = np.array(data["response_lengths"]), np.array(data["rewards"])
    assert np.corrcoef(lengths, rewards)[0, 1] < -0.8
    assert set(data["raw_reward"]) == {0.0, 1.0}
    # The old policy is the current one, so pg_loss is minus the mean advantage: over tokens, not over samples.
    over_tokens = -(lengths * rewards).sum() / lengths.sum()
    assert metrics(run, "train/pg_loss")[0] == pytest.approx(over_tokens, rel=1e-3)
    assert over_tokens != pytest.approx(-rewards.mean(), abs=1e-3)
