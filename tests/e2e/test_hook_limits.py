"""Limits and policies of plug-in calls in whole runs: plug-ins that hang, block, fail, remember, and move."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e_runs import ROOT, TINY, distance, metrics, saving, started, summary, train, weights

from miles.__main__ import main
from miles.observe.record import read_metrics, read_rollouts
from miles.types import Sample, is_dropped, is_failed

PLUG_INS = Path(__file__).with_name("limit_plug_ins.py")

# A rollout of 16 answers of at most 12 tokens: a second.
SMALL = ("--rollout-max-response-len", 12, "--num-rollout", 1, "--lr", "1e-3")


def path(name: str) -> str:
    return f"{PLUG_INS}:{name}"


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(PLUG_INS.read_text().splitlines(), 1) if line.endswith(text))


# ---- calls that do not end -------------------------------------------------------------------------------------------

ENDLESS = {
    "loops": ("--custom-rm-path",),
    "endless_filter": ("--dynamic-sampling-filter-path",),
    "endless_loss": ("--loss-type", "custom_loss", "--custom-loss-function-path"),
    "endless_log": ("--custom-rollout-log-function-path",),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_loop_ends_the_run_with_its_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the event loop, inline in it, in the trainer's thread, in the rollout's."""
    flags = () if name == "loops" else ("--custom-rm-path", path("scores"))
    train(tmp_path / "r", *SMALL, *flags, *ENDLESS[name], path(name), "--hook-timeout-s", 1, status=1)
    told = capsys.readouterr().err
    card = told[told.index("miles: --") :]
    assert card.startswith(f"miles: {ENDLESS[name][-1]} {path(name)} failed at ")
    (place,) = re.findall(rf"{PLUG_INS.name}:(\d+)\n", card)
    assert 0 < int(place) - line_of(next(t for t in PLUG_INS.read_text().splitlines() if f"def {name}(" in t)) <= 2
    assert "took longer than 1 s (--hook-timeout-s)" in card and "Traceback" not in told


def test_c_code_that_does_not_return_ends_the_process(tmp_path: Path) -> None:
    run = tmp_path / "r"
    with started(run, *SMALL, *saving(run), "--custom-rm-path", path("stuck_in_c"), "--hook-timeout-s", 0.5) as process:
        assert process.ends(60) == 1
        told = process.err.read_text()
    assert f"{PLUG_INS.name}:{line_of('# stuck')}\n" in told and "Traceback" not in told
    assert f"custom-rm {PLUG_INS}:{line_of('# stuck')} has blocked the event loop for" in told.replace(
        f"{PLUG_INS.relative_to(ROOT)}", str(PLUG_INS)
    )
    assert "stuck     it cannot be interrupted" in told and "holds no checkpoint yet" in told


def test_c_code_that_keeps_the_interpreter_ends_the_process(tmp_path: Path) -> None:
    """No Python of the process gets on, the watchdog's neither."""
    flags = ["--config", str(TINY), "--run-dir", str(tmp_path / "r"), *map(str, SMALL), "--hook-timeout-s", "1"]
    program = (
        "import sys, miles.hooks.watchdog as watchdog; watchdog.FROZEN_GRACE_S = 4\n"
        f"from miles.__main__ import main; sys.exit(main({['train', *flags, '--custom-rm-path', path('explodes')]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 1
    assert f"limit_plug_ins.py:{line_of('# explodes')} (in explodes)" in done.stderr
    assert "kept the Python interpreter for 5 s" in done.stderr and "most recent call first" not in done.stderr


# ---- calls that always fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--hook-policy", "custom-rm=retry:2"), r"^miles: --custom-rm-path "),
        (("--hook-policy", "custom-rm=retry:1,drop"), r"^miles: \d+ of \d+ calls of --custom-rm-path have failed"),
        (
            ("--hook-policy", "custom-rm=mask", "--hook-error-budget", 1),
            r"^miles: \d+ of \d+ calls of --custom-rm-path have failed in this rollout, and not one has succeeded",
        ),
    ],
)
def test_a_reward_that_always_raises_ends_the_run(
    flags: tuple[object, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "r", *SMALL, "--custom-rm-path", path("raises"), *flags, status=1)
    told = capsys.readouterr().err
    card = told[told.rindex("miles: ") :]
    assert re.search(says, card) and "ConnectionError: the grader is gone" in card and "Traceback" not in told


def test_ctrl_c_ends_a_run_that_retries(tmp_path: Path) -> None:
    run = tmp_path / "r"
    flags = ("--custom-rm-path", path("raises"), "--hook-policy", "custom-rm=retry:1000000")
    with started(run, *SMALL, *flags) as process:
        process.wait_until(lambda: "note:" in process.text())
        time.sleep(2.0)
        process.send(signal.SIGINT)
        assert process.ends(20) == 130
        assert "stopped in rollout 0. Nothing was saved" in process.err.read_text()


# ---- what is trained when one call fails -----------------------------------------------------------------------------


def test_drop_trains_the_group_without_the_sample(tmp_path: Path) -> None:
    """Exactly the weights of a run whose rollout never had the sample, with one step over the 15 that are left."""
    one_step, run, by_hand = ("--num-steps-per-rollout", 1), tmp_path / "drop", tmp_path / "by_hand"
    policy = ("--custom-rm-path", path("one_raises"), "--hook-policy", "custom-rm=drop")
    train(run, *SMALL, *one_step, *saving(run), *policy)
    train(
        by_hand, *SMALL, *one_step, *saving(by_hand), "--custom-rm-path", path("scores"),
        "--rollout-function-path", path("WithoutOne"), "--use-dynamic-global-batch-size",
    )  # fmt: skip
    assert distance(weights(run), weights(by_hand)) < 1e-7
    (bad,) = [s for s in read_rollouts(run, 0) if is_failed(s)]
    assert is_dropped(bad) and bad.status == Sample.Status.FAILED and bad.reward is None

    masked = tmp_path / "mask"
    train(masked, *SMALL, *one_step, *saving(masked), *policy[:-1], "custom-rm=mask")
    (bad,) = [s for s in read_rollouts(masked, 0) if is_failed(s)]
    assert is_failed(bad) and not is_dropped(bad)
    loss = {name: metrics(tmp_path / name, "train/grad_norm")[0] for name in ("drop", "by_hand", "mask")}
    assert loss["drop"] == pytest.approx(loss["by_hand"], rel=1e-6)
    assert loss["mask"] == pytest.approx(loss["drop"] * 15 / 16, rel=1e-5), "the masked sample counts in the mean"


# ---- state, directories, metrics -------------------------------------------------------------------------------------


def test_a_loss_object_goes_on_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "r"
    flags = (*SMALL[:2], "--lr", "1e-3", *saving(run), "--custom-rm-path", path("scores"), "--loss-type", "custom_loss")
    train(run, *flags, "--num-rollout", 1, "--custom-loss-function-path", path("counted_loss"))
    first = metrics(run, "train/calls")
    # The object of a new process, which begins at 0.
    anew = ("--custom-loss-function-path", path("counted_loss_anew"))
    train(run, *flags, "--num-rollout", 2, "--load", run / "ck", *anew)
    both = metrics(run, "train/calls")
    assert len(both) == 2 * len(first)
    values = [both[step] for step in sorted(both)]
    assert values == sorted(values) and values[len(first)] > values[len(first) - 1]


def test_a_plug_in_that_changes_the_directory_moves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"hf-checkpoint": "examples/quickstart/base", "prompt-data": "examples/quickstart/data/train.jsonl"}
    flags = [word for name, where in given.items() for word in (f"--{name}", ROOT / where)]
    monkeypatch.chdir(tmp_path)
    command = [
        "train", "--config", TINY, *flags, *SMALL, "--num-rollout", 2, "--run-dir", "r", "--save", "r/ck",
        "--save-debug-rollout-data", "r/dump/{rollout_id}.pt", "--custom-rm-path", path("moves"),
    ]  # fmt: skip
    assert main([*map(str, command)]) == 0
    assert Path.cwd() == Path("/")
    assert summary(tmp_path / "r") and len(list((tmp_path / "r" / "dump").iterdir())) == 2
    assert (tmp_path / "r" / "ck" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_every_rollout_counts_the_calls_of_both_sides(tmp_path: Path) -> None:
    run = train(
        tmp_path / "r", *SMALL, "--num-rollout", 2, "--custom-rm-path", path("scores"), "--loss-type", "custom_loss",
        "--custom-loss-function-path", path("counted_loss"),
    )  # fmt: skip
    lines = {name: _of(run, f"hooks/{name}/calls") for name in ("custom_rm", "custom_loss_function", "data_source")}
    assert lines["custom_rm"] == {0: 16, 1: 16}, "of each rollout, not since the start"
    assert set(lines["custom_loss_function"]) == {0, 1} and min(lines["custom_loss_function"].values()) >= 2
    for key in ("failures", "p50_s", "p95_s", "max_s", "total_s"):
        assert set(_of(run, f"hooks/custom_rm/{key}")) == {0, 1}
    assert summary(run)["hooks"]["custom_rm"]["calls"] == 32


def _of(run: Path, key: str) -> dict[int, float]:
    return {line["rollout/step"]: line[key] for line in read_metrics(run) if key in line}
