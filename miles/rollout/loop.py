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
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from miles.errors import UsageError
from miles.hooks import ObjectHook
from miles.hooks.values import BadReturn, Kind, kind_of
from miles.rollout.filter_hub.base_types import MetricGatherer
from miles.rollout.sample import first_sample, generate_and_rm_group, valid
from miles.rollout.state import GenerateState
from miles.types import Group, RolloutFnTrainOutput, Sample

logger = logging.getLogger(__name__)

# A rollout that has dropped this many times its target is worth a warning, and again at each doubling.
DROPS_BEFORE_WARNING = 4
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
        # The samples of this rollout by identity. Kept alive: a generate function may return others in their place, and
        # an identity that is free is given to the next object.
        self._fetched: dict[int, Sample] = {}
        self._submitted = self._dropped = 0
        self._reasons: Counter[str] = Counter()
        self._warn_at = DROPS_BEFORE_WARNING * self.target

    def fetch(self) -> None:
        """Fill up until the groups kept and in flight could make a batch."""
        while len(self.kept) + len(self.in_flight) < self.target:
            groups = self._next_groups(self.args.over_sampling_batch_size)
            if not groups:
                return
            for task in submit_groups(self.state, groups):
                self.in_flight[task] = self._submitted
                self._submitted += 1

    def _next_groups(self, count: int) -> list[Group]:
        """`get_samples(count)`, checked; [] where there are no more and tasks in flight may still fill the batch."""
        source = source_of_method(self.state, self.get_samples)
        groups = self.get_samples(count) if source is None else source.enter(self.get_samples, count)
        size = self.args.n_samples_per_prompt
        if groups is not None and not isinstance(groups, list):
            found = f"get_samples({count}) returned {kind_of(groups)}, expected a list of groups"
            self._refuse_groups("type", found, "one inner list per prompt")
        if not groups and not self.in_flight:
            self._refuse_groups(
                "none", f"get_samples({count}) returned no groups while rollout {self.rollout_id} still needs "
                f"{self.target - len(self.kept)}", "check the prompt data and the buffer filter",
            )  # fmt: skip
        for group in groups or []:
            if not isinstance(group, list) or not all(isinstance(s, Sample) for s in group):
                self._refuse_groups(
                    "type", f"get_samples({count}) returned a list of {type(group).__name__}, expected groups: lists "
                    "of Samples", "one inner list per prompt",
                )  # fmt: skip
            if len(group) != size:
                self._refuse_groups(
                    "length", f"get_samples({count}) returned a group of {len(group)} samples", f"each prompt has "
                    f"{size}: --n-samples-per-prompt",
                )  # fmt: skip
        samples = {id(sample): sample for group in groups or [] for sample in group}
        if len(samples) < size * len(groups or []) or not self._fetched.keys().isdisjoint(samples):
            found = f"get_samples({count}) returned one Sample object several times"
            self._refuse_groups("type", found, "make a new Sample for each")
        self._fetched.update(samples)
        return groups or []

    def _refuse_groups(self, kind: Kind, found: str, hint: str) -> NoReturn:
        source = source_of_method(self.state, self.get_samples)
        if source is None:
            raise UsageError(f"--data-source-path: {found} ({hint}).")
        source.reject(BadReturn(kind, found, hint))

    async def collect(self) -> None:
        """Wait until at least one group has finished and decide about every finished one, in order of submission."""
        done, _ = await asyncio.wait(self.in_flight, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=self.in_flight.__getitem__):
            del self.in_flight[task]
            group = task.result()
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
        self._reasons[reason or "no reason given"] += 1
        if self._dropped == self._warn_at:
            self._warn_at *= 2
            reasons = ", ".join(f"{why}: {count}" for why, count in self._reasons.most_common())
            logger.warning(
                "rollout %d does not progress: %d of %d finished groups were dropped (%s); %d of the %d that it needs "
                "are kept. It goes on until enough are; %s decides.",
                self.rollout_id, self._dropped, len(self.all), reasons, len(self.kept), self.target,
                "a failed score" if self.filter is None else f"--dynamic-sampling-filter-path {self.filter.path}",
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


def give_back(state: GenerateState, add_samples: Callable[[list[Group]], None], groups: list[Group]) -> None:
    """Hand unfinished groups to the data source, through the door where it is the run's own."""
    source = source_of_method(state, add_samples)
    if source is None:
        add_samples(groups)
    else:
        source.enter(add_samples, groups)


def source_of_method(state: GenerateState, method: Callable[..., Any]) -> ObjectHook | None:
    """The run's data source, where it is the object that `method` belongs to."""
    hook = state.context.hook("data_source", state.args)
    owner = getattr(method, "__self__", None)
    return hook if isinstance(hook, ObjectHook) and owner is not None and hook.state_holder is owner else None


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
        sample_filter(args, _shown(kept))
    process = state.context.hook("rollout_all_samples_process", args)
    if process is not None:
        process(args, _shown(everything), get_samples)


def _shown(groups: list[Group]) -> list[Group]:
    """What plug-ins see of `groups`: the live list where nothing has failed, else copies without failed members."""
    shown = [valid(group) for group in groups]
    return groups if all(new is old for new, old in zip(shown, groups, strict=True)) else [g for g in shown if g]


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
