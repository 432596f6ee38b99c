"""A run with several trainer processes: the same as with one, and its end when a process fails, dies or is stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rank_runs import (
    SECONDS_TO_END,
    START_TIMEOUT_S,
    assert_alike,
    lines,
    nobody_left,
    ranks_left,
    train,
    wait_until,
    waiting,
)

from miles.observe.record import read_metrics


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    torch.set_num_threads(1)
    assert train(run_dir, "counter") == 0
    return run_dir


def test_two_processes_do_what_one_does_and_one_goes_on(one_process: Path, tmp_path: Path) -> None:
    run_dir, save = tmp_path / "two", tmp_path / "two" / "ck"
    saving = ("--save", save, "--save-interval", 1, "--async-save")
    assert train(run_dir, "counter", *saving, "--actor-num-gpus-per-node", 2) == 0
    assert_alike(lines(run_dir), lines(one_process))
    calls = [line for line in read_metrics(run_dir) if "hooks/rollout_data_postprocess/calls" in line]
    assert len(calls) == 3  # of rank 0, which has made them
    assert json.loads((save / "iter_0000002" / "meta.json").read_text())["world_size"] == 2
    assert (run_dir / "model" / "model.safetensors").is_file()
    assert ranks_left() == []

    files = sorted((save / "iter_0000003" / "model").iterdir())
    assert len(files) == 2 and (save / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    assert train(tmp_path / "on", "counter", "--load", save) == 0
    # The counter has gone through rank 0, a checkpoint, and another process.
    assert_alike(lines(tmp_path / "on", first=2), lines(one_process, first=2))


def test_a_checkpoint_of_one_process_goes_on_in_two(one_process: Path, tmp_path: Path) -> None:
    save = tmp_path / "ck"
    assert train(tmp_path / "one", "counter", "--num-rollout", 2, "--save", save, "--async-save") == 0
    assert train(tmp_path / "two", "counter", "--load", save, "--actor-num-gpus-per-node", 2) == 0
    assert_alike(lines(tmp_path / "two", first=2), lines(one_process, first=2))


def test_a_plug_in_that_fails_on_one_rank_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert train(tmp_path / "run", "fails_on_rank_1", "--actor-num-gpus-per-node", 2) == 1
    text = capfd.readouterr().err
    assert text.count("ZeroDivisionError: rank 1 divides") == 1 and "rank_plug_ins.py:" in text
    assert [p.name for p in (tmp_path / "run" / "failures" / "rank_1").iterdir()] == ["000001-rollout-data-postprocess"]
    assert ranks_left() == []
    assert time.monotonic() - begin < START_TIMEOUT_S


def test_a_plug_in_that_fails_on_every_rank_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "fails", "--actor-num-gpus-per-node", 2) == 1
    assert capfd.readouterr().err.count("ZeroDivisionError: everybody divides") == 1


def test_a_rank_that_is_killed_is_named_with_its_last_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "killed_on_rank_1", "--actor-num-gpus-per-node", 2) == 1
    text = capfd.readouterr().err
    assert "rank 1 of the trainer's 2 processes was killed by SIGKILL" in text and "famous last words" in text
    assert "Traceback" not in text
    assert ranks_left() == []


def test_a_loss_that_is_not_finite_on_one_rank_is_told_and_kept_by_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = ("breaks_on_rank_1", "--actor-num-gpus-per-node", 2, "--nan-policy", "stop")
    assert train(tmp_path / "run", *two) == 1
    text = capfd.readouterr().err
    assert "the loss is not finite for a micro-batch with sample " in text and "step_0_0_rank*.pt beside it" in text
    files = sorted(path.name for path in (tmp_path / "run" / "failures").iterdir())
    assert files == ["step_0_0_rank0.pt", "step_0_0_rank1.pt"]


def test_an_actor_that_has_not_stepped_yet_goes_on(tmp_path: Path) -> None:
    """PPO whose actor rests: its optimizer holds nothing, in any number of processes."""
    save = tmp_path / "ck"
    ppo = ("counter", "--advantage-estimator", "ppo", "--num-critic-only-steps", 1)
    two = ("--actor-num-gpus-per-node", 2, "--save", save, "--async-save")
    assert train(tmp_path / "run", *ppo, *two, "--num-rollout", 1) == 0
    assert train(tmp_path / "run", *ppo, *two, "--num-rollout", 2, "--load", save) == 0
    assert train(tmp_path / "one", *ppo, "--num-rollout", 2) == 0
    got, want = (
        [line for line in lines(tmp_path / name, first=1) if "train/rollouts_seen" not in line]
        for name in ("run", "one")
    )
    assert any("train/critic-value_loss" in line for line in want) and any("train/loss" in line for line in want)
    assert_alike(got, want)


# ---- a driver of its own ---------------------------------------------------------------------------------------------


def test_no_rank_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    with waiting(tmp_path / "run") as (process, pids):
        assert not nobody_left(pids)
        process.kill()
        wait_until(lambda: nobody_left(pids), SECONDS_TO_END)


def test_ctrl_c_finishes_the_rollout_and_saves_it(tmp_path: Path) -> None:
    """A terminal sends it to the whole process group of the driver."""
    with waiting(tmp_path / "run", "--save", tmp_path / "ck") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and not nobody_left(pids)
        (tmp_path / "run" / "go").touch()
        assert process.wait(START_TIMEOUT_S) == 130
        assert "everything is saved" in (tmp_path / "run.err").read_text()
        assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
        assert nobody_left(pids)
