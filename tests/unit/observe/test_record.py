"""The run directory: what it keeps, what it repairs, and what it answers when the disk says no."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from miles.errors import RunDirError
from miles.observe import files, record
from miles.observe.record import (
    RunRecord,
    read_metrics,
    read_rollouts,
    read_summary,
    recorded_rollouts,
)
from miles.types import Sample


def sample(index: int = 0) -> Sample:
    return Sample(index=index, group_index=0, prompt="1+1=?", tokens=[1, 2, 3], response="2", response_length=1)


def test_a_run_leaves_its_record(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    with RunRecord(run_dir) as run:
        run.write_config("optimizer:\n  lr: 0.00015\n", {"lr": 1.5e-4, "wandb_key": "secret", "kl": None})
        run.write_versions({"--custom-rm-path": {"file": "rewards.py", "sha256": "ab"}})
        run.log({"rollout/step": 0, "rollout/raw_reward": 0.25}, rollout_id=0)
        run.write_rollout(0, [[sample(0), sample(1)]])
        run.write_rollout(0, [sample(7)], evaluation="my set/α")
        run.write_summary({"rollouts": 1})
        assert (run_dir / "run.lock").exists()
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.json", "config.yaml", "metrics.jsonl", "rollouts", "schema.json", "summary.json", "versions.json",
    ]  # fmt: skip
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == {"optimizer": {"lr": 1.5e-4}}
    assert json.loads((run_dir / "config.json").read_text()) == {"lr": 1.5e-4, "kl": None}
    assert json.loads((run_dir / "schema.json").read_text()) == {"schema_version": record.SCHEMA_VERSION}
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["libraries"]["torch"].startswith("2.")
    assert versions["plugins"]["--custom-rm-path"]["sha256"] == "ab"
    assert read_summary(run_dir) == {"rollouts": 1}
    assert recorded_rollouts(run_dir) == [0]
    assert [s.index for s in read_rollouts(run_dir, 0)] == [0, 1]
    assert [s.index for s in read_rollouts(run_dir, 0, evaluation="my set/α")] == [7]
    (line,) = read_metrics(run_dir)
    assert line["_rollout_id"] == 0 and line["rollout/raw_reward"] == 0.25


# ---- an existing directory -------------------------------------------------------------------------------------


def test_a_new_run_moves_the_old_one_aside_and_loses_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "quickstart"
    for number in range(3):
        with RunRecord(run_dir) as run:
            run.log({"number": number})
            (run_dir / "checkpoint.bin").write_text(str(number))
            aside = run.moved_aside
    assert aside == tmp_path / "quickstart.2"
    kept = {path.name: (path / "checkpoint.bin").read_text() for path in tmp_path.iterdir()}
    assert kept == {"quickstart": "2", "quickstart.1": "0", "quickstart.2": "1"}
    assert [line["number"] for line in read_metrics(tmp_path / "quickstart.1")] == [0]


def test_a_resumed_run_continues_in_place(tmp_path: Path) -> None:
    for number in range(2):
        with RunRecord(tmp_path / "r", resume=True) as run:
            assert run.moved_aside is None
            run.write_config(f"num-rollout: {10 + number}\n", {"num_rollout": 10 + number})
            run.log({"number": number})
    assert [line["number"] for line in read_metrics(tmp_path / "r")] == [0, 1]
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == {"num_rollout": 11}
    assert json.loads((tmp_path / "r" / "config.json.1").read_text()) == {"num_rollout": 10}


def test_rewind_sets_later_rollouts_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    with RunRecord(run_dir) as run:
        run.log({"start": 1})
        for rollout_id in range(4):
            run.log({"rollout/step": rollout_id, "try": 1}, rollout_id=rollout_id)
            run.write_rollout(rollout_id, [sample(rollout_id)])
        for done in (0, 2, 4):
            run.log({"eval/x": done}, rollout_id=done - 1)
            run.write_rollout(done, [sample(done)], evaluation="x")
    with RunRecord(run_dir, resume=True) as run:
        run.rewind(2)
        assert [run.has_evaluation(done) for done in range(5)] == [True, False, True, False, False]
        run.log({"rollout/step": 2, "try": 2}, rollout_id=2)
        run.write_rollout(2, [sample(200)])
        run.rewind(3)  # nothing to do
    lines = [line for line in read_metrics(run_dir) if "eval/x" not in line]
    steps = [(line.get("rollout/step"), line.get("try")) for line in lines]
    assert steps == [(None, None), (0, 1), (1, 1), (2, 2)]
    assert recorded_rollouts(run_dir) == [0, 1, 2]
    assert read_rollouts(run_dir, 2)[0].index == 200
    (aside,) = (run_dir / "superseded").iterdir()
    superseded = [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("rollout/step", line.get("eval/x")) for line in superseded] == [2, 3, 4]
    assert sorted(path.name for path in (aside / "rollouts").iterdir()) == [
        "000002.parquet", "000003.parquet", "eval_000004_x.parquet",
    ]  # fmt: skip


def test_a_run_that_had_nothing_to_tell_leaves_its_directory_to_the_next(tmp_path: Path) -> None:
    """Bad input, mended and started again, must not leave a row of numbered directories."""
    for seed in range(3):
        with RunRecord(tmp_path / "r") as run:
            assert run.moved_aside is None
            run.write_config(f"seed: {seed}\n", {"seed": seed})
    assert sorted(p.name for p in (tmp_path / "r").glob("config.yaml*")) == ["config.yaml"]
    assert (tmp_path / "r" / "config.yaml").read_text() == "seed: 2\n"
    (tmp_path / "r" / "failures").mkdir()
    with RunRecord(tmp_path / "r") as run:
        assert run.moved_aside == tmp_path / "r.1", "bundles are worth keeping"


def test_a_directory_that_this_run_reads_is_not_moved(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    with RunRecord(run_dir) as record:
        record.log({"rollout/step": 0})
    (run_dir / "final").mkdir()
    with pytest.raises(RunDirError, match=r"final, which this run reads.*--run-dir.*--load"):
        RunRecord(run_dir, inputs=[run_dir / "final"])
    assert (run_dir / "final").is_dir()
    RunRecord(run_dir, inputs=[tmp_path / "elsewhere"]).close()  # and the lock was let go


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunRecord(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_of_others_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(RunDirError, match=r"config\.yaml that a run would overwrite"):
        RunRecord(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    RunRecord(tmp_path / "r").close()
    (tmp_path / "r" / "schema.json").write_text('{"schema_version": 99}')
    with pytest.raises(RunDirError, match="expected schema version 1, got 99"):
        RunRecord(tmp_path / "r", resume=True)
    with pytest.raises(RunDirError, match="got 99"):
        read_metrics(tmp_path / "r")


# ---- one live run ----------------------------------------------------------------------------------------------

HOLDER = """
import os, signal, sys
from miles.observe.record import RunRecord
run = RunRecord(sys.argv[1])
for number in range(3):
    run.log({"number": number}, rollout_id=number)
os.write(run._metrics._fd, b'{"number": 3, "rollo')   # as if killed in the middle of a line
print("ready", flush=True)
signal.pause()
"""


def test_a_live_run_holds_its_directory_and_a_killed_one_does_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with pytest.raises(RunDirError, match=rf"in use by a live run \(process {holder.pid} on .*--run-dir"):
            RunRecord(run_dir)
        with pytest.raises(RunDirError, match="in use"):
            RunRecord(run_dir, resume=True)
        assert [line["number"] for line in read_metrics(run_dir)] == [0, 1, 2], "readable while the run is going"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert not (run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
    with RunRecord(run_dir, resume=True) as run:
        run.log({"number": 3})
    assert [line["number"] for line in read_metrics(run_dir)] == [0, 1, 2, 3]


def test_the_same_process_cannot_open_it_twice(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "r"), pytest.raises(RunDirError, match=f"process {os.getpid()}"):
        RunRecord(tmp_path / "r")
    RunRecord(tmp_path / "r", resume=True).close()


def test_a_file_left_half_written_is_removed(tmp_path: Path) -> None:
    RunRecord(tmp_path / "r").close()
    left = files.temporary_name(tmp_path / "r" / "rollouts" / "000001.parquet")
    left.write_bytes(b"PAR1 half")
    RunRecord(tmp_path / "r", resume=True).close()
    assert not left.exists()


@pytest.mark.parametrize("tail", [b'{"a": 1', b"x" * 200_000, b"{"])
def test_repair_cuts_only_the_unfinished_line(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + tail)
    log = files.AppendLog(path)
    log.append('{"n": 3}')
    log.close()
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'


WRITER = """
import itertools, sys
from miles.observe.record import RunRecord
from miles.types import Sample
samples = [Sample(index=i, tokens=list(range(200)), response_length=100) for i in range(200)]
with RunRecord(sys.argv[1], resume=True) as run:
    for rollout_id in itertools.count():
        run.log({"rollout/step": rollout_id, "text": "x" * 5000}, rollout_id=rollout_id)
        run.write_rollout(rollout_id, samples)
        run.write_summary({"rollouts": rollout_id, "text": "x" * 50000})
        if rollout_id == 3:
            print("going", flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.031])
def test_kill_9_at_any_moment_leaves_whole_files(tmp_path: Path, delay_s: float) -> None:
    run_dir = tmp_path / "r"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == "going\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    RunRecord(run_dir, resume=True).close()
    steps = [line["rollout/step"] for line in read_metrics(run_dir)]
    assert len(steps) >= 4 and steps == list(range(len(steps)))
    recorded = recorded_rollouts(run_dir)
    assert recorded == list(range(len(recorded))) and len(steps) - len(recorded) <= record.MAX_PENDING + 1
    assert all(len(read_rollouts(run_dir, rollout_id)) == 200 for rollout_id in recorded)
    assert (read_summary(run_dir) or {})["rollouts"] >= 3
    assert not [path for path in run_dir.rglob("*") if files.is_temporary(path)]


# ---- a disk that says no ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda base: (base / "r").write_text("a file"), "A file is in the way"),
        (lambda base: (base / "parent").write_text("a file"), "A file is in the way"),
        (lambda base: (base / "r").symlink_to("/proc/1"), "cannot be written"),
        (lambda base: (base / "r").symlink_to("/nowhere/at/all"), "cannot be written"),
    ],
)
def test_an_impossible_directory_is_answered(tmp_path: Path, make, reason: str) -> None:
    make(tmp_path)
    run_dir = tmp_path / ("parent/r" if (tmp_path / "parent").exists() else "r")
    with pytest.raises(RunDirError, match=rf"{reason}.*--run-dir|--run-dir.*{reason}"):
        RunRecord(run_dir)


def test_permission_denied_names_file_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunDirError, match=r"run\.lock: cannot be written: Permission denied\. Give a directory"):
        RunRecord(tmp_path / "r")


def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    RunRecord(run_dir).close()
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    message = r"metrics\.jsonl: cannot be written: No space left.*Free some space"
    with RunRecord(run_dir, resume=True) as run, pytest.raises(RunDirError, match=message):
        run.log({"a": 1})


def full(path: Path) -> Path:
    """Make the next atomic write of `path` meet a full disk."""
    files.temporary_name(path).symlink_to("/dev/full")
    return path


def test_a_full_disk_under_the_summary_keeps_the_old_one(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "r") as run:
        run.write_summary({"rollouts": 1})
        full(run.path / "summary.json")
        with pytest.raises(RunDirError, match=r"summary\.json: cannot be written: No space left"):
            run.write_summary({"rollouts": 2})
    assert read_summary(tmp_path / "r") == {"rollouts": 1}
    assert not [path for path in (tmp_path / "r").iterdir() if files.is_temporary(path)]


def test_a_full_disk_under_a_rollout_is_raised_by_a_later_call(tmp_path: Path) -> None:
    message = r"000003\.parquet: cannot be written: No space left"
    with pytest.raises(RunDirError, match=message), RunRecord(tmp_path / "r") as run:
        full(run.path / "rollouts" / "000003.parquet")
        run.write_rollout(3, [sample()])
    run = RunRecord(tmp_path / "r", resume=True)  # closed and unlocked all the same
    assert recorded_rollouts(run.path) == []
    full(run.path / "rollouts" / "000004.parquet")
    run.write_rollout(4, [sample()])
    with pytest.raises(RunDirError, match=r"000004\.parquet"):
        run.flush()
    run.write_rollout(5, [sample()])
    run.close()
    run.close()
    assert recorded_rollouts(tmp_path / "r") == [5]


def test_the_first_error_of_a_run_is_the_one_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, RunRecord(tmp_path / "r") as run:
        full(run.path / "rollouts" / "000000.parquet")
        run.write_rollout(0, [sample()])
        raise ZeroDivisionError("the plug-in's own error")
    assert "000000.parquet" in caught.value.__notes__[0]


LIMITED = """
import resource, sys
from pathlib import Path
from miles.errors import RunDirError
from miles.observe.files import AppendLog
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log = AppendLog(Path(sys.argv[1]))
try:
    for number in range(100):
        log.append('{"number": %d}' % number)
except RunDirError as error:
    print(error)
"""


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """The limit falls into the middle of a line: the first part is written, the rest refused."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert "metrics.jsonl: cannot be written: File too large. Free some space" in done.stdout
    lines = path.read_text().split("\n")
    assert lines[-1] == "" and [json.loads(line)["number"] for line in lines[:-1]] == list(range(len(lines) - 1))
    assert len(lines) > 5 and path.stat().st_size < 100


def test_a_background_write_that_falls_behind_holds_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def slow(path: Path, rows: list[object]) -> None:
        time.sleep(0.05)
        written.append(path.name)

    monkeypatch.setattr(record, "_write_rows", slow)
    with RunRecord(tmp_path / "r") as run:
        for rollout_id in range(6):
            run.write_rollout(rollout_id, [sample()])
            assert rollout_id + 1 - len(written) <= record.MAX_PENDING
    assert written == [f"{rollout_id:06d}.parquet" for rollout_id in range(6)]


# ---- metrics lines ---------------------------------------------------------------------------------------------


def test_metrics_are_valid_json_and_come_back(tmp_path: Path) -> None:
    import numpy as np
    import torch

    metrics = {
        "f": 0.5, "i": 3, "np": np.float32(0.25), "t": torch.tensor(2.0), "nan": float("nan"),
        "inf": torch.tensor(float("-inf")), "text": "x\ny\ud800", "list": [1, float("nan")], "none": None,
        "status": Sample.Status.COMPLETED, "flag": True,
    }  # fmt: skip
    with RunRecord(tmp_path / "r") as run:
        run.log(metrics, rollout_id=4)
    (text,) = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=no_constants)["_non_finite"] == {"nan": "nan", "inf": "-inf"}
    (line,) = read_metrics(tmp_path / "r")
    assert line.pop("_time") > 1.7e9
    assert str(line.pop("nan")) == "nan" and line.pop("inf") == float("-inf")
    assert line == {
        "_rollout_id": 4, "f": 0.5, "i": 3, "np": 0.25, "t": 2.0, "text": "x\ny\ud800", "list": [1, None],
        "none": None, "status": "completed", "flag": 1,
    }  # fmt: skip


def test_readers_answer_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is no schema of a run record"):
        read_metrics(tmp_path)
    with RunRecord(tmp_path / "r") as run:
        run.write_rollout(2, [sample()])
        run.write_rollout(3, [sample()])
    assert read_summary(tmp_path / "r") is None
    with pytest.raises(RunDirError, match=r"000009\.parquet: is not recorded. Recorded rollouts: 2 to 3"):
        read_rollouts(tmp_path / "r", 9)
    (tmp_path / "r" / "rollouts" / "000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunDirError, match="no readable Parquet"):
        read_rollouts(tmp_path / "r", 3)
    (tmp_path / "r" / "metrics.jsonl").write_text('{"a": 1}\nrubbish\n{"a": 2}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: expected a JSON object"):
        read_metrics(tmp_path / "r")
