"""Ranks of Megatron that fail, die or break something while the others wait for them in a collective.

Samples are made by a rollout function, so that no engine takes part and every step has a gradient.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from rank_programs import ROOT
from rank_runs import (
    PLUG_INS,
    SECONDS_TO_END,
    START_TIMEOUT_S,
    nobody_left,
    ranks_left,
    train,
    wait_until,
    waiting,
)
from safetensors.torch import load_file, save_file

from miles.observe.record import read_metrics

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

MEGATRON = ("--train-backend", "megatron", "--distributed-timeout-minutes", 2)
SAMPLES = f"{ROOT / 'tests' / 'e2e' / 'bad_batches.py'}:good"
NO_ENGINE = ("--debug-train-only", "--rollout-function-path", SAMPLES, "--rollout-batch-size", 2, "--num-rollout", 1)
LAYOUTS: dict[str, tuple[object, ...]] = {
    "data": ("--actor-num-gpus-per-node", 2),
    "tensor": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 2),
    "context": ("--context-parallel-size", 2),
}
STEP_HOOK = "--custom-megatron-before-train-step-hook-path"


def start(run_dir: Path, layout: str, *more: object, post: str = "counter") -> int:
    return train(run_dir, post, *MEGATRON, *LAYOUTS[layout], *NO_ENGINE, *more)


def step_hook(name: str) -> tuple[str, str]:
    return STEP_HOOK, f"{PLUG_INS}:{name}"


@pytest.fixture(scope="module")
def whole_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model in float32, whose export shows every bit of the weights."""
    folder = tmp_path_factory.mktemp("models") / "float32"
    shutil.copytree(ROOT / "examples" / "quickstart" / "base", folder)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unchanged(run_dir: Path, folder: Path) -> bool:
    after, before = (load_file(at / "model.safetensors") for at in (run_dir / "model", folder))
    return after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)


# ---- a rank that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "rank"), [("tensor", 1), ("pipeline", 0), ("pipeline", 1), ("context", 1)])
def test_a_hook_that_fails_on_one_rank_ends_all_at_once(
    layout: str, rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert start(run_dir, layout, *step_hook(f"step_fails_on_rank_{rank}")) == 1
    assert time.time() - (run_dir / "failed").stat().st_mtime < SECONDS_TO_END
    text = capfd.readouterr().err
    assert text.count("miles: ") == 1 and text.count(f"ZeroDivisionError: rank {rank} divides") == 1
    assert "rank_plug_ins.py:" in text and "Traceback" not in text
    assert [path.name for path in (run_dir / "failures").iterdir()] == [f"rank_{rank}"]
    assert ranks_left() == []


# ---- a rank that dies ------------------------------------------------------------------------------------------------

DEATHS: dict[str, tuple[str, tuple[object, ...]]] = {
    "tensor": ("tensor", step_hook("killed_in_the_backward_pass_on_rank_1")),
    "pipeline": ("pipeline", step_hook("killed_in_the_backward_pass_on_rank_1")),
    "while a plug-in waits for it": (
        "context",
        ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{PLUG_INS}:loss_in_which_rank_1_dies"),
    ),
}


@pytest.mark.parametrize("case", DEATHS)
def test_a_rank_that_dies_in_a_step_is_named_with_its_last_words(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not what became of the others, which lost it in a collective."""
    layout, flags = DEATHS[case]
    assert start(tmp_path / "run", layout, *flags) == 1
    text = capfd.readouterr().err
    said = text[text.index("miles: ") :]
    assert said.startswith("miles: rank 1 of the trainer's 2 processes was killed by SIGKILL")
    assert "famous last words" in said
    assert "gloo" not in text and "Traceback" not in text and "--custom-loss-function-path" not in text
    assert ranks_left() == []


# ---- a loss that is not finite ---------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str, tuple[object, ...]]] = {
    **{layout: (layout, "breaks_on_rank_1", ()) for layout in LAYOUTS},
    "gradient": ("tensor", "counter", step_hook("breaks_a_gradient_on_rank_1")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_rank_skips_a_step_that_is_not_finite_on_one(
    case: str, whole_precision: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout, post, flags = BROKEN[case]
    run_dir = tmp_path / "run"
    assert start(run_dir, layout, "--hf-checkpoint", whole_precision, *flags, post=post) == 0
    steps = [line for line in read_metrics(run_dir) if "train/skipped_step" in line]
    assert [line["train/skipped_step"] for line in steps] == [1.0, 1.0]
    assert unchanged(run_dir, whole_precision)
    what = "gradient" if case == "gradient" else "loss"
    assert capfd.readouterr().out.count(f"rollout 0, optimizer step 1: the {what} is not finite") == 1
    shares = 2 if layout == "data" else 1
    kept = sorted(path.name for path in (run_dir / "failures").iterdir())
    assert kept == [f"step_0_{step}_rank{share}.pt" for step in range(2) for share in range(shares)]


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_a_finite_step_changes_the_weights(layout: str, whole_precision: Path, tmp_path: Path) -> None:
    """What the comparison above is worth. And plug-ins of ranks that hold the same samples draw the same numbers."""
    assert start(tmp_path / "run", layout, "--hf-checkpoint", whole_precision, post="draws") == 0
    assert not unchanged(tmp_path / "run", whole_precision)
    one, other = ((tmp_path / "run" / f"drawn_{rank}").read_text() for rank in range(2))
    assert (one == other) == (layout == "tensor")


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_a_loss_that_is_not_finite_ends_the_run_where_it_shall(
    layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", layout, "--nan-policy", "stop", post="breaks_on_rank_1") == 1
    text = capfd.readouterr().err
    assert text.count("miles: ") == 1 and "Traceback" not in text
    assert text.count("--nan-policy stop: rollout 0, optimizer step 0: the loss is not finite") == 1
    assert len(list((tmp_path / "run" / "failures").glob("step_0_0_rank*.pt"))) == (2 if layout == "data" else 1)
    assert ranks_left() == []


# ---- a driver of its own ---------------------------------------------------------------------------------------------

TENSOR = (*MEGATRON, *LAYOUTS["tensor"])


def test_no_rank_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    with waiting(tmp_path / "run", *TENSOR) as (process, pids):
        assert not nobody_left(pids)
        process.kill()
        wait_until(lambda: nobody_left(pids), SECONDS_TO_END)


def test_ctrl_c_finishes_the_rollout_and_saves_it(tmp_path: Path) -> None:
    with waiting(tmp_path / "run", *TENSOR, "--save", tmp_path / "ck") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and not nobody_left(pids)
        (tmp_path / "run" / "go").touch()
        assert process.wait(START_TIMEOUT_S) == 130
        said = (tmp_path / "run.err").read_text()
        assert "everything is saved" in said and "Traceback" not in said and "Warning" not in said
        # Megatron's checkpoints are numbered by rollouts, of which this is the second.
        assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
        assert nobody_left(pids)
