"""Every estimator as a run of two rollouts: the published metrics, and a first loss worked out from what was dumped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import BASE, latest, metrics, miles, moments, same, saving, train, weights
from torch import Tensor

from miles.observe.record import read_metrics

# Two samples per step: half a group, so that the advantages of a step do not cancel.
PER_STEP = 2
SHORT = ("--num-rollout", 2, "--num-steps-per-rollout", 8, "--rollout-temperature", 1.2)

REF = ("--ref-load", BASE)
CASES: dict[str, tuple[object, ...]] = {
    "grpo": (),
    "gspo": (),
    "rloo": (),
    "cispo": (),
    "dr_grpo": (),
    "ppo": ("--kl-coef", 0.1, *REF, "--gamma", 0.99, "--lambd", 0.95),
    "reinforce_plus_plus": ("--normalize-advantages", "--kl-coef", 0.1, *REF, "--gamma", 0.99),
    "reinforce_plus_plus_baseline": ("--normalize-advantages", "--kl-coef", 0.1, *REF),
}
PUBLISHED = {
    "loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl", "train_rollout_logprob_abs_diff", "grad_norm",
    "lr-pg_0",
}  # fmt: skip


def dumped(run: Path, rollout_id: int = 0) -> dict[str, Any]:
    data: dict[str, Any] = torch.load(run / "train" / f"{rollout_id}_0.pt", weights_only=True)["rollout_data"]
    return data


def by_hand(estimator: str, data: dict[str, Any]) -> float:
    """The loss of the first step, where pi is pi_old: every ratio is 1."""
    raw = [float(x) for x in data["raw_reward"]]
    groups = [raw[i : i + 4] for i in range(0, 16, 4)]
    advantages: list[list[float]] = []
    for i, reward in enumerate(raw):
        group, n = groups[i // 4], len(data["log_probs"][i])
        mean = sum(group) / 4
        others = (sum(group) - reward) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        kl = [0.0] * n
        if "ref_log_probs" in data:
            kl = [0.1 * float(o - r) for o, r in zip(data["log_probs"][i], data["ref_log_probs"][i])]
        plain = {"rloo": reward - others, "dr_grpo": reward - mean}.get(estimator, (reward - mean) / (std + 1e-6))
        row = [plain] * n
        if estimator == "reinforce_plus_plus_baseline":
            row = [reward - mean - k for k in kl]
        elif estimator == "reinforce_plus_plus":
            row = [0.0] * n
            for t in reversed(range(n)):
                row[t] = (reward if t == n - 1 else 0.99 * row[t + 1]) - kl[t]
        elif estimator == "ppo":
            values, row = [float(v) for v in data["values"][i]], [0.0] * n
            for t in reversed(range(n)):
                ahead = (values[t + 1], row[t + 1]) if t < n - 1 else (0.0, 0.0)
                last = reward if t == n - 1 else 0.0
                row[t] = last - kl[t] + 0.99 * ahead[0] - values[t] + 0.99 * 0.95 * ahead[1]
        advantages.append(row)
    if estimator.startswith("reinforce"):
        flat = [a for row in advantages for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
        advantages = [[(a - mean) / std for a in row] for row in advantages]
    total = 0.0
    for i in range(PER_STEP):
        terms = [-a for a in advantages[i]]
        if estimator == "cispo":
            terms = [-a * float(p) for a, p in zip(advantages[i], data["log_probs"][i])]
        total += sum(terms) / (36 if estimator == "dr_grpo" else len(terms))
    return total / PER_STEP


@pytest.mark.parametrize("estimator", CASES)
def test_estimator(estimator: str, tmp_path: Path) -> None:
    dump = ("--save-debug-train-data", tmp_path / "run" / "train" / "{rollout_id}_{rank}.pt")
    run = train(tmp_path / "run", *SHORT, *dump, "--advantage-estimator", estimator, *CASES[estimator])
    steps = [line for line in read_metrics(run) if "train/loss" in line]
    assert len(steps) == 2 * 8 and [line["train/step"] for line in steps] == [*range(16)]
    # A step whose samples all have exactly zero gradient has run no loss, and measures none.
    measured = [line for line in steps if line["train/exactly_zero_samples"] < PER_STEP]
    assert measured and all({f"train/{name}" for name in PUBLISHED} <= set(line) for line in measured)
    assert all(math.isfinite(line["train/grad_norm"]) and not line["train/skipped_step"] for line in steps)
    assert steps[0]["train/loss"] == pytest.approx(by_hand(estimator, dumped(run)), abs=2e-5)
    rollout = {name for line in read_metrics(run) for name in line if name.startswith("rollout/")}
    assert {"rollout/advantages", "rollout/returns", "rollout/log_probs", "rollout/raw_reward"} <= rollout
    assert ("rollout/ref_log_probs" in rollout) == ("--ref-load" in CASES[estimator])
    critic = metrics(run, "train/critic-value_loss")
    assert (len(critic) == 16 and "rollout/values" in rollout) if estimator == "ppo" else not critic


def test_the_sum_of_the_checks_above_is_not_zero(tmp_path: Path) -> None:
    """The base model answers some of the first problems and not others, so that losses worked out by hand are not 0."""
    dump = ("--save-debug-train-data", tmp_path / "run" / "train" / "{rollout_id}_{rank}.pt")
    data = dumped(train(tmp_path / "run", *SHORT, *dump, "--num-rollout", 1))
    assert len({round(by_hand(name, data), 5) for name in ("grpo", "rloo", "dr_grpo", "cispo")}) == 4


def test_kl_loss_and_everything_that_measures(tmp_path: Path) -> None:
    """KL to the base model: 0 in the first step, then more; off-policy sequences are masked; the reference moves."""
    flags = ("--use-kl-loss", "--kl-loss-coef", 0.5, "--kl-loss-type", "low_var_kl", *REF, "--use-opsm", "--use-tis")
    run = train(tmp_path / "run", *SHORT, *flags, "--ref-update-interval", 1, "--lr", 2e-3)
    kl = metrics(run, "train/kl_loss")
    assert kl[0] == 0.0 < kl[7]
    assert kl[8] < kl[7], "the actor of the first rollout is the reference of the second"
    names = {name for line in read_metrics(run) for name in line}
    assert {"train/opsm_clipfrac", "train/ois", "train/tis", "train/tis_clipfrac", "train/tis_abs"} <= names
    assert {"perf/ref_log_probs_time", "perf/ref_log_probs_tflops", "perf/ref_model_update_time"} <= names


# ---- saving and resuming ---------------------------------------------------------------------------------------------

PPO = ("--advantage-estimator", "ppo", "--kl-coef", 0.1, *REF, "--ref-update-interval", 2, "--keep-old-actor")


def critic(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = (folder / "model" / "model.safetensors", folder / "optimizer" / "optimizer.safetensors")
    return {f"{path.stem}.{name}": x for path in files for name, x in load_file(path).items()}


def test_ppo_resumes_bitwise(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *PPO, "--num-rollout", 4, *saving(tmp_path / "whole"))
    cut = tmp_path / "cut"
    train(cut, *PPO, "--num-rollout", 2, *saving(cut))
    train(cut, *PPO, "--num-rollout", 4, *saving(cut), "--load", cut / "ck")
    assert same(weights(cut), weights(whole)) and same(moments(cut), moments(whole))
    assert same(critic(latest(cut) / "critic"), critic(latest(whole) / "critic"))
    for name in ("reference", "old_actor", "served_actor"):
        assert (latest(cut) / name / "model" / "model.safetensors").is_file()


def test_a_critic_in_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "critics"
    flags = ("--advantage-estimator", "ppo", "--critic-save", own)
    whole = train(tmp_path / "whole", *flags, "--num-rollout", 3, *saving(tmp_path / "whole"))
    expected = critic(own / "iter_0000003")
    assert not (latest(whole) / "critic").exists()
    cut = tmp_path / "cut"
    flags = ("--advantage-estimator", "ppo", "--critic-save", tmp_path / "cut_critics")
    train(cut, *flags, "--num-rollout", 2, *saving(cut))
    resume = (*flags, "--num-rollout", 3, *saving(cut), "--load", cut / "ck")
    train(cut, *resume, status=2)
    assert "holds no critic. Give --critic-load" in capsys.readouterr().err
    train(cut, *resume, "--critic-load", own)
    assert same(weights(cut), weights(whole))
    assert same(critic(tmp_path / "cut_critics" / "iter_0000003"), expected)
    train(tmp_path / "warm", *flags[:2], "--critic-load", own, "--num-rollout", 1, "--num-critic-only-steps", 1)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "both KLs": (
        ("--kl-coef", 0.1, "--kl-loss-coef", 0.1, "--use-kl-loss", *REF), "--kl-coef: excludes --kl-loss-coef"
    ),
    "no reference": (("--use-kl-loss",), "--use-kl-loss: needs --ref-load."),
    "no such reference": (("--use-kl-loss", "--ref-load", "no/where"), "found no such folder"),
    "policy loss without advantages": (
        ("--disable-compute-advantages-and-returns",),
        "--disable-compute-advantages-and-returns: needs --loss-type sft_loss or custom_loss",
    ),
    "a critic without returns": (
        ("--advantage-estimator", "ppo", "--loss-type", "sft_loss", "--disable-compute-advantages-and-returns"),
        "--advantage-estimator ppo: excludes --disable-compute-advantages-and-returns",
    ),
    "a critic's folder alone": (
        ("--advantage-estimator", "ppo", "--critic-save", "x"),
        "--critic-save: needs --save",
    ),
    "no whitening": (("--advantage-estimator", "reinforce_plus_plus"), "needs --normalize-advantages."),
    "dr_grpo per token": (
        ("--advantage-estimator", "dr_grpo", "--calculate-per-token-loss"),
        "--advantage-estimator dr_grpo: excludes --calculate-per-token-loss",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, says = BAD[case]
    train(tmp_path / "run", *flags, status=2)
    assert says in capsys.readouterr().err


NAN_LOSS = '''
import math


def loss(args, parallel_state, batch, logits, sum_of_sample_mean):
    value = (logits * 0).sum()
    if args.rollout_batch_size == 4 and 5 in batch["sample_indices"]:
        value = value * math.nan
    return value, {"loss": value.detach()}
'''


def test_a_loss_that_returns_nan(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Skipped or stopped, as asked for; the samples are kept, and train again."""
    plug_in = write(NAN_LOSS, "nan_loss.py")
    flags = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{plug_in}:loss", "--num-rollout", 1)
    run = train(tmp_path / "run", *flags)
    printed = capsys.readouterr()
    kept = run / "failures" / "step_0_0_rank0.pt"
    assert "rollout 0, optimizer step 0: the loss is not finite for a micro-batch with" in printed.out + printed.err
    assert metrics(run, "train/skipped_step") == {0: 1.0, 1: 0.0} and kept.is_file()
    train(tmp_path / "stopped", *flags, "--nan-policy", "stop", status=1)
    assert "--nan-policy stop: rollout 0, optimizer step 0" in capsys.readouterr().err
    again = ("--load-debug-rollout-data", kept, "--num-steps-per-rollout", 1, "--global-batch-size", 8)
    replayed = tmp_path / "replayed"
    config = ("--config", Path(__file__).parent / "tiny.yaml", "--run-dir", replayed, *flags, *again)
    assert miles("train", *config, "--rollout-batch-size", 2) == 0, capsys.readouterr().err
    assert metrics(replayed, "train/skipped_step") == {0: 0.0}, "the plug-in breaks no batch of two prompts"
