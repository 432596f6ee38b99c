"""A run that was interrupted ends like one that was not: bitwise, whatever moment it was killed at."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from e2e_runs import (
    HELDOUT,
    data_state,
    exported,
    flags,
    latest,
    metrics,
    miles,
    moments,
    plug_in,
    same,
    saving,
    started,
    summary,
    train,
    unclocked,
    weights,
)

from miles.observe.record import read_metrics, read_rollouts, recorded_rollouts

ROLLOUTS = 4

# What makes a difference between a run and its continuation, with the flags that switch it on.
VARIANTS = {
    "plain": ("--rollout-shuffle", "--lr-decay-style", "cosine", "--lr-decay-iters", 8, "--lr-warmup-iters", 5),
    # Groups that are cut short, kept in the buffer, and finished in the next rollout.
    "buffer": ("--partial-rollout", "--over-sampling-batch-size", 7, "--custom-rm-path", plug_in("digits")),
    # A reward with state of its own.
    "plug-in": ("--custom-rm-path", plug_in("Curriculum")),
    # The class of the other rollout tree.
    "class": ("--rollout-function-path", plug_in("RolloutClass"), "--partial-rollout", "--over-sampling-batch-size", 6),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_straight(variant: str, tmp_path: Path) -> None:
    more = VARIANTS[variant]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(straight, *saving(straight), *more, "--num-rollout", ROLLOUTS)
    train(halves, *saving(halves), *more, "--num-rollout", 2)
    assert not same(weights(straight), weights(halves))
    train(halves, *saving(halves), *more, "--num-rollout", ROLLOUTS, "--load", halves / "ck")
    assert_equal_ends(straight, halves)
    assert unclocked(straight, first=2) == unclocked(halves, first=2)
    if variant in ("buffer", "class"):
        waiting = [len(data_state(straight, i)["buffer"]) for i in range(ROLLOUTS)]
        assert waiting[1] > 0, "the buffer was empty at the stop: nothing is shown"


def assert_equal_ends(a: Path, b: Path) -> None:
    assert same(weights(a), weights(b))
    assert same(moments(a), moments(b))
    assert same(exported(a), exported(b))
    assert data_state(a, ROLLOUTS - 1) == data_state(b, ROLLOUTS - 1)
    assert recorded_rollouts(b) == [*range(ROLLOUTS)]
    meta_a, meta_b = (json.loads((latest(run) / "meta.json").read_text()) for run in (a, b))
    assert {**meta_a, "timestamp": 0} == {**meta_b, "timestamp": 0}


def test_a_resumed_run_ends_with_a_whole_summary(tmp_path: Path) -> None:
    """Curve, first evaluation and the evaluation that the kill prevented: all there at the end."""
    dataset = {"name": "greedy", "path": f"{HELDOUT}@[0:8]", "temperature": 0.0}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"datasets": [dataset]}))
    run, evaluation = tmp_path / "run", ("--eval-interval", 2, "--eval-config", tmp_path / "eval.yaml")
    train(run, *saving(run), *evaluation, "--num-rollout", 2)
    # As if killed after the checkpoint, before the evaluation that follows it.
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval/greedy" in lines[-1]
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    train(run, *saving(run), *evaluation, "--num-rollout", 3, "--load", run / "ck")
    assert [*metrics(run, "rollout/raw_reward")] == [0, 1, 2]
    assert [line["_rollout_id"] for line in read_metrics(run) if "eval/greedy" in line] == [-1, 1]
    assert summary(run)["eval_before"] == {"greedy": 0.0} and summary(run)["eval_after"].keys() == {"greedy"}


def test_resuming_what_is_finished_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", *saving(tmp_path / "run"), "--num-rollout", 2)
    before, numbers, lines = exported(run), summary(run), (run / "metrics.jsonl").read_text()
    for _ in range(2):
        train(run, *saving(run), "--num-rollout", 2, "--load", run / "ck")
    assert "has all 2 rollouts already. Raise --num-rollout" in capsys.readouterr().out
    assert same(before, exported(run)) and numbers == summary(run) and lines == (run / "metrics.jsonl").read_text()


def test_resuming_twice(tmp_path: Path) -> None:
    """What a resumed run left, resumed again; and the same checkpoint resumed a second time."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(straight, *saving(straight), "--num-rollout", ROLLOUTS)
    for done in (1, 2, ROLLOUTS):
        train(run, *saving(run), "--num-rollout", done, *(() if done == 1 else ("--load", run / "ck")))
    assert_equal_ends(straight, run)
    (run / "ck" / "latest_checkpointed_iteration.txt").write_text("2\n")
    train(run, *saving(run), "--num-rollout", ROLLOUTS, "--load", run / "ck")
    assert_equal_ends(straight, run)
    # The record of the rollouts that were done anew is kept, and counts no rollout twice.
    assert [*metrics(run, "rollout/raw_reward")] == [0, 1, 2, 3]
    assert (run / "superseded" / "run.1" / "rollouts" / "000002.parquet").exists()


def test_load_and_save_of_one_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command line for the first start and for every resume."""
    run = tmp_path / "run"
    both = (*saving(run), "--load", run / "ck")
    train(run, *both, "--num-rollout", 1)
    assert f"--load {run / 'ck'} holds no checkpoint yet: starting from --hf-checkpoint" in capsys.readouterr().out
    train(run, *both, "--num-rollout", 2)
    assert f"resuming from {run / 'ck' / 'iter_0000001'}: rollout 1 is next" in capsys.readouterr().out


def test_a_run_that_died_before_its_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again starts anew, although the folder of --load is inside the run directory."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(run, "--num-rollout", 1)
    train(run, *saving(run), "--load", run / "ck", "--num-rollout", 2)
    assert f"{run} held an earlier run, which is now {run}.1" in capsys.readouterr().out
    train(straight, *saving(straight), "--num-rollout", 2)
    assert same(weights(straight), weights(run)) and recorded_rollouts(run) == [0, 1]


def test_a_run_directory_with_the_data_of_the_run_is_not_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", "--num-rollout", 1, "--save-debug-rollout-data", "{run_dir}/dump/{rollout_id}.pt")
    train(run, "--num-rollout", 1, "--load-debug-rollout-data", run / "dump" / "{rollout_id}.pt", status=2)
    assert "cannot be moved aside. Give another directory with --run-dir" in capsys.readouterr().err
    assert (run / "dump" / "0.pt").exists()


def test_saving_without_an_interval_saves_the_end(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--save", tmp_path / "run" / "ck", "--num-rollout", 2)
    assert latest(run).name == "iter_0000002"
    assert not (run / "ck" / "iter_0000001").exists()


def test_resume_into_another_run_directory(tmp_path: Path) -> None:
    straight, first, second = (tmp_path / name for name in ("straight", "first", "second"))
    train(straight, *saving(straight), "--num-rollout", ROLLOUTS)
    train(first, *saving(first), "--num-rollout", 2)
    train(second, *saving(second), "--num-rollout", ROLLOUTS, "--load", first / "ck")
    assert same(weights(straight), weights(second))
    assert recorded_rollouts(second) == [2, 3]


def test_data_continues_without_a_trainer(tmp_path: Path) -> None:
    """`--debug-rollout-only --load` takes the prompts that would be next."""
    run, probe = tmp_path / "run", tmp_path / "probe"
    train(run, *saving(run), "--num-rollout", 3)
    (run / "ck" / "latest_checkpointed_iteration.txt").write_text("2\n")
    train(probe, "--load", run / "ck", "--num-rollout", 3, "--debug-rollout-only")
    assert recorded_rollouts(probe) == [2]
    assert [s.prompt for s in read_rollouts(probe, 2)] == [s.prompt for s in read_rollouts(run, 2)]


# ---- a part of it --------------------------------------------------------------------------------------------------


def test_finetuning_takes_the_weights_and_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    train(first, *saving(first), "--num-rollout", 2)
    train(tuned, *saving(tuned), "--load", first / "ck", "--finetune", "--num-rollout", 1, "--lr", 0)
    said = capsys.readouterr().out
    assert "optimizer, random generators and data begin anew (--finetune): rollout 0 is next" in said
    assert same(weights(first), weights(tuned))
    assert recorded_rollouts(tuned) == [0] and data_state(tuned, 0) == data_state(first, 0)
    meta = json.loads((latest(tuned) / "meta.json").read_text())
    assert (meta["iteration"], meta["global_step"], meta["weight_version"]) == (1, 2, 2)


def test_without_the_optimizer(tmp_path: Path) -> None:
    """Weights and position go on; moments and the schedule begin."""
    run = tmp_path / "run"
    train(run, *saving(run), "--num-rollout", 1, "--lr-warmup-iters", 4)
    train(run, *saving(run), "--num-rollout", 2, "--lr-warmup-iters", 4, "--load", run / "ck", "--no-load-optim")
    assert recorded_rollouts(run) == [0, 1]
    assert [metrics(run, "train/lr-pg_0")[step] for step in (0, 1, 2, 3)] == pytest.approx([5e-5, 1e-4, 5e-5, 1e-4])
    assert json.loads((latest(run) / "meta.json").read_text())["global_step"] == 4


def test_without_random_generators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(run, *saving(run), "--num-rollout", 1, "--no-save-rng")
    assert not (latest(run) / "rng.pt").exists()
    train(run, *saving(run), "--num-rollout", 2, "--load", run / "ck", status=2)
    assert "rng.pt cannot be read" in capsys.readouterr().err
    train(run, *saving(run), "--num-rollout", 2, "--load", run / "ck", "--no-load-rng")
    assert recorded_rollouts(run) == [0, 1]


# ---- who is told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [(), ("--async-save",)], ids=["at once", "async"])
def test_the_post_save_hook_is_told_what_is_in_force(background: tuple[str, ...], tmp_path: Path) -> None:
    run, hf = tmp_path / "run", tmp_path / "hf_{rollout_id}"
    hook = ("--custom-megatron-post-save-hook-path", plug_in("note_saved"), "--save-hf", hf)
    train(run, *saving(run), "--num-rollout", 2, *hook, *background)
    assert (run / "saved_0.txt").read_text().splitlines() == [
        f"{i} iter_{i + 1:07d} {i + 1} True {tmp_path / f'hf_{i}'} True" for i in range(2)
    ]


def test_a_post_save_hook_that_fails_ends_the_run_with_its_checkpoint_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hook = tmp_path / "run", ("--custom-megatron-post-save-hook-path", plug_in("fails_after_a_save"))
    train(run, *saving(run), "--num-rollout", 2, *hook, status=1)
    assert "nobody takes iter_0000001" in capsys.readouterr().err
    assert latest(run).name == "iter_0000001" and not [*(run / "ck").glob(".*")]
    drop = ("--hook-policy", "custom-megatron-post-save-hook=drop")
    train(run, *saving(run), "--num-rollout", 2, *hook, *drop, "--load", run / "ck")
    assert latest(run).name == "iter_0000002"


# ---- damage --------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _other_architecture(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = root / "iter_0000001" / "model" / "model.safetensors"
    tensors = {name: tensor[..., :16].contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "model cut short": (lambda r: _cut(r / "iter_0000001/model/model.safetensors"), "model.safetensors cannot be read"),
    "optimizer cut short": (
        lambda r: _cut(r / "iter_0000001/optimizer/optimizer.safetensors"),
        "optimizer.safetensors cannot be read",
    ),
    "schedule gone": (
        lambda r: (r / "iter_0000001/lr_scheduler/lr_scheduler.safetensors").unlink(),
        "lr_scheduler.safetensors cannot be read",
    ),
    "random generators": (lambda r: _cut(r / "iter_0000001/rng.pt"), "rng.pt cannot be read"),
    "random generators gone": (lambda r: (r / "iter_0000001/rng.pt").unlink(), "rng.pt cannot be read"),
    "meta": (lambda r: (r / "iter_0000001/meta.json").write_text("{}"), "meta.json is damaged"),
    "folder gone": (lambda r: shutil.rmtree(r / "iter_0000001"), "meta.json does not exist. Folders there: none"),
    "tracker": (lambda r: (r / "latest_checkpointed_iteration.txt").write_text("x"), "expected the number of a check"),
    "plug-in state": (lambda r: _cut(r / "rollout/plug_ins_0.pt"), "plug_ins_0.pt cannot be read"),
    "data position": (
        lambda r: _cut(r / "rollout/global_dataset_state_dict_0.pt"),
        "not readable as the state of a data source",
    ),
    "another architecture": (_other_architecture, "the checkpoint is of another architecture than --hf-checkpoint"),
}


@pytest.fixture(scope="module")
def one_rollout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damage") / "run"
    return train(run, *saving(run), "--num-rollout", 1, *VARIANTS["plug-in"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(
    damage: str, one_rollout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, says = DAMAGE[damage]
    shutil.copytree(one_rollout / "ck", tmp_path / "ck")
    break_it(tmp_path / "ck")
    again = flags(tmp_path / "run", *VARIANTS["plug-in"], "--num-rollout", 2, "--load", tmp_path / "ck")
    assert miles("train", *again) == 2
    error = capsys.readouterr().err
    assert error.startswith("miles: ") and says in error and str(tmp_path / "ck") in error


# ---- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kill") / "run"
    return train(run, *saving(run), *VARIANTS["buffer"], "--num-rollout", KILLED_RUN)


KILLED_RUN = 12


def in_a_save(run: Path) -> bool:
    """A checkpoint that is being written, not the first."""
    return any(path.name.startswith(".iter_") and "0000001" not in path.name for path in (run / "ck").glob(".*"))


MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "just after the first checkpoint": (lambda run: (run / "ck" / "latest_checkpointed_iteration.txt").exists(), 0.0),
    "in a later rollout": (lambda run: (run / "rollouts" / "000002.parquet").exists(), 0.03),
    "in a save": (in_a_save, 0.0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_never_killed(moment: str, never_killed: Path, tmp_path: Path) -> None:
    happened, delay_s = MOMENTS[moment]
    more = (*VARIANTS["buffer"], "--num-rollout", KILLED_RUN)
    with started(tmp_path / "run", *saving(tmp_path / "run"), *more) as run:
        run.wait_until(lambda: happened(run.run_dir))
        time.sleep(delay_s)
        run.send(signal.SIGKILL)
        assert run.ends(10) == -signal.SIGKILL
    done = int((run.run_dir / "ck" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= done < KILLED_RUN, "killed too late to show anything"
    train(run.run_dir, *saving(run.run_dir), *more, "--load", run.run_dir / "ck")
    assert same(weights(never_killed), weights(run.run_dir))
    assert same(moments(never_killed), moments(run.run_dir))
    assert data_state(never_killed, KILLED_RUN - 1) == data_state(run.run_dir, KILLED_RUN - 1)
    assert recorded_rollouts(run.run_dir) == [*range(KILLED_RUN)]
    assert unclocked(never_killed) == unclocked(run.run_dir)
    # Nothing half written is left behind.
    assert not [*(run.run_dir / "ck").glob(".*")]
