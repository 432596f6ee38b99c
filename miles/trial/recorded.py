"""What a run directory says about its run, for trials: the `args` that its plug-ins had, its rollouts, its evaluations.

Nothing is resolved or checked again: the settings are those of `config.json`, wherever their files are by now.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from miles.config.evaluation import EvalDatasetConfig
from miles.config.sections import FLAGS
from miles.errors import RunDirError, UsageError
from miles.observe.record import check_schema, read_rollouts, recorded_rollouts, rollout_file_name
from miles.types import Group, Sample, is_failed

_EVALUATION = re.compile(r"eval_(\d+)_(.*)\.parquet")


def recorded_args(run_dir: str | Path) -> Namespace:
    """The `args` of the run's plug-ins: flags, settings of plug-ins, derived ones. Secrets are None.

    Raises RunDirError where there is no record.
    """
    path = Path(run_dir) / "config.json"
    require_record(run_dir)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        flags = {name: entry["value"] for section in content["flags"].values() for name, entry in section.items()}
        extras = {name: entry["value"] for name, entry in content["extras"].items()}
        datasets = [EvalDatasetConfig(**entry) for entry in content["eval_datasets"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path}: expected the settings of a run ({type(error).__name__}: {error}).") from error
    secrets = {name: None for name, flag in FLAGS.items() if flag.secret}
    return Namespace(**{**flags, **secrets, "eval_datasets": datasets, **content["args"], **extras})


def require_record(run_dir: str | Path) -> None:
    """Raise RunDirError unless a run was recorded there."""
    path = Path(run_dir)
    if not path.is_dir():
        raise RunDirError(f"--on {run_dir}: there is no such folder. Expected a run directory (--run-dir of a run).")
    check_schema(path)


def choose_rollout(run_dir: str | Path, wanted: int | None) -> int:
    """`wanted`, or the newest rollout. Raises RunDirError where there is none, UsageError for one that is not there."""
    require_record(run_dir)
    known = recorded_rollouts(run_dir)
    if not known:
        raise RunDirError(f"--on {run_dir}: no rollout is recorded there yet.")
    if wanted is None:
        return known[-1]
    if wanted not in known:
        raise UsageError(f"--rollout {wanted}: {run_dir} has the rollouts {known[0]} to {known[-1]}.")
    return wanted


def recorded_groups(run_dir: str | Path, rollout_id: int) -> list[Group]:
    """The groups of one rollout, in the order of the record. Samples whose score had failed are left out."""
    groups: dict[Any, Group] = {}
    for position, sample in enumerate(read_rollouts(run_dir, rollout_id)):
        key = ("alone", position) if sample.group_index is None else sample.group_index
        if not is_failed(sample):
            groups.setdefault(key, []).append(sample)
    return list(groups.values())


def recorded_evaluation(
    run_dir: str | Path, done: int | None, names: list[str]
) -> tuple[int, dict[str, list[Sample]]] | None:
    """(rollouts before it, data set -> samples) of the evaluation after `done` rollouts, or of the newest one.

    `names` are those of the run's data sets: files spell some characters differently. None where nothing is recorded.
    """
    found = [m for p in (Path(run_dir) / "rollouts").iterdir() if (m := _EVALUATION.fullmatch(p.name)) is not None]
    numbers = {int(match[1]) for match in found}
    if not numbers or (done is not None and done not in numbers):
        return None
    number = max(numbers) if done is None else done
    spelled = {rollout_file_name(number, name): name for name in names}
    data = {}
    for match in sorted(found, key=lambda m: m.string):
        if int(match[1]) == number:
            name = spelled.get(match.string, match[2])
            data[name] = read_rollouts(run_dir, number, evaluation=match[2])
    return number, data
