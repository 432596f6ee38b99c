"""A run with several trainer processes: the same as with one, and its end when a process fails, dies or is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT

from miles.__main__ import main
from miles.observe.record import read_metrics

TINY = ROOT / "tests" / "e2e" / "tiny.yaml"
PLUG_INS = Path(__file__).with_name("rank_plug_ins.py")

# Metrics that measure the machine and not the run.
CLOCKED = ("perf/", "hooks/", "_time")
START_TIMEOUT_S = 120.0
# How long processes may outlive what they worked for.
SECONDS_TO_END = 10.0


def flags(run_dir: Path, *more: object) -> list[str]:
    post = f"{PLUG_INS}:{more[0]}"
    return [
        "train", "--config", str(TINY), "--run-dir", str(run_dir), "--rollout-data-postprocess-path", post,
        *map(str, more[1:]),
    ]  # fmt: skip


def train(run_dir: Path, *more: object) -> int:
    """In this process, with ranks of its own; the exit status."""
    with contextlib.chdir(ROOT):
        return main(flags(run_dir, *more))


def lines(run_dir: Path, *, first: int = 0) -> list[dict[str, object]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(CLOCKED)}
        for line in read_metrics(run_dir)
        if line.get("_rollout_id", -1) >= first
    ]


def assert_alike(got: list[dict[str, object]], want: list[dict[str, object]]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def nobody_left(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def wait_until(happened: object, seconds: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"nothing in {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    torch.set_num_threads(1)
    assert train(run_dir, "counter") == 0
    return run_dir



def ranks_left() -> list[psutil.Process]:
    """Processes of trainers that this one has started and that still live (graders of rewards may live on)."""
    return [child for child in psutil.Process().children() if "miles.trainer.worker" in child.cmdline()]

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


@contextlib.contextmanager
def waiting(run_dir: Path, *more: object) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A run whose ranks are in the middle of rollout 1, with their process ids."""
    command = flags(run_dir, "waits", "--actor-num-gpus-per-node", 2, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(run_dir.with_suffix(".err"), "wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "miles", *command], cwd=ROOT, env=environment, stderr=err, process_group=0
        )
    files = [run_dir / f"pid_{rank}" for rank in range(2)]
    pids: list[int] = []
    try:
        wait_until(lambda: all(f.is_file() and f.read_text() for f in files) or process.poll() is not None)
        assert process.poll() is None, run_dir.with_suffix(".err").read_text()
        pids += [int(f.read_text()) for f in files]
        yield process, pids
    finally:
        process.kill()
        process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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
