"""Fully asynchronous rollouts: generation never waits for training, and training takes whole groups as they finish.

                      prompts                      finished (bounded)
    data source ──► waiting ──► G generators ──► queue of groups ──► collect, one rollout of groups at a time
         ▲                                                               │
         └───────────── aborted groups ──────────────────────────────────┘

    generator    consumes a waiting group;  produces a finished one;  waits where the queue is full
    collect      consumes finished groups until the rollout is full;  produces what is trained;  fetches prompts ahead,
                 so that generators have work while the trainer works
    data source  is called by `collect` alone, so never while a checkpoint saves it

Nothing is cut off at the end of a rollout: what runs goes on, under new weights as soon as there are any. A group may
therefore be older than the policy that trains on it: by about (G + queue) / --rollout-batch-size rollouts at most.
`rollout/fully_async/staleness_*` says by how many.

    --rollout-function-path examples/fully_async/fully_async_rollout.py:generate_rollout_fully_async

The class `FullyAsyncRollout` is the same with state: a checkpoint keeps its unfinished groups, and a resumed run works
on them first. Settings, from --custom-config-path: `fully_async_generators` (groups generated at a time) and
`fully_async_queue` (finished groups that may wait), both --rollout-batch-size where unset.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from argparse import Namespace
from collections import deque
from dataclasses import dataclass
from typing import Any

from miles.rollout.base_types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles.rollout.data_state import decode_group, encode_group
from miles.rollout.filter_hub.base_types import DynamicFilterOutput, MetricGatherer, call_dynamic_filter
from miles.rollout.sglang_rollout import GenerateState, eval_rollout, generate_and_rm_group
from miles.types import is_failed
from miles.utils.async_utils import run
from miles.utils.misc import load_function
from miles.utils.types import Sample

Group = list[Sample]


@dataclass(eq=False)
class Job:
    """One group on its way: as it was fetched, and as it is. `started` is the rollout in which generation began."""

    fetched: Group
    group: Group
    started: int = -1


class AsyncRolloutWorker:
    """The generators of one run and the groups between them. Lives on one event loop; `collect` starts it."""

    def __init__(self, args: Namespace, data_source: Any) -> None:
        self.args, self.data_source = args, data_source
        self.state = GenerateState(args)
        self.filter = load_function(args.dynamic_sampling_filter_path)
        self.num_generators = setting(args, "fully_async_generators")
        self.queue_size = setting(args, "fully_async_queue")
        self.rollout_id = 0
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.finished: deque[Job] = deque()
        self.generators: list[asyncio.Task[None]] = []
        self.changed = asyncio.Condition()  # of `waiting` and `finished`
        self.room = asyncio.Semaphore(self.queue_size)  # in `finished`; first come, first served
        self.error: BaseException | None = None

    # ---- generating ----------------------------------------------------------------------------------------------

    async def generate(self) -> None:
        """One generator: group after group, for as long as the run lasts."""
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.waiting)
                job = self.waiting.popleft()
                self.running.append(job)
            if job.started < 0:
                job.started = self.rollout_id
            job.group = await generate_and_rm_group(self.args, job.group, self.state.sampling_params.copy())
            await self.room.acquire()
            async with self.changed:
                self.running.remove(job)
                self.finished.append(job)
                self.changed.notify_all()

    def start(self) -> None:
        if not self.generators:
            for i in range(self.num_generators):
                task = asyncio.get_running_loop().create_task(self.generate(), name=f"fully-async generator {i}")
                task.add_done_callback(self.generator_ended)
                self.generators.append(task)

    def generator_ended(self, task: asyncio.Task[None]) -> None:
        """The first error stops all generators, at once; whoever collects next gets it."""
        error = None if task.cancelled() else task.exception()
        if error is None or self.error is not None:
            return
        self.error = error
        for generator in self.generators:
            generator.cancel()

    async def stop(self) -> None:
        """Cancel what runs (the engine forgets those requests) and wait for it to be gone."""
        for generator in self.generators:
            generator.cancel()
        await asyncio.gather(*self.generators, return_exceptions=True)
        self.generators.clear()

    # ---- collecting ----------------------------------------------------------------------------------------------

    async def collect(self, rollout_id: int) -> RolloutFnTrainOutput:
        """The next `rollout_batch_size` groups in order of completion, sorted by index. Raises what a generator did."""
        begin, self.rollout_id = time.perf_counter(), rollout_id
        ahead, aborted = len(self.finished), 0
        kept: list[Job] = []
        metrics = MetricGatherer()
        self.start()
        try:
            while len(kept) < self.args.rollout_batch_size:
                await self.fetch()
                job = await self.next_finished()
                if is_unfinished(job.group):
                    aborted += 1
                    self.data_source.add_samples([job.group])
                    continue
                verdict = self.judge(job.group)
                if verdict.keep:
                    kept.append(job)
                else:
                    metrics.on_dynamic_filter_drop(verdict.reason)
            await self.fetch()
        except BaseException:
            await self.stop()
            raise
        if rollout_id + 1 >= self.args.num_rollout:
            await self.stop()
        kept.sort(key=lambda job: first_sample(job.group).index or 0)
        ages = [rollout_id - job.started for job in kept]
        return RolloutFnTrainOutput(
            samples=[job.group for job in kept],
            metrics={
                **metrics.collect(),
                "rollout/fully_async/staleness_mean": sum(ages) / len(ages),
                "rollout/fully_async/staleness_max": max(ages),
                "rollout/fully_async/finished_ahead": ahead,
                "rollout/fully_async/aborted_groups": aborted,
                "perf/fully_async_wait_time": time.perf_counter() - begin,
            },
        )

    def judge(self, group: Group) -> DynamicFilterOutput:
        """`--dynamic-sampling-filter-path` over the samples that have a score; fewer than two teach nothing."""
        everyone = samples_of(group)
        scored = [sample for sample in everyone if not is_failed(sample)]
        if len(scored) < min(2, len(everyone)):
            return DynamicFilterOutput(keep=False, reason="failed_scores")
        return call_dynamic_filter(self.filter, self.args, scored)

    async def fetch(self) -> None:
        """Have enough prompts waiting for all that generators can do before the next rollout."""
        missing = self.num_generators + self.queue_size - len(self.waiting)
        if missing <= 0:
            return
        groups = self.data_source.get_samples(missing)
        if not groups and not (self.waiting or self.running or self.finished):
            raise RuntimeError(
                f"--data-source-path: get_samples({missing}) returned no groups while rollout {self.rollout_id} needs "
                "more. Check the prompt data and the buffer filter."
            )
        async with self.changed:
            self.waiting.extend(Job(fetched=copy.deepcopy(group), group=group) for group in groups)
            self.changed.notify_all()

    async def next_finished(self) -> Job:
        """The group that finished first. Raises what a generator raised, and never waits for one that is gone."""
        taking = asyncio.ensure_future(self.take())
        try:
            await asyncio.wait([taking, *self.generators], return_when=asyncio.FIRST_COMPLETED)
            if self.error is not None:
                raise self.error
            return await taking
        finally:
            taking.cancel()

    async def take(self) -> Job:
        async with self.changed:
            await self.changed.wait_for(lambda: self.finished)
            job = self.finished.popleft()
        self.room.release()
        return job

    # ---- state ---------------------------------------------------------------------------------------------------

    async def unfinished(self) -> list[Job]:
        """Every group that was fetched and not yet handed out; those that are not finished as they were fetched."""
        return [*self.finished, *(Job(job.fetched, job.fetched) for job in (*self.running, *self.waiting))]


def setting(args: Namespace, name: str) -> int:
    """A whole number >= 1 that --custom-config-path may have set on `args`; --rollout-batch-size where it has not."""
    value = vars(args).get(name)
    if value is None:
        return int(args.rollout_batch_size)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}. It is set in --custom-config-path.")
    return value


def is_unfinished(group: Group) -> bool:
    """Whether a sample was aborted in the engine: by somebody's /abort_request, or a pause of mode `abort`."""
    return any(sample.status == Sample.Status.ABORTED for sample in samples_of(group))


def samples_of(group: list[Any]) -> list[Sample]:
    """The samples of a group; a multi-sample generate function puts lists where samples stand."""
    return list(itertools.chain.from_iterable(e if isinstance(e, list) else [e] for e in group))


def first_sample(group: Group) -> Sample:
    return samples_of(group)[0]


# ---- the two forms -------------------------------------------------------------------------------------------------


class FullyAsyncRollout:
    """The class form: one worker of its own, whose unfinished groups are part of every checkpoint."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = input.args, input.data_source
        self.worker: AsyncRolloutWorker | None = None
        self.restored: list[Job] = []

    async def __call__(
        self, input: RolloutFnTrainInput | RolloutFnEvalInput
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        if isinstance(input, RolloutFnEvalInput):
            return (await eval_rollout(self.args, input.rollout_id))[0]
        if self.worker is None:
            self.worker = AsyncRolloutWorker(self.args, self.data_source)
            self.worker.waiting.extend(self.restored)
        return await self.worker.collect(input.rollout_id)

    def state_dict(self) -> dict[str, Any]:
        jobs = self.restored if self.worker is None else run(self.worker.unfinished())
        return {"jobs": [{"group": encode_group(job.group), "started": job.started} for job in jobs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = [(decode_group(entry["group"]), entry["started"]) for entry in state["jobs"]]
        self.restored = [Job(copy.deepcopy(group), group, started) for group, started in groups]


_worker: AsyncRolloutWorker | None = None


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The published function form. One worker per process and run; evaluation is the default one, beside it."""
    if evaluation:
        return run(eval_rollout(args, rollout_id))[0]
    return run(_collect(args, rollout_id, data_buffer))


async def _collect(args: Namespace, rollout_id: int, data_buffer: Any) -> RolloutFnTrainOutput:
    global _worker
    if _worker is None or _worker.args is not args or _worker.data_source is not data_buffer:
        if _worker is not None:
            await _worker.stop()
        _worker = AsyncRolloutWorker(args, data_buffer)
    output = await _worker.collect(rollout_id)
    if rollout_id + 1 >= args.num_rollout:
        _worker = None
    return output
