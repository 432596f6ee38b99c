"""`--true-on-policy-mode`: log-probs of decoding and of a fresh training pass differ by exactly 0.0, in every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_runs import metrics, train
from moe_model import make_moe

REWARD = f"{Path(__file__).with_name('moe_model.py')}:digits"
DIFFERENCE = "train/train_rollout_logprob_abs_diff"
FLAG = "--true-on-policy-mode"

CASES: dict[str, tuple[object, ...]] = {
    "groups": (),
    "few slots, small micro batches": ("--sglang-max-running-requests", 3, "--max-tokens-per-gpu", 150),
    "temperature": ("--rollout-temperature", 0.8, "--n-samples-per-prompt", 2, "--rollout-batch-size", 8),
    "one sample at a time": ("--micro-batch-size", 1, "--log-probs-chunk-size", 3),
    "recomputed": ("--gradient-checkpointing", "--recompute-loss-function"),
}


def differences(run: Path) -> list[float]:
    """Of the steps in which any sample ran."""
    ran = [step for step, norm in metrics(run, "train/grad_norm").items() if norm > 0]
    found = metrics(run, DIFFERENCE)
    return [found[step] for step in ran]


def test_ten_steps_of_the_quickstart(tmp_path: Path) -> None:
    flags = ("--num-rollout", 6, "--n-samples-per-prompt", 8)
    run = train(tmp_path / "run", FLAG, *flags)
    assert len(differences(run)) >= 10 and set(differences(run)) == {0.0}
    usual = train(tmp_path / "usual", *flags)
    assert all(0 < value < 1e-5 for value in differences(usual))
    norms = [metrics(one, "train/grad_norm")[0] for one in (run, usual)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_experts_slots_lengths_and_cuts(tmp_path: Path, case: str) -> None:
    model = make_moe(tmp_path / "model")
    flags = ("--hf-checkpoint", model, "--custom-rm-path", REWARD, "--num-rollout", 2, *CASES[case])
    run = train(tmp_path / "run", FLAG, *flags)
    assert len(differences(run)) == 4 and set(differences(run)) == {0.0}


def test_it_learns_like_the_ordinary_mode(tmp_path: Path) -> None:
    """With a bfloat16 checkpoint and many requests at once the last bits differ elsewhere, not here."""
    model = make_moe(tmp_path / "model", norm_topk_prob=False)
    flags = ("--hf-checkpoint", model, "--custom-rm-path", REWARD, "--num-rollout", 4, "--lr", 2e-3)
    exact, usual = (train(tmp_path / name, *flags, *more) for name, more in (("exact", [FLAG]), ("usual", [])))
    assert set(differences(exact)) == {0.0} and 0.0 not in differences(usual)
    rewards = [list(metrics(run, "rollout/raw_reward").values()) for run in (exact, usual)]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.05)
