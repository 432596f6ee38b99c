"""Commands run in this process, and a run directory without a run."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from miles.__main__ import main
from miles.config import parse
from miles.config.dump import as_yaml, resolved
from miles.observe.record import RunRecord
from miles.trial.material import made_up

ROOT = Path(__file__).resolve().parents[3]
PLUG_INS = Path(__file__).with_name("trial_plug_ins.py")
FLAGS = [
    "--hf-checkpoint", str(ROOT / "examples/quickstart/base"),
    "--prompt-data", str(ROOT / "examples/quickstart/data/train.jsonl"),
    "--input-key", "prompt", "--label-key", "label",
    "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-rollout", "1", "--global-batch-size", "16",
    "--rm-type", "f1",
]  # fmt: skip


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    def row(self, flag: str) -> str:
        """The line of one plug-in in a table, its columns two spaces apart."""
        line = next(line for line in self.out.splitlines() if line.startswith(f"{flag} "))
        return "  ".join(cell.strip() for cell in line.split("  ") if cell.strip())

    @property
    def warnings(self) -> list[str]:
        return [line.partition("): ")[2] for line in self.out.splitlines() if line.startswith("warning: ")]


def run(*words: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(words))
    return Ran(status, out.getvalue(), err.getvalue())


def path_of(name: str) -> str:
    return f"{PLUG_INS}:{name}"


def check(flag: str, name: str, *more: str) -> Ran:
    return run("check", *FLAGS, flag, path_of(name), *more)


def record(folder: Path, *more: str) -> Path:
    """A run directory of two rollouts and an evaluation, with made-up samples and masks with gaps."""
    config, args = parse([*FLAGS, "--run-dir", str(folder), *more])
    groups = made_up(args).groups
    for group in groups:
        group[1].loss_mask = [i % 2 for i in range(group[1].response_length)]
        group[1].marked_by_a_plug_in = [1, 2]  # type: ignore[attr-defined]
    with RunRecord(folder) as written:
        written.write_config(as_yaml(config), resolved(config, args))
        for rollout_id in range(2):
            written.write_rollout(rollout_id, groups)
        written.write_rollout(1, groups[0], evaluation="held out")
    return folder
