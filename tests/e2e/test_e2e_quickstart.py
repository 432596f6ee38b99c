"""The quickstart, shortened: what it leaves, and that its record starts the same run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from e2e_runs import (
    HELDOUT,
    QUICKSTART,
    TINY,
    data_state,
    flags,
    metrics,
    miles,
    moments,
    same,
    saving,
    started,
    summary,
    train,
    weights,
)

from miles.observe.record import read_rollouts, recorded_rollouts

ROLLOUTS = 3


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart with 3 rollouts and 32 held-out problems."""
    folder = tmp_path_factory.mktemp("quickstart")
    datasets = yaml.safe_load((QUICKSTART / "eval.yaml").read_text())["datasets"]
    for dataset in datasets:
        dataset["path"] = f"{HELDOUT}@[0:32]"
    (folder / "eval.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    status = miles(
        *("train", "--config", QUICKSTART / "carry.yaml", "--run-dir", folder / "run"),
        *("--num-rollout", ROLLOUTS, "--eval-interval", ROLLOUTS, "--eval-config", folder / "eval.yaml"),
    )
    assert status == 0
    return folder / "run"


def test_run_directory_is_complete(short: Path) -> None:
    names = {path.name for path in short.iterdir()}
    assert names == {
        *("schema.json", "config.yaml", "config.json", "versions.json", "metrics.jsonl", "summary.json"),
        *("rollouts", "checkpoints", "model", "reward.png"),
    }
    assert (short / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (short / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == f"{ROLLOUTS}\n"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (short / "model").iterdir()}
    settings = json.loads((short / "config.json").read_text())
    assert settings["flags"]["data"]["num_rollout"] == {"value": ROLLOUTS, "from": "command line"}
    assert settings["flags"]["optimizer"]["lr"]["from"] == "file"


def test_summary_has_every_number(short: Path) -> None:
    numbers = summary(short)
    for moment in ("eval_before", "eval_after"):
        assert numbers[moment].keys() == {"sampled", "greedy"}
        assert all(0 <= value <= 1 for value in numbers[moment].values())
    assert numbers["eval_before"]["greedy"] == 0.0 < numbers["eval_before"]["sampled"]
    assert (numbers["rollouts"], numbers["seed"]) == (ROLLOUTS, 1234)
    assert 0.05 < numbers["peak_rss_gb"] < 20
    parts = numbers["generation_s_per_rollout"], numbers["train_s_per_rollout"]
    assert all(0.001 < seconds < 60 for seconds in parts)
    # Between generation and training lies only the conversion.
    assert sum(parts) <= numbers["wall_s_per_rollout"] + 1e-3
    assert numbers["first_step_s"] > 0
    assert numbers["hooks"]["custom_rm"]["calls"] == ROLLOUTS * 128 + 2 * 2 * 32


def test_metrics_of_every_step(short: Path) -> None:
    assert [*metrics(short, "train/loss")] == [0, 1, 2, 3, 4, 5]
    assert [*metrics(short, "rollout/raw_reward")] == [*metrics(short, "rollout/response_len/mean")] == [0, 1, 2]
    assert all(norm > 0 for norm in metrics(short, "train/grad_norm").values())
    assert all(diff < 1e-3 for diff in metrics(short, "train/train_rollout_logprob_abs_diff").values())


def test_rollouts_can_be_read_back(short: Path) -> None:
    assert recorded_rollouts(short) == [0, 1, 2]
    samples = read_rollouts(short, 1)
    assert len(samples) == 128 and [s.index for s in samples] == list(range(128, 256))
    for sample in samples:
        sample.validate()
        assert sample.reward == float(sample.response.split("</think>")[1:] == [f"{sample.label}<eos>"])
    assert {s.reward for s in samples} == {0.0, 1.0}
    rewards = [s.reward for s in read_rollouts(short, 1)]
    assert metrics(short, "rollout/raw_reward")[1] == pytest.approx(sum(rewards) / len(rewards))
    before, after = (read_rollouts(short, done, evaluation="sampled") for done in (0, ROLLOUTS))
    assert [s.prompt for s in before] == [s.prompt for s in after] and len(before) == 32
    assert [s.rollout_log_probs for s in before] != [s.rollout_log_probs for s in after]


# ---- one run, started in several ways ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    return train(run, "--save", "{run_dir}/ck", "--save-interval", 1)


def test_recorded_config_starts_the_same_run(tiny: Path, tmp_path: Path) -> None:
    assert (
        miles(
            "train",
            "--config",
            tiny / "config.yaml",
            "--run-dir",
            tmp_path / "other",
            "--save",
            tmp_path / "other" / "ck",
        )
        == 0
    )
    assert same(weights(tiny), weights(tmp_path / "other"))


def test_command_line_wins_over_the_file(tiny: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *saving(tmp_path / "run"), "--num-rollout", 2, "--lr", 1e-4, "--seed", 7)
    assert recorded_rollouts(run) == [0, 1]
    assert set(metrics(run, "train/lr-pg_0").values()) == {1e-4}
    assert set(metrics(tiny, "train/lr-pg_0").values()) == {2e-4}
    assert summary(run)["seed"] == 7
    assert [s.response for s in read_rollouts(run, 0)] != [s.response for s in read_rollouts(tiny, 0)]


def test_train_py_is_miles_train(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own, which also shows that the process does not matter."""
    with started(tmp_path / "run", *saving(tmp_path / "run"), command=("train.py",)) as run:
        assert run.ends(120) == 0, run.text()
    assert same(weights(tiny), weights(run.run_dir))
    assert same(moments(tiny), moments(run.run_dir))


def test_both_rollout_trees(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "1")
    run = train(tmp_path / "run", *saving(tmp_path / "run"))
    assert same(weights(tiny), weights(run))
    assert data_state(tiny, 2) == data_state(run, 2)
    settings = json.loads((run / "config.json").read_text())["flags"]["hooks"]
    assert settings["rollout_function_path"]["value"].endswith("InferenceRolloutFn")


def test_a_second_run_moves_the_first_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        train(tmp_path / "run", "--num-rollout", 1)
    assert f"{tmp_path / 'run'} held an earlier run, which is now {tmp_path / 'run.1'}" in capsys.readouterr().out
    assert recorded_rollouts(tmp_path / "run") == recorded_rollouts(tmp_path / "run.1") == [0]


def test_deterministic_flag(tiny: Path, tmp_path: Path) -> None:
    """What the flag adds changes nothing here: runs are equal without it, too."""
    run = train(tmp_path / "run", *saving(tmp_path / "run"), "--deterministic")
    assert same(weights(tiny), weights(run))


def test_tiny_is_a_file_of_flags(tmp_path: Path) -> None:
    """The helper's own config says nothing that the flags cannot."""
    given = yaml.safe_load(TINY.read_text())
    as_flags = [
        part for key, value in given.items() for part in ([f"--{key}"] if value is True else [f"--{key}", value])
    ]
    assert miles("train", *as_flags, "--run-dir", tmp_path / "a", "--num-rollout", 1, *saving(tmp_path / "a")) == 0
    assert miles("train", *flags(tmp_path / "b", "--num-rollout", 1, *saving(tmp_path / "b"))) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
