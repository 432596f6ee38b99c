"""Runs with Megatron that are killed while a checkpoint is being written: the one before it is in force, nothing is
left running, and the resumed run ends like one that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_runs import Started, exported, plug_in, same, saving, started, train, unclocked

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

ROLLOUTS = 3
TWO_RANKS = ("--train-backend", "megatron", "--tensor-model-parallel-size", 2, "--sequence-parallel")
FLAGS = (*TWO_RANKS, "--deterministic", "--async-save", "--num-rollout", ROLLOUTS)
MARK = "MILES_TEST_KILLED_RUN"


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("never") / "run"
    hook = ("--custom-megatron-post-save-hook-path", plug_in("note_saved"))
    return train(run, *saving(run), *FLAGS, *hook)


def tracker(run: Path) -> int:
    file = run / "ck" / "latest_checkpointed_iteration.txt"
    return int(file.read_text()) if file.exists() else -1


def processes(mark: str) -> Iterator[tuple[int, str]]:
    """(id, command line) of those that were started, directly or not, with this mark in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


def is_writing(run: Path) -> bool:
    """Files of a checkpoint that is not the first are being written in the background."""
    return tracker(run) >= 0 and any((run / "ck").glob(".iter_*/__*.distcp"))


def driver(run: Started) -> int:
    return run.process.pid


def last_rank(run: Started) -> int:
    workers = [pid for pid, line in processes(str(run.run_dir)) if "miles.trainer.worker" in line]
    ranks = [pid for pid in workers if _parent(pid) == run.process.pid]
    return max(ranks)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_layout_and_hook_on_every_rank(never_killed: Path) -> None:
    """iter_<rollout_id> as published; every rank is told, in the background too."""
    folders = sorted(path.name for path in (never_killed / "ck").glob("iter_*"))
    assert folders == [f"iter_{i:07d}" for i in range(ROLLOUTS)] and tracker(never_killed) == ROLLOUTS - 1
    names = {path.name for path in (never_killed / "ck" / folders[0]).iterdir()}
    assert {"metadata.json", ".metadata", "common.pt", "meta.json", "rng.pt"} < names
    assert {name.split("_")[2] for name in names if name.endswith(".distcp")} == {"0", "1"}
    assert (never_killed / "ck" / "rollout" / "global_dataset_state_dict_0.pt").is_file()
    for rank in (0, 1):
        lines = (never_killed / f"saved_{rank}.txt").read_text().splitlines()
        assert lines == [f"{i} iter_{i:07d} {i} True None False" for i in range(ROLLOUTS)]


@pytest.mark.parametrize("victim", [driver, last_rank])
def test_killed_in_a_save(victim: object, never_killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv(MARK, str(run_dir))
    with started(run_dir, *saving(run_dir), *FLAGS) as run:
        run.wait_until(lambda: is_writing(run_dir))
        os.kill(victim(run), signal.SIGKILL)  # type: ignore[operator]
        assert run.ends(30) == (-signal.SIGKILL if victim is driver else 1)
    deadline = time.monotonic() + 5
    while left := [*processes(str(run_dir))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    done = tracker(run_dir)
    assert 0 <= done < ROLLOUTS - 1, "killed too late to show anything"
    monkeypatch.delenv(MARK)
    train(run_dir, *saving(run_dir), *FLAGS, "--load", run_dir / "ck")
    assert same(exported(never_killed), exported(run_dir))
    assert unclocked(never_killed) == unclocked(run_dir)
    assert not [*(run_dir / "ck").glob(".*")]


@pytest.mark.parametrize("background", [(), ("--async-save",)], ids=["at once", "async"])
def test_a_disk_that_is_full(
    background: tuple[str, ...], small_disk: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told by name, and the process ends; nothing half written is in force."""
    disk = small_disk("3m")
    one = ("--train-backend", "megatron", "--num-rollout", 2, "--save", disk / "ck", "--save-interval", 1)
    train(tmp_path / "run", *one, *background, status=2)
    error = capsys.readouterr().err
    assert "cannot be written" in error and "Free some space or give another place with --save" in error
    assert not (disk / "ck" / "latest_checkpointed_iteration.txt").exists()


def test_megatron_s_own_checkpoint_is_gone_on_from(
    never_killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no file of Megatron-Core's is away: the weights are there, and the rollout after them is next."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    shutil.copytree(never_killed / "ck", theirs, ignore=shutil.ignore_patterns("rollout", "meta.json", "rng.pt"))
    one = ("--train-backend", "megatron", "--num-rollout", ROLLOUTS + 1, "--lr", 0)
    train(run, *saving(run), *one, "--load", theirs)
    said = capsys.readouterr().out
    assert f"data begin anew (it is Megatron's own, without the state of a run): rollout {ROLLOUTS} is next" in said
    assert same(exported(never_killed), exported(run))
    assert json.loads((run / "ck" / f"iter_{ROLLOUTS:07d}" / "meta.json").read_text())["global_step"] == 2
