"""The modes of a run, and the plug points that a whole run exercises best: every one as a run of a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from e2e_runs import (
    HELDOUT,
    QUICKSTART,
    TINY,
    distance,
    exported,
    metrics,
    miles,
    plug_in,
    same,
    saving,
    summary,
    train,
    weights,
)

from miles.observe.record import read_rollouts, recorded_rollouts
from miles.types import Sample

SAMPLES = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rollouts without anything special, with everything that can be dumped."""
    run = tmp_path_factory.mktemp("modes") / "run"
    return train(run, *saving(run), "--save-debug-rollout-data", "{run_dir}/dump/{rollout_id}.pt")


# ---- debugging -----------------------------------------------------------------------------------------------------


def test_rollouts_alone(plain: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--debug-rollout-only", *saving(tmp_path / "run"))
    assert recorded_rollouts(run) == [0, 1, 2]
    # Until the first weight update both runs have the same model.
    assert [s.response for s in read_rollouts(run, 0)] == [s.response for s in read_rollouts(plain, 0)]
    assert not (run / "model").exists() and not [*(run / "ck").glob("iter_*")]
    assert summary(run)["first_step_s"] is None and summary(run)["rollouts"] == 3


def test_dumped_rollouts_have_the_published_form(plain: Path) -> None:
    assert sorted(path.name for path in (plain / "dump").iterdir()) == ["0.pt", "1.pt", "2.pt"]
    stored = torch.load(plain / "dump" / "1.pt", weights_only=True)
    assert stored.keys() == {"rollout_id", "samples"} and stored["rollout_id"] == 1
    samples = [Sample.from_dict(data) for data in stored["samples"]]
    recorded = read_rollouts(plain, 1)
    assert len(samples) == SAMPLES
    for ours, theirs in zip(samples, recorded, strict=True):
        ours.validate()
        assert (ours.tokens, ours.reward, ours.status, ours.label) == (
            theirs.tokens, theirs.reward, theirs.status, theirs.label,
        )  # fmt: skip


@pytest.mark.parametrize("flag", [[], ["--debug-train-only"]], ids=["alone", "with-debug-train-only"])
def test_training_from_dumps_is_training_live(flag: list[str], plain: Path, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", *saving(tmp_path / "run"), *flag, "--load-debug-rollout-data", plain / "dump/{rollout_id}.pt"
    )
    assert same(weights(plain), weights(run))
    assert metrics(plain, "train/loss") == metrics(run, "train/loss")


def test_training_from_part_of_a_dump(plain: Path, tmp_path: Path) -> None:
    """Half of the share from each end of the file; whole optimizer steps of it are trained."""
    run = train(
        tmp_path / "run", "--load-debug-rollout-data", plain / "dump/{rollout_id}.pt",
        "--load-debug-rollout-data-subsample", 0.5, "--num-rollout", 1,
    )  # fmt: skip
    everything = [s.index for s in read_rollouts(plain, 0)]
    assert [s.index for s in read_rollouts(run, 0)] == everything[:4] + everything[-4:]
    assert [*metrics(run, "train/loss")] == [0]


def test_a_missing_dump_is_named(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        tmp_path / "run", "--load-debug-rollout-data", plain / "dump/{rollout_id}.pt", "--num-rollout", 4, status=2
    )  # fmt: skip
    error = capsys.readouterr().err
    assert f"{plain}/dump/3.pt: no such file, for rollout 3." in error and "--num-rollout at most" in error


def test_dump_details(tmp_path: Path) -> None:
    evaluation = ("--eval-interval", 1, "--eval-prompt-data", "small", f"{HELDOUT}@[0:3]", "--skip-eval-before-train")
    run = train(tmp_path / "run", "--num-rollout", 1, "--dump-details", "{run_dir}/details", *evaluation)
    details = run / "details"
    assert {p.name for p in (details / "rollout_data").iterdir()} == {"0.pt", "eval_0.pt"}
    evaluated = torch.load(details / "rollout_data" / "eval_0.pt", weights_only=True)
    assert evaluated["rollout_id"] == "eval_0" and len(evaluated["samples"]) == 3
    assert (details / "tokenizer" / "tokenizer.json").exists()
    stored = torch.load(details / "train_data" / "0_0.pt", weights_only=True)
    assert stored["rollout_id"] == 0 and stored["rank"] == 0
    data = stored["rollout_data"]
    assert {"tokens", "response_lengths", "rewards", "loss_masks", "advantages", "log_probs"} <= data.keys()
    for i in range(SAMPLES):
        length = data["response_lengths"][i]
        for column in ("loss_masks", "advantages", "log_probs", "rollout_log_probs"):
            assert data[column][i].shape == (length,), column
        assert torch.allclose(data["log_probs"][i], data["rollout_log_probs"][i], atol=1e-4)


# ---- how many samples make a step ----------------------------------------------------------------------------------

UNEVEN = ("--num-rollout", 2, "--rollout-function-path", plug_in("rollout_of_13"))


def test_rollouts_are_cut_to_whole_steps(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *UNEVEN)
    assert [len(read_rollouts(run, i)) for i in range(2)] == [8, 8]
    assert [s.index for s in read_rollouts(run, 0)] == [*range(8)]
    assert [*metrics(run, "train/loss")] == [0, 1]


def test_no_trimming(tmp_path: Path) -> None:
    """All samples stay in the record and the statistics; what fills no step is not trained."""
    run = train(tmp_path / "run", *UNEVEN, "--disable-rollout-trim-samples")
    assert [len(read_rollouts(run, i)) for i in range(2)] == [13, 13]
    assert [*metrics(run, "train/loss")] == [0, 1]


def test_one_step_of_whatever_came(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *UNEVEN, "--use-dynamic-global-batch-size")
    assert [len(read_rollouts(run, i)) for i in range(2)] == [13, 13]
    assert [*metrics(run, "train/loss")] == [0, 1]


def test_too_few_for_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", *UNEVEN, "--num-steps-per-rollout", 1, status=1)
    assert "The rollout gave 13 samples, fewer than one optimizer step of 16" in capsys.readouterr().err


# ---- how long a run is ---------------------------------------------------------------------------------------------


def test_epochs(tmp_path: Path) -> None:
    """9 problems, 4 per rollout: two rollouts an epoch, each with a checkpoint at its end."""
    given = yaml.safe_load(TINY.read_text())
    del given["num-rollout"]
    (tmp_path / "epochs.yaml").write_text(yaml.safe_dump(given))
    run, data = tmp_path / "run", f"{QUICKSTART / 'data' / 'train.jsonl'}@[0:9]"
    status = miles(
        "train", "--config", tmp_path / "epochs.yaml", "--run-dir", run, *saving(run, every=100),
        "--prompt-data", data, "--num-epoch", 2,
    )  # fmt: skip
    assert status == 0
    assert recorded_rollouts(run) == [0, 1, 2, 3]
    assert sorted(path.name for path in (run / "ck").glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    prompts = [s.prompt for i in range(4) for s in read_rollouts(run, i)[::4]]
    assert len(set(prompts[:9])) == 9 and prompts[9:] == prompts[: len(prompts) - 9]


def test_custom_config(plain: Path, tmp_path: Path) -> None:
    """Attributes of `args` for plug-ins, and flags, from one file of the user's."""
    (tmp_path / "mine.yaml").write_text("my_bonus: 0.25\nn_samples_per_prompt: 2\n")
    run = train(
        tmp_path / "run", "--num-rollout", 1, "--custom-config-path", tmp_path / "mine.yaml",
        "--custom-rm-path", plug_in("bonus"),
    )  # fmt: skip
    samples = read_rollouts(run, 0)
    assert len(samples) == 8 and {s.reward for s in samples} == {0.25}


# ---- losses --------------------------------------------------------------------------------------------------------


def test_custom_loss_is_the_built_in_one(plain: Path, tmp_path: Path) -> None:
    """Written from logits, in a micro batch for every two samples."""
    run = train(
        tmp_path / "run", *saving(tmp_path / "run"), "--loss-type", "custom_loss",
        "--custom-loss-function-path", plug_in("policy_loss"), "--max-tokens-per-gpu", 100,
    )  # fmt: skip
    assert distance(weights(plain), weights(run)) < 1e-5
    assert distance(weights(plain), weights(plain, 1)) > 1e-4, "training moves the weights far more than that"
    ours, mine = metrics(plain, "train/loss"), metrics(run, "train/loss")
    # A step in which no sample pulls is not run by the built-in loss; here it is, and its loss is 0.
    assert mine == pytest.approx({step: ours.get(step, 0.0) for step in range(6)}, abs=1e-5)
    assert metrics(run, "train/mine")[0] == pytest.approx(1.0, abs=1e-4)


def test_pg_reducer(plain: Path, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", *saving(tmp_path / "run"), "--custom-pg-loss-reducer-function-path", plug_in("pg_reducer")
    )
    assert distance(weights(plain), weights(run)) < 1e-5
    half = train(
        tmp_path / "half", "--num-rollout", 1, "--custom-pg-loss-reducer-function-path", plug_in("half_pg_reducer")
    )
    whole = metrics(plain, "train/grad_norm")
    assert metrics(half, "train/grad_norm")[0] == pytest.approx(whole[0] / 2, rel=1e-4)


def test_importance_correction(plain: Path, tmp_path: Path) -> None:
    """Engine and trainer hardly differ here, so the correction is close to 1; the bound shows that it is applied."""
    run = train(tmp_path / "run", *saving(tmp_path / "run"), "--use-tis")
    assert all(weight == pytest.approx(1.0, abs=1e-3) for weight in metrics(run, "train/tis").values())
    assert distance(weights(plain), weights(run)) < 1e-3
    half = train(tmp_path / "half", "--num-rollout", 1, "--use-tis", "--tis-clip", 0.5)
    assert all(weight == pytest.approx(1.0, abs=1e-3) for weight in metrics(half, "train/tis").values())
    assert all(share > 0 for share in metrics(half, "train/tis_clipfrac").values())
    assert metrics(half, "train/grad_norm")[0] == pytest.approx(metrics(plain, "train/grad_norm")[0] / 2, rel=1e-2)


# ---- rollouts and generation of the user's own -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RolloutClass", "rollout_async"])
def test_own_rollout_function(name: str, plain: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *saving(tmp_path / "run"), "--rollout-function-path", plug_in(name))
    assert same(weights(plain), weights(run))
    if name == "RolloutClass":
        assert metrics(run, "rollout/response_len/mean") == metrics(plain, "rollout/response_len/mean")
        lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"mine/rollout_id"' in line]
        assert len(lines) == 3


@pytest.mark.parametrize("name", ["generate_by_post", "generate_by_httpx"])
def test_generation_over_http(name: str, plain: Path, tmp_path: Path) -> None:
    """The run's own address serves the engine that the core calls directly, with the weights of the moment."""
    run = train(tmp_path / "run", "--custom-generate-function-path", plug_in(name))
    for rollout_id in range(3):
        ours, theirs = read_rollouts(plain, rollout_id), read_rollouts(run, rollout_id)
        assert [s.tokens for s in ours[:4]] == [s.tokens for s in theirs[:4]]
        difference = max(
            abs(a - b) for s, t in zip(ours[:4], theirs) for a, b in zip(s.rollout_log_probs, t.rollout_log_probs)
        )
        assert difference < 1e-3
    assert (
        distance({n: t.float() for n, t in exported(plain).items()}, {n: t.float() for n, t in exported(run).items()})
        < 1e-2
    )


# ---- a run as a test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "status"), [(0.0, 0), (0.99, 1)])
def test_ci_metric_checker(threshold: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        tmp_path / "run", "--num-rollout", 1, "--eval-interval", 1, "--eval-prompt-data", "few", f"{HELDOUT}@[0:4]",
        "--ci-metric-checker-key", "eval/few", "--ci-metric-checker-threshold", threshold, status=status,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert ("--ci-metric-checker-key eval/few: the best was 0." in error) == (status == 1)


def test_ci_metric_checker_without_such_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        tmp_path / "run", "--num-rollout", 1, "--eval-interval", 1, "--eval-prompt-data", "few", f"{HELDOUT}@[0:4]",
        "--ci-metric-checker-key", "eval/many", "--ci-metric-checker-threshold", 0.5, status=2,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert "--ci-metric-checker-key: expected one of eval/few" in error and "got 'eval/many'" in error
