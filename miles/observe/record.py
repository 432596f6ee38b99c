"""The record that a run leaves in its run directory, and reading it back.

    <run-dir>/
      schema.json               version of this layout
      config.yaml, config.json  the resolved settings
      versions.json             Python, libraries, miles, git commit, plug-in sources
      metrics.jsonl             one JSON object per logged step, written through line by line
      rollouts/000017.parquet   the samples of rollout 17
      rollouts/eval_000018_<name>.parquet   the samples of an evaluation after 18 rollouts, that is after rollout 17
      summary.json              the numbers of the finished run
      superseded/run.<n>/       what a resumed run wrote anew: lines and rollouts after the checkpoint
      run.lock                  while a run is alive

Metrics and JSON files are written by the caller's thread. Rollouts are copied in the caller's thread and turned into
columns by one background thread (which also collects the versions), from a queue of at most `MAX_PENDING`: the loop
waits for it only when it falls that far behind. An error there is raised by the next call, or by `close()`. `flush()`
waits for the queue; the run calls it before a checkpoint names a rollout as done.

Each line of metrics.jsonl holds the metrics under their names and three keys of its own: `_time` (unix seconds),
`_rollout_id` (absent where unknown; of an evaluation the rollout that it follows, -1 before training) and
`_non_finite`, which names the metrics that are null because they are NaN or infinite, e.g. `{"train/loss": "nan"}`.

Leaves the numbers to `metrics` and `summary`, other trackers to `tracking`, columns to `rollout_file`.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from miles.errors import RunDirError
from miles.observe import rollout_file
from miles.observe.files import (
    AppendLog,
    disk_errors,
    is_temporary,
    numbered,
    write_atomically,
    write_keeping_old,
)
from miles.observe.jsonable import as_number, dumps, to_jsonable, without_secrets
from miles.observe.lock import LOCK_NAME, RunLock
from miles.types import Sample

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    import pyarrow

SCHEMA_VERSION = 1
# Rollouts that may wait for the background thread; each holds one rollout's samples in memory.
MAX_PENDING = 2

_OWN_FILES = ("schema.json", "config.yaml", "config.json", "versions.json", "metrics.jsonl", "summary.json")
_ROLLOUTS = "rollouts"
_ROLLOUT_NAME = re.compile(r"(eval_)?(\d+)(?:_.*)?\.parquet")


def rollout_file_name(rollout_id: int, evaluation: str | None = None) -> str:
    """`000017.parquet`, or `eval_000017_<name>.parquet` with the characters that file names dislike replaced.

    Rollouts count from 0. The number of an evaluation is how many rollouts came before it: 0 is before training.
    """
    if evaluation is None:
        return f"{rollout_id:06d}.parquet"
    return f"eval_{rollout_id:06d}_{re.sub(r'[^A-Za-z0-9._-]', '_', evaluation)}.parquet"


class RunRecord:
    """The run directory of one live run, locked against a second one.

    A directory that already holds a record is continued with `resume=True`; otherwise it is moved aside as
    `<dir>.1`, `<dir>.2`, ... (`moved_aside` says where) and a fresh one is made, unless the run that wrote it ended
    before it had anything to tell. Files that are no record stay where they are. `inputs` are paths that this run reads
    (model, checkpoint): a directory that holds one is not moved.

    Raises RunDirError, here and from every method, when the directory cannot be used: not a directory, not writable, no
    space left, in use by a live run.

    Example::

        with RunRecord("runs/quickstart") as record:
            record.write_config({"lr": 1.5e-4})
            record.log({"rollout/step": 0, "rollout/raw_reward": 0.27}, rollout_id=0)
            record.write_rollout(0, samples)
            record.write_summary({"rollouts": 1})
    """

    def __init__(self, run_dir: str | Path, *, resume: bool = False, inputs: Iterable[str | Path] = ()) -> None:
        self.path = Path(run_dir).absolute()
        self.moved_aside: Path | None = None
        self._mutex = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.path)
        try:
            if not resume and is_record(self.path):
                if _is_blank(self.path):
                    _forget_blank(self.path)
                else:
                    self._move_aside([Path(path).resolve() for path in inputs])
            self._open_directory()
        except BaseException:
            self._lock.release()
            raise

    def _move_aside(self, inputs: Sequence[Path]) -> None:
        real = self.path.resolve()
        for path in inputs:
            if path == real or real in path.parents:
                raise RunDirError(
                    f"{self.path}: holds an earlier run and {path}, which this run reads, so it cannot be moved aside. "
                    "Give another directory with --run-dir, or resume that run with --load."
                )
        aside = numbered(self.path)
        with disk_errors(self.path):
            os.rename(self.path, aside)
            self._lock.release(aside)
            self.path.mkdir()
        self.moved_aside = aside
        self._lock = RunLock(self.path)

    def _open_directory(self) -> None:
        if is_record(self.path):
            check_schema(self.path)
        else:
            for name in _OWN_FILES:
                if os.path.lexists(self.path / name):
                    raise RunDirError(
                        f"{self.path}: is no run directory, but has a {name} that a run would overwrite. "
                        "Give another directory with --run-dir, or move that file."
                    )
            write_atomically(self.path / "schema.json", dumps({"schema_version": SCHEMA_VERSION}, indent=2) + "\n")
        rollouts = self.path / _ROLLOUTS
        with disk_errors(rollouts):
            rollouts.mkdir(exist_ok=True)
            for left_over in filter(is_temporary, [*self.path.iterdir(), *rollouts.iterdir()]):
                left_over.unlink()
        self._metrics = AppendLog(self.path / "metrics.jsonl")

    # ---- writing -----------------------------------------------------------------------------------------------

    def write_config(self, as_yaml: str, resolved: Mapping[str, Any]) -> None:
        """`config.yaml`, which `--config` takes, and `config.json` with every value and where it came from.

        A resumed run with other settings keeps the former files as `config.yaml.1` and so on.
        """
        write_keeping_old(self.path / "config.yaml", as_yaml)
        write_keeping_old(self.path / "config.json", dumps(to_jsonable(without_secrets(resolved)), indent=2) + "\n")

    def prepare(self) -> None:
        """Import the Parquet writer in the background now, and not while the first rollout is being trained on."""
        with self._mutex:
            self._submit(_import_writer)

    def write_versions(self, plugins: Mapping[str, Any] | None = None) -> None:
        """`versions.json`; `plugins` holds what identifies the plug-ins' sources, see `versions.source_hashes`."""
        with self._mutex:
            self._submit(_write_versions, self.path / "versions.json", dict(plugins or {}))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """`summary.json`, whole or not at all."""
        write_atomically(self.path / "summary.json", dumps(summary, indent=2) + "\n")

    def log(self, metrics: Mapping[str, Any], *, rollout_id: int | None = None) -> None:
        """Append one line to metrics.jsonl; it is with the operating system when this returns. Any thread may call.

        Numbers of numpy and torch become plain ones, NaN and infinities null (named in `_non_finite`).
        """
        line: dict[str, Any] = {"_time": round(time.time(), 3)}
        if rollout_id is not None:
            line["_rollout_id"] = rollout_id
        non_finite = {}
        for key, value in metrics.items():
            number = as_number(value)
            line[key] = to_jsonable(value if number is None else number)
            if line[key] is None and number is not None:
                non_finite[key] = str(number)
        if non_finite:
            line["_non_finite"] = non_finite
        with self._mutex:
            self._raise_finished()
            self._metrics.append(json.dumps(line, allow_nan=False))

    def write_rollout(
        self,
        rollout_id: int,
        samples: Iterable[Any],
        *,
        dropped: Iterable[Any] = (),
        evaluation: str | None = None,
    ) -> None:
        """Record the samples of a rollout, or of the evaluation called `evaluation` after `rollout_id` rollouts.

        `samples` and `dropped` (generated, but not trained: the column `kept` is false) are samples or nested groups
        of them. They are copied before this returns.
        """
        rows = [rollout_file.row_of(sample, kept=True) for sample in rollout_file.flatten(samples)]
        rows += [rollout_file.row_of(sample, kept=False) for sample in rollout_file.flatten(dropped)]
        path = self.path / _ROLLOUTS / rollout_file_name(rollout_id, evaluation)
        with self._mutex:
            self._submit(_write_rows, path, rows)

    def has_evaluation(self, done: int) -> bool:
        """Whether an evaluation after `done` rollouts was logged."""
        return any(
            line.get("_rollout_id") == done - 1 and any(key.startswith("eval/") for key in line)
            for line in read_metrics(self.path)
        )

    def rewind(self, rollout_id: int) -> None:
        """Continue with `rollout_id`: what the record holds of it and of later rollouts moves to `superseded/run.<n>/`.

        A resumed run calls this with its first rollout, so that metrics.jsonl counts no rollout twice.
        """
        self.flush()
        metrics = self.path / "metrics.jsonl"
        with self._mutex, disk_errors(metrics):
            lines = metrics.read_text().splitlines(keepends=True)
            late = [line for line in lines if json.loads(line).get("_rollout_id", -1) >= rollout_id]
            files = [path for path in (self.path / _ROLLOUTS).iterdir() if _rollout_id_of(path) >= rollout_id]
            if not late and not files:
                return
            (self.path / "superseded").mkdir(exist_ok=True)
            aside = numbered(self.path / "superseded" / "run")
            (aside / _ROLLOUTS).mkdir(parents=True)
            write_atomically(aside / "metrics.jsonl", "".join(late))
            dropped = set(late)
            self._metrics.close()
            write_atomically(metrics, "".join(line for line in lines if line not in dropped))
            self._metrics = AppendLog(metrics)
            for path in files:
                os.replace(path, aside / _ROLLOUTS / path.name)

    def _submit(self, work: Callable[..., None], *given: Any) -> None:
        """Queue `work` for the background thread; wait while more than MAX_PENDING are queued."""
        self._raise_finished()
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="miles-record")
        self._pending.append(self._executor.submit(work, *given))
        while len(self._pending) > MAX_PENDING:
            self._pending.pop(0).result()

    # ---- the end -----------------------------------------------------------------------------------------------

    def _raise_finished(self) -> None:
        """Take finished writes off the list; raise the error of one that failed."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def flush(self) -> None:
        """Wait until every rollout given so far is in its file."""
        with self._mutex:
            while self._pending:
                self._pending.pop(0).result()

    def close(self) -> None:
        """Finish all writes and unlock the directory; twice does no harm. Raises what a write in the background met."""
        try:
            self.flush()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._metrics.close()
            self._lock.release()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as also:  # the first error ends the run; the second is told with it
            error.add_note(f"While closing the run record: {also}")


def _write_rows(path: Path, rows: list[rollout_file.Row]) -> None:
    write_atomically(path, bytes(rollout_file.encode(rows)))


def _import_writer() -> None:
    import pyarrow.parquet  # noqa: F401


def _write_versions(path: Path, plugins: dict[str, Any]) -> None:
    from miles.observe.versions import collect_versions

    write_keeping_old(path, dumps(collect_versions(plugins), indent=2) + "\n")


def _rollout_id_of(path: Path) -> int:
    """The rollout that a file is of; of an evaluation's file the one that it follows, -1 before training."""
    match = _ROLLOUT_NAME.fullmatch(path.name)
    if match is None:
        return -1
    return int(match[2]) - (match[1] is not None)


# ---- reading ---------------------------------------------------------------------------------------------------


def is_record(run_dir: str | Path) -> bool:
    """Whether a run was recorded in this directory."""
    return (Path(run_dir) / "schema.json").is_file()


def _is_blank(run_dir: Path) -> bool:
    """Whether the run of this record ended before its first result: bad input, most of the time."""
    told = [run_dir / "metrics.jsonl", run_dir / "summary.json", run_dir / "failures"]
    return not any(p.is_dir() or (p.exists() and p.stat().st_size > 0) for p in told) and not any(
        (run_dir / _ROLLOUTS).glob("*.parquet")
    )


def _forget_blank(run_dir: Path) -> None:
    with disk_errors(run_dir):
        for name in _OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)


def check_schema(run_dir: str | Path) -> None:
    """Raise RunDirError unless the record was written in a layout that this version knows."""
    path = Path(run_dir) / "schema.json"
    try:
        version = json.loads(path.read_text())["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path}: is no schema of a run record. Give a directory that a run has written.") from error
    if version != SCHEMA_VERSION:
        raise RunDirError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {version!r}. "
            "Use the version of miles that wrote this run (versions.json names it)."
        )


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as dicts, oldest first, NaN and infinities restored.

    A last line that is still being written, or was cut short, is left out. Works while the run is going.
    Raises RunDirError for a directory without a record, or a damaged line in the middle.
    """
    check_schema(run_dir)
    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}.") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RunDirError(f"{path}:{number}: expected a JSON object. Mend or delete the line.") from error
        entry |= {key: float(text) for key, text in entry.pop("_non_finite", {}).items()}
        metrics.append(entry)
    return metrics


def recorded_rollouts(run_dir: str | Path) -> list[int]:
    """The rollouts whose samples are recorded, rising."""
    names = os.listdir(Path(run_dir) / _ROLLOUTS)
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)\.parquet", name)))


def read_rollout_table(run_dir: str | Path, rollout_id: int, *, evaluation: str | None = None) -> pyarrow.Table:
    """The samples of a rollout as columns (see `rollout_file`). Raises RunDirError when it is not recorded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_schema(run_dir)
    path = Path(run_dir) / _ROLLOUTS / rollout_file_name(rollout_id, evaluation)
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        known: list[int] = []
        with suppress(OSError):
            known = recorded_rollouts(run_dir)
        hint = f"Recorded rollouts: {known[0]} to {known[-1]}." if known else "No rollout is recorded there."
        raise RunDirError(f"{path}: is not recorded. {hint}") from None
    except (OSError, pa.ArrowException) as error:
        raise RunDirError(f"{path}: is no readable Parquet file ({error}).") from error


def read_rollouts(
    run_dir: str | Path, rollout_id: int, *, evaluation: str | None = None, kept_only: bool = False
) -> list[Sample]:
    """The samples of a rollout as they were recorded; `kept_only` leaves out the dropped ones.

    With `evaluation`, those of the evaluation of that name after `rollout_id` rollouts (0: before training).

    Differences to the samples of the run: no media, log-probs rounded to float32, tensors in undeclared attributes as
    lists. Raises RunDirError when the rollout is not recorded.
    """
    rows = read_rollout_table(run_dir, rollout_id, evaluation=evaluation).to_pylist()
    return [rollout_file.sample_of(row) for row in rows if row["kept"] or not kept_only]


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """The content of summary.json; None for a run that has not finished."""
    check_schema(run_dir)
    path = Path(run_dir) / "summary.json"
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


__all__ = [
    "LOCK_NAME",
    "SCHEMA_VERSION",
    "RunRecord",
    "check_schema",
    "is_record",
    "read_metrics",
    "read_rollout_table",
    "read_rollouts",
    "read_summary",
    "recorded_rollouts",
    "rollout_file_name",
]
