"""Fully asynchronous rollouts: whole groups, nothing lost or trained twice, no silent end, no wait for what is dead."""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.fully_async import fully_async_rollout as example
from miles.observe.record import read_rollouts, recorded_rollouts
from miles.types import Failure, Sample

CONFIG = "examples/fully_async/fully_async.yaml"
CLASS = "examples/fully_async/fully_async_rollout.py:FullyAsyncRollout"
SMALL = ("--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1)
NO_EVAL = ("--eval-interval", 100, "--skip-eval-before-train")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("fully_async_generators: 4\nfully_async_queue: 2\n")
    return path


def plug_in(tmp_path: Path, code: str) -> str:
    path = tmp_path / "plug_in.py"
    path.write_text(code)
    return f"{path}:plug_in"


# ---- in a run ------------------------------------------------------------------------------------------------------


def test_a_run_trains_stale_groups_and_evaluates(train, metrics, settings: Path, tmp_path: Path) -> None:
    few = tmp_path / "eval.yaml"
    few.write_text("datasets:\n  - name: greedy\n    path: examples/quickstart/data/heldout.jsonl@[0:8]\n")
    flags = (*SMALL, "--custom-config-path", settings, "--eval-interval", 2, "--eval-config", few)
    run = train(CONFIG, *flags, "--num-rollout", 4, "--lr-warmup-iters", 0)
    assert metrics(run, "rollout/fully_async/staleness_mean")[0] == 0
    assert max(metrics(run, "rollout/fully_async/staleness_max")) >= 1
    assert len(metrics(run, "eval/greedy")) == 3
    # What was generated before an update and is trained after it has another probability than the trainer's.
    assert max(metrics(run, "train/train_rollout_logprob_abs_diff")) > 1e-4
    rollouts = trained(run)
    assert all(len(samples) == 16 for samples in rollouts)
    indices = [s.index for samples in rollouts for s in samples]
    assert len(set(indices)) == 64, "a sample was trained twice"
    assert all(len({s.group_index for s in samples}) == 4 for samples in rollouts), "a group was torn apart"


def trained(run: Path) -> list[list[Sample]]:
    """The samples of each rollout that the record holds."""
    return [read_rollouts(run, rollout_id, kept_only=True) for rollout_id in recorded_rollouts(run)]


def test_the_class_form_loses_nothing_on_resume(train, settings: Path, tmp_path: Path) -> None:
    ck = tmp_path / "ck"
    flags = (*SMALL, *NO_EVAL, "--custom-config-path", settings, "--rollout-function-path", CLASS, "--save", ck)
    first = train(CONFIG, *flags, "--num-rollout", 2)
    second = train(CONFIG, *flags, "--num-rollout", 5, "--load", ck)
    indices = [s.group_index for run in (first, second) for samples in trained(run) for s in samples[::4]]
    assert len(indices) == len(set(indices)) == 20
    # Only what was still unfinished in the end may be missing.
    outstanding = 4 + 2 + 6
    assert max(indices) < 20 + outstanding
    assert set(range(8)) <= set(indices), "what the first run left unfinished is trained first"


def test_the_error_of_a_reward_ends_the_run_with_its_card(train, settings: Path, tmp_path: Path, capfd) -> None:
    """Call 40 belongs to groups that are generated ahead, while the trainer works or after it."""
    code = (
        "calls = 0\n\n\nasync def plug_in(args, sample):\n    global calls\n    calls += 1\n"
        "    if calls == 40:\n        raise ZeroDivisionError('mine')\n    return calls % 3\n"
    )
    reward = plug_in(tmp_path, code)
    flags = ("--custom-rm-path", reward, "--custom-config-path", settings, "--num-rollout", 50)
    train(CONFIG, *SMALL, *NO_EVAL, *flags, status=1)
    said = capfd.readouterr().err
    assert "ZeroDivisionError: mine" in said and "plug_in.py:8" in said and "--custom-rm-path" in said
    assert "never retrieved" not in said and said.count("ZeroDivisionError: mine") == 1


INTERRUPT = """
import os, signal
calls = 0


async def plug_in(args, sample):
    global calls
    calls += 1
    if calls == 40:
        os.kill(os.getpid(), signal.SIGINT)
    return calls % 3
"""


@pytest.mark.parametrize("saves", [True, False])
def test_ctrl_c_stops_cleanly(train, settings: Path, tmp_path: Path, capfd, saves: bool) -> None:
    flags = ("--custom-rm-path", plug_in(tmp_path, INTERRUPT), "--custom-config-path", settings, "--num-rollout", 50)
    save = ("--save", tmp_path / "ck") if saves else ()
    train(CONFIG, *SMALL, *NO_EVAL, *flags, *save, status=130)
    said = capfd.readouterr().err
    assert ("Resume with the same command" if saves else "Nothing was saved") in said
    assert "Traceback" not in said and "never retrieved" not in said


def test_wrong_settings_are_said(train, tmp_path: Path, capfd) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("fully_async_queue: 0\n")
    train(CONFIG, *SMALL, *NO_EVAL, "--custom-config-path", path, "--num-rollout", 1, status=1)
    assert "fully_async_queue: expected a whole number >= 1, got 0" in capfd.readouterr().err


# ---- the worker alone ----------------------------------------------------------------------------------------------


class Source:
    """Numbered groups of two, and what came back."""

    def __init__(self, limit: int = 10**6) -> None:
        self.next, self.limit, self.back = 0, limit, []

    def get_samples(self, count: int) -> list[list[Sample]]:
        groups = []
        for _ in range(min(count, self.limit - self.next)):
            groups.append([Sample(group_index=self.next, index=2 * self.next + i) for i in range(2)])
            self.next += 1
        return groups

    def add_samples(self, groups: list[list[Sample]]) -> None:
        self.back += groups


Generate = Callable[[list[Sample]], Any]


@contextlib.contextmanager
def worker(monkeypatch, generate: Generate, source: Source, **more: Any) -> Iterator[example.AsyncRolloutWorker]:
    args = Namespace(
        rollout_batch_size=3, num_rollout=100, dynamic_sampling_filter_path=None, fully_async_generators=2,
        fully_async_queue=2, reward_key=None, **more,
    )  # fmt: skip

    async def group(args: Namespace, group: list[Sample], params: dict[str, Any]) -> list[Sample]:
        await asyncio.sleep(0)
        for sample in group:
            sample.status, sample.reward = Sample.Status.COMPLETED, 1.0
        await generate(group)
        return group

    monkeypatch.setattr(example, "generate_and_rm_group", group)
    monkeypatch.setattr(example, "GenerateState", lambda args: Namespace(sampling_params={}))
    yield example.AsyncRolloutWorker(args, source)


def test_generators_stop_where_the_queue_is_full(monkeypatch) -> None:
    started: list[int] = []

    async def generate(group: list[Sample]) -> None:
        started.append(group[0].group_index)

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        await w.collect(0)
        for _ in range(200):  # the trainer works
            await asyncio.sleep(0)
        assert len(w.finished) == 2 and len(w.running) == 2
        assert len(started) == 3 + 2 + 2
        second = await w.collect(1)
        assert [g[0].group_index for g in second.samples] == [3, 4, 5]
        assert second.metrics["rollout/fully_async/finished_ahead"] == 2
        assert second.metrics["rollout/fully_async/staleness_max"] == 1
        await w.stop()

    with worker(monkeypatch, generate, Source()) as w:
        asyncio.run(scenario(w))


def test_aborted_groups_go_back_and_are_not_trained(monkeypatch) -> None:
    source = Source()

    async def generate(group: list[Sample]) -> None:
        if group[0].group_index == 1:
            group[1].status = Sample.Status.ABORTED

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        output = await w.collect(0)
        kept = [g[0].group_index for g in output.samples]
        assert kept[0] == 0 and 1 not in kept and len(kept) == 3
        assert output.metrics["rollout/fully_async/aborted_groups"] == 1
        await w.stop()

    with worker(monkeypatch, generate, source) as w:
        asyncio.run(scenario(w))
    assert [group[0].group_index for group in source.back] == [1]


def test_filters_and_failed_scores(monkeypatch) -> None:
    async def generate(group: list[Sample]) -> None:
        number = group[0].group_index
        if number == 0:
            for sample in group:
                sample.failure = Failure("--custom-rm-path", "mine", "exception", "a failed score", "mine.py:1")
        else:
            group[1].reward = number % 2

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        w.filter = lambda args, samples: len({s.reward for s in samples}) > 1
        output = await w.collect(0)
        kept = [g[0].group_index for g in output.samples]
        assert len(kept) == 3 and all(number and number % 2 == 0 for number in kept)
        assert output.metrics["rollout/dynamic_filter/drop_failed_scores"] == 1
        await w.stop()

    with worker(monkeypatch, generate, Source()) as w:
        asyncio.run(scenario(w))


def test_an_error_between_rollouts_reaches_the_next(monkeypatch) -> None:
    async def generate(group: list[Sample]) -> None:
        if group[0].group_index == 6:
            raise LookupError("in the background")

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        await w.collect(0)
        for _ in range(200):
            await asyncio.sleep(0)
        assert all(generator.done() for generator in w.generators), "one error stops them all, at once"
        with pytest.raises(LookupError, match="in the background"):
            await w.collect(1)
        assert not w.generators and len(asyncio.all_tasks()) == 1

    with worker(monkeypatch, generate, Source()) as w:
        asyncio.run(scenario(w))


def test_a_source_that_ends_is_said_and_not_waited_for(monkeypatch) -> None:
    async def generate(group: list[Sample]) -> None:
        pass

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        await w.collect(0)
        with pytest.raises(RuntimeError, match="--data-source-path: get_samples"):
            await w.collect(1)

    with worker(monkeypatch, generate, Source(limit=5)) as w:
        asyncio.run(asyncio.wait_for(scenario(w), 10))


def test_the_last_rollout_leaves_nothing_running(monkeypatch) -> None:
    async def generate(group: list[Sample]) -> None:
        if group[0].group_index >= 3:
            await asyncio.sleep(3600)

    async def scenario(w: example.AsyncRolloutWorker) -> None:
        w.args.num_rollout = 1
        await w.collect(0)
        assert len(asyncio.all_tasks()) == 1
        left = await w.unfinished()
        assert all(sample.status == Sample.Status.PENDING for job in left for sample in job.group)

    with worker(monkeypatch, generate, Source()) as w:
        asyncio.run(scenario(w))
