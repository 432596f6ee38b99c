"""Rollouts that cannot be trained on: each ends in a sentence that names the flag or the sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_runs import metrics, train

PLUG_IN = '''
def without_log_probs(args, samples):
    for sample in samples:
        sample.rollout_log_probs = None


def short_mask(args, samples):
    samples[5].loss_mask = [1, 1]


def empty_response(args, samples):
    for sample in samples[:2]:
        sample.tokens, sample.response_length, sample.response = sample.tokens[:4], 0, ""
        sample.rollout_log_probs, sample.loss_mask = [], []


def nothing_trained(args, samples):
    for sample in samples:
        sample.remove_sample = True


def none_reward(args, samples):
    samples[3].reward = None


def nan_reward(args, samples):
    samples[3].reward = float("nan")


def log(rollout_id, args, samples, metrics, seconds):
    globals()[args.change](args, samples)
    return False


def keep_none(args, samples, **kwargs):
    return False
'''

BAD: dict[str, tuple[str, tuple[object, ...], str]] = {
    "no log-probs for TIS": ("without_log_probs", ("--use-tis",), "--use-tis"),
    "no log-probs for the old policy": ("without_log_probs", ("--use-rollout-logprobs",), "--use-rollout-logprobs"),
    "no log-probs for the penalty": (
        "without_log_probs",
        ("--use-rollout-logprobs", "--kl-coef", 0.1, "--ref-load", "examples/quickstart/base")
        + ("--advantage-estimator", "reinforce_plus_plus_baseline", "--normalize-advantages"),
        "--kl-coef 0.1: the samples have no rollout_log_probs",
    ),
    "a short mask": ("short_mask", (), "of sample 5 is 2, its response_length is"),
    "no reward": ("none_reward", (), "The reward of sample 3 is NoneType None. Expected a finite number."),
    "a reward of NaN": ("nan_reward", (), "The reward of sample 3 is float nan. Expected a finite number."),
    "nothing to whiten": (
        "nothing_trained", ("--normalize-advantages",), "--normalize-advantages: no response token of this step is"
    ),
    "a sample that is too long": ("log", ("--max-tokens-per-gpu", 12), "--max-tokens-per-gpu is 12"),
}  # fmt: skip


@pytest.fixture
def changing(write: Callable[..., Path]) -> Callable[[str], tuple[object, ...]]:
    """Flags with which each rollout's samples are changed before they are converted."""
    plug_in = write(PLUG_IN, "changing.py")

    def flags(change: str) -> tuple[object, ...]:
        if change == "log":
            return ()
        config = write(f"change: {change}\n", "change.yaml")
        return "--custom-rollout-log-function-path", f"{plug_in}:log", "--custom-config-path", config

    return flags


@pytest.mark.parametrize("case", BAD)
def test_bad_batch(
    case: str, changing: Callable[[str], tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, flags, says = BAD[case]
    with pytest.raises(AssertionError, match=r"exit status [12], expected 0"):
        train(tmp_path / "run", "--num-rollout", 1, *flags, *changing(change))
    printed = " ".join(capsys.readouterr().err.split())
    assert says in printed and "Traceback" not in printed


def test_an_empty_response_is_a_sample_without_gradient(
    changing: Callable[[str], tuple[object, ...]], tmp_path: Path
) -> None:
    """With every estimator: its reward counts in its group, and the step is divided by it."""
    for estimator in ("grpo", "ppo", "reinforce_plus_plus"):
        whitened = ("--normalize-advantages",) if estimator == "reinforce_plus_plus" else ()
        flags = ("--advantage-estimator", estimator, *whitened, "--num-rollout", 1)
        run = train(tmp_path / estimator, *flags, *changing("empty_response"))
        assert metrics(run, "train/exactly_zero_samples")[0] >= 2
        assert metrics(run, "train/skipped_step") == {0: 0.0, 1: 0.0}


def test_a_rollout_in_which_nothing_is_trained(changing: Callable[[str], tuple[object, ...]], tmp_path: Path) -> None:
    """Removed samples have advantage and gradient zero; the weights stay."""
    run = train(tmp_path / "run", "--num-rollout", 1, "--weight-decay", 0, *changing("nothing_trained"))
    assert metrics(run, "train/exactly_zero_samples") == {0: 8, 1: 8}
    assert metrics(run, "train/grad_norm") == {0: 0.0, 1: 0.0}


def test_a_batch_that_does_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 samples in steps of 24 fill none; in steps of 6 the last four are cut off, which is said."""
    base = ("--num-rollout", 1, "--num-steps-per-rollout", 2)
    train(tmp_path / "none", *base[:2], "--num-steps-per-rollout", 17, status=2)
    assert "--num-steps-per-rollout: expected at most 16, the samples of a rollout, got 17" in capsys.readouterr().err
    run = train(tmp_path / "some", "--num-rollout", 1, "--num-steps-per-rollout", 3)
    assert len(metrics(run, "train/loss")) == 3
