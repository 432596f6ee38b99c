"""The rollout of one training step: fetch groups, generate and score them, filter, until enough are kept.

                 get_samples                  dynamic filter
    data source ────────────► group tasks ──────────────────► kept ──► sorted, sample filter, all-samples process
         ▲                        │                │
         └── aborted groups ──────┴── abort ◄──────┘ when `rollout_batch_size` groups are kept

`fetch`    runs when kept + in-flight groups fall below the target; takes `over_sampling_batch_size` groups at once.
`collect`  waits for the first group to finish; frees a place in flight; keeps or drops the group.
`abort`    runs when the target is reached; tells the engines to stop and waits for every remaining task.

Everything runs in the event loop of `miles.rollout.loop_thread`; filters run inline, in completion order.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from miles.errors import UsageError
from miles.rollout.filter_hub.base_types import MetricGatherer
from miles.rollout.sample import first_sample, generate_and_rm_group, valid
from miles.rollout.state import GenerateState
from miles.types import Group, RolloutFnTrainOutput, Sample

logger = logging.getLogger(__name__)

# A filter that has dropped this many times the target without filling a batch is worth a warning.
DROPS_PER_WARNING = 4
MIN_VALID_PER_GROUP = 2

GetSamples = Callable[[int], list[Group]]


def submit_groups(state: GenerateState, groups: list[Group]) -> list[asyncio.Task[Group]]:
    """Start one task per group, with the rollout's sampling parameters."""
    return [asyncio.create_task(generate_and_rm_group(state, g, state.sampling_params)) for g in groups]


async def generate_rollout(
    state: GenerateState, rollout_id: int, get_samples: GetSamples
) -> tuple[RolloutFnTrainOutput, list[Group]]:
    """One training rollout. Returns what is trained and, with `--partial-rollout`, the groups that were cut short."""
    collection = _Collection(state, rollout_id, get_samples)
    try:
        while len(collection.kept) < collection.target:
            collection.fetch()
            await collection.collect()
        aborted = await collection.abort()
    except BaseException:
        await collection.cancel()
        raise
    finally:
        state.reset()
    return collection.finish(), aborted


class _Collection:
    """The groups of one rollout in each of their states: in flight, kept, and all that finished."""

    def __init__(self, state: GenerateState, rollout_id: int, get_samples: GetSamples) -> None:
        self.state, self.args, self.rollout_id, self.get_samples = state, state.args, rollout_id, get_samples
        self.target: int = state.args.rollout_batch_size
        self.filter = state.context.hook("dynamic_sampling_filter", state.args)
        self.metrics = MetricGatherer()
        # Task -> number of its submission: sets have no order, and results must not depend on one.
        self.in_flight: dict[asyncio.Task[Group], int] = {}
        self.kept: list[Group] = []
        self.all: list[Group] = []
        self._submitted = self._dropped = 0

    def fetch(self) -> None:
        """Fill up until the groups kept and in flight could make a batch."""
        while len(self.kept) + len(self.in_flight) < self.target:
            groups = self.get_samples(self.args.over_sampling_batch_size)
            if not groups:
                if self.in_flight:
                    return
                raise UsageError(
                    f"--data-source-path: get_samples({self.args.over_sampling_batch_size}) returned no groups while "
                    f"rollout {self.rollout_id} still needs {self.target - len(self.kept)}. Expected at least one; "
                    "check the prompt data and the buffer filter."
                )
            for task in submit_groups(self.state, groups):
                self.in_flight[task] = self._submitted
                self._submitted += 1

    async def collect(self) -> None:
        """Wait until at least one group has finished and decide about every finished one, in order of submission."""
        done, _ = await asyncio.wait(self.in_flight, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=self.in_flight.__getitem__):
            del self.in_flight[task]
            group = task.result()
            assert len(group) == self.args.n_samples_per_prompt, f"a group of {len(group)} samples came back"
            self.all.append(group)
            if self._passes(group) and len(self.kept) < self.target:
                self.kept.append(group)

    def _passes(self, group: Group) -> bool:
        members = valid(group)
        if len(members) < len(group) and len(members) < MIN_VALID_PER_GROUP:
            return self._drop("failed_scores")
        if self.filter is None:
            return True
        verdict = self.filter(self.args, members)
        return True if verdict.keep else self._drop(verdict.reason)

    def _drop(self, reason: str | None) -> bool:
        self.metrics.on_dynamic_filter_drop(reason)
        self._dropped += 1
        if self._dropped % (DROPS_PER_WARNING * self.target) == 0:
            logger.warning(
                "rollout %d: %d groups dropped, %d of %d kept so far (%s)",
                self.rollout_id, self._dropped, len(self.kept), self.target, self.metrics.collect(),
            )  # fmt: skip
        return False

    async def abort(self) -> list[Group]:
        """Stop what is still in flight; with `--partial-rollout` return it, marked with the rollout it began in."""
        if not self.in_flight:
            return []
        self.state.aborted = True
        await self.state.context.client.abort_all()
        groups = await asyncio.gather(*self.in_flight)
        self.in_flight.clear()
        if not self.args.partial_rollout:
            return []
        mark_started(groups, self.rollout_id)
        return list(groups)

    async def cancel(self) -> None:
        """After an error: leave no task behind."""
        for task in self.in_flight:
            task.cancel()
        await asyncio.gather(*self.in_flight, return_exceptions=True)

    def finish(self) -> RolloutFnTrainOutput:
        """Sort by index and let the two plug points at the end of a rollout see the groups."""
        self.kept.sort(key=_order)
        self.all.sort(key=_order)
        log_ends(self.kept)
        apply_final_hooks(self.state, self.args, self.kept, self.all, self.get_samples)
        return RolloutFnTrainOutput(samples=self.kept, metrics=self.metrics.collect())


def mark_started(groups: Iterable[Group], rollout_id: int) -> None:
    """Note on samples that were cut short in which rollout their response began."""
    for sample in (s for group in groups for s in group):
        if sample.response and "start_rollout_id" not in sample.metadata:
            sample.metadata["start_rollout_id"] = rollout_id


def apply_final_hooks(
    state: GenerateState, args: Namespace, kept: list[Group], everything: list[Group], get_samples: GetSamples
) -> None:
    """`--rollout-sample-filter-path`, then `--rollout-all-samples-process-path`."""
    sample_filter = state.context.hook("rollout_sample_filter", args)
    if sample_filter is not None:
        sample_filter(args, [valid(g) for g in kept])
    process = state.context.hook("rollout_all_samples_process", args)
    if process is not None:
        process(args, [valid(g) for g in everything], get_samples)


def _order(group: Group) -> Any:
    index = first_sample(group).index
    return index if index is not None else -1


def log_ends(groups: list[Group]) -> None:
    """Show the first and the last sample: the quickest way to see that prompts and responses look right."""
    for where, group in (("first", groups[0]), ("last", groups[-1])):
        sample: Sample = first_sample(group)
        logger.info(
            "%s sample: prompt %r response %r label %r reward %s",
            where, sample.prompt, sample.response, sample.label, sample.reward,
        )  # fmt: skip
