"""The quickstart learns: from a model that never carries to one that adds. Minutes long; `make test SLOW=1`."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_runs import QUICKSTART, miles, summary

from miles.observe.record import read_metrics

# 1,024 held-out problems, of which the base model, greedy, answers none.
GREEDY, SAMPLED, SAMPLED_BEFORE = 0.92, 0.82, 0.27


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1234, 1, 2])
def test_quickstart_learns_to_carry(seed: int, tmp_path: Path) -> None:
    status = miles("train", "--config", QUICKSTART / "carry.yaml", "--run-dir", tmp_path / "run", "--seed", seed)
    assert status == 0
    numbers = summary(tmp_path / "run")
    assert numbers["eval_before"]["greedy"] == 0.0
    assert numbers["eval_before"]["sampled"] == pytest.approx(SAMPLED_BEFORE, abs=0.04)
    assert numbers["eval_after"]["greedy"] >= GREEDY
    assert numbers["eval_after"]["sampled"] >= SAMPLED
    assert numbers["rollouts"] == 40 and numbers["seed"] == seed
    rewards = [line["rollout/raw_reward"] for line in read_metrics(tmp_path / "run") if "rollout/raw_reward" in line]
    assert sum(rewards[-10:]) / 10 > 2 * sum(rewards[:5]) / 5
