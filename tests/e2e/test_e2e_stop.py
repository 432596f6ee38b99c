"""Ctrl-C and SIGTERM, at every stage of a run: quickly, without a traceback, and with an answer to "what now?"."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from e2e_runs import HELDOUT, Started, data_state, latest, plug_in, same, saving, started, train, unclocked, weights

# How long a run may take to notice and to leave; a rollout of these takes a fifth of a second.
PROMPTLY_S = 15.0
STOPPED = 130
BUFFER = ("--partial-rollout", "--over-sampling-batch-size", 7)


def rollouts_done(run: Started) -> int:
    return len([*(run.run_dir / "rollouts").glob("0*.parquet")]) if run.run_dir.exists() else 0


def is_sleeping(run: Started) -> bool:
    """Whether the reward `sleeps` has been called."""
    return (run.run_dir / "is_sleeping").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stop_saves_and_says_how_to_resume(number: signal.Signals, tmp_path: Path) -> None:
    """And the resumed run ends like one that was never stopped, unfinished groups of the buffer included."""
    with started(tmp_path / "run", *saving(tmp_path / "run", every=1000), *BUFFER, "--num-rollout", 1000) as run:
        run.wait_until(lambda: rollouts_done(run) >= 2)
        run.send(number)
        assert run.ends(PROMPTLY_S) == STOPPED, run.text()
    folder, output = tmp_path / "run" / "ck", run.text()
    done = int(latest(run.run_dir).name.removeprefix("iter_"))
    assert done >= 2
    assert "Traceback" not in output
    assert "stopping after this rollout, with a checkpoint; Ctrl-C again stops at once" in output
    assert f"miles: stopped after rollout {done - 1}; everything is saved in {folder}." in output
    assert f"Resume with the same command and --load {folder}" in output
    assert not (run.run_dir / "run.lock").exists()

    straight, total = tmp_path / "straight", done + 1
    train(straight, *saving(straight), *BUFFER, "--num-rollout", total)
    train(run.run_dir, *saving(run.run_dir), *BUFFER, "--num-rollout", total, "--load", folder)
    assert same(weights(straight), weights(run.run_dir))
    assert data_state(straight, total - 1) == data_state(run.run_dir, total - 1)
    assert unclocked(straight) == unclocked(run.run_dir)


def test_stop_without_save(tmp_path: Path) -> None:
    """Nothing can be saved, so nothing is waited for: not even for a reward, in a thread, that never comes back."""
    with started(tmp_path / "run", "--custom-rm-path", plug_in("sleeps")) as run:
        run.wait_until(lambda: is_sleeping(run))
        begin = time.monotonic()
        run.send(signal.SIGINT)
        assert run.ends(PROMPTLY_S) == STOPPED, run.text()
    output = run.text()
    assert time.monotonic() - begin < PROMPTLY_S
    assert "stopping; nothing can be saved, because --save is not given" in output
    assert "miles: stopped in rollout 0. Nothing was saved, because --save is not given." in output
    assert "Traceback" not in output and "Exception" not in output


def test_second_stop_is_at_once(tmp_path: Path) -> None:
    """The rollout in progress hangs, so the first Ctrl-C would wait for ever."""
    first = train(tmp_path / "run", *saving(tmp_path / "run"), "--num-rollout", 1)
    before = weights(first)
    more = ("--num-rollout", 5, "--load", first / "ck", "--custom-rm-path", plug_in("sleeps"))
    with started(first, *saving(first), *more) as run:
        run.wait_until(lambda: is_sleeping(run))
        run.send(signal.SIGINT)
        run.wait_until(lambda: "Ctrl-C again" in run.text(), PROMPTLY_S)
        time.sleep(0.5)
        assert run.process.poll() is None, "the first one waits for the rollout"
        run.send(signal.SIGINT)
        assert run.ends(PROMPTLY_S) == STOPPED
    output = run.text()
    assert (
        f"stopped at once; the rollout in progress is lost. The last checkpoint in {first / 'ck'} is intact." in output
    )
    assert "Traceback" not in output
    # The lock of the dead process does not block the next one.
    train(first, *saving(first), "--num-rollout", 2, "--load", first / "ck")
    assert same(before, weights(first, 1)) and latest(first).name == "iter_0000002"


@pytest.mark.parametrize("delay_s", [0.0, 0.5, 1.2])
def test_stop_while_starting(delay_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment the plug-ins are loaded: imports of heavy libraries, the model, the engine."""
    marker = tmp_path / "marker"
    monkeypatch.setenv("MILES_TEST_MARKER", str(marker))
    with started(tmp_path / "run", "--custom-rm-path", plug_in("digits"), "--num-rollout", 1000) as run:
        run.wait_until(marker.exists)
        time.sleep(delay_s)
        number = signal.SIGTERM if delay_s == 0.5 else signal.SIGINT
        run.send(number)
        # CPython ends itself by the signal where the interrupt came inside `exec`; a shell shows both as 130.
        assert run.ends(PROMPTLY_S) in (STOPPED, -signal.SIGINT), run.text()
    assert "Traceback" not in run.text() and "Exception ignored" not in run.text()


def test_stop_during_the_first_evaluation(tmp_path: Path) -> None:
    """Nothing has been trained: nothing to save, and no reason to wait for an evaluation that hangs."""
    evaluation = ("--eval-interval", 1, "--eval-prompt-data", "greedy", f"{HELDOUT}@[0:4]")
    with started(
        tmp_path / "run", *saving(tmp_path / "run"), *evaluation, "--custom-rm-path", plug_in("sleeps")
    ) as run:
        run.wait_until(lambda: is_sleeping(run))
        run.send(signal.SIGINT)
        assert run.ends(PROMPTLY_S) == STOPPED, run.text()
    assert "miles: stopped before rollout 0; nothing had to be saved yet." in run.text()
    assert "Traceback" not in run.text()
    assert not [*(run.run_dir / "ck").glob("iter_*")]
