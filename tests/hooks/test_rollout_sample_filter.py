"""--rollout-sample-filter-path: once per rollout, on what is trained; a removed sample keeps its place."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, List  # noqa: UP035

import numpy as np
import pytest
from hooks_helpers import answered, bound, group
from hooks_stage import Stage

from miles.rollout.loop_thread import get_async_loop
from miles.types import DynamicFilterOutput, Group, Sample

MakeStage = Callable[..., Stage]


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, groups)` by position: what is kept, sorted by index, inline in the event loop, before all samples."""
    seen: list[Any] = []

    def remove(*given: Any, **kwargs: Any) -> str:
        seen.append(("filter", given, kwargs, threading.current_thread()))
        given[1][0][1].remove_sample = True
        return "ignored"

    s = stage(
        dynamic_sampling_filter=lambda args, members: DynamicFilterOutput(members[0].group_index != 0),
        rollout_sample_filter=remove,
        rollout_all_samples_process=lambda args, groups: seen.append(("all", groups)),
    )
    report = s.rollout()
    (kind, (args, groups), kwargs, thread), (last, everything) = seen
    assert (kind, last) == ("filter", "all") and args is s.args and kwargs == {}
    assert [[m.index for m in g] for g in groups] == [[2, 3], [4, 5]] and len(everything) == 4
    assert thread is get_async_loop().thread and s.hooks.rollout_sample_filter.form == "groups"
    batch = report.shards[0]
    rows = np.split(batch.loss_masks, np.cumsum(batch.response_lengths)[:-1])
    assert [row.any() for row in rows] == [True, False, True, True], "no loss"
    assert batch.raw_reward == [0.0, 1.0, 0.0, 1.0], "but its place in statistics"


def flat_list(args: Namespace, samples: list[Sample]) -> None:
    for sample in samples:
        sample.remove_sample = sample.index > 0


def flat_old_style(args: Namespace, samples: List[Sample]) -> None:  # noqa: UP006
    flat_list(args, samples)


def flat_sequence(args: Namespace, samples: Sequence[Sample]) -> None:
    flat_list(args, list(samples))


def groups_annotated(args: Namespace, samples: list[list[Sample]]) -> None:
    for members in samples:
        members[0].remove_sample = True


def groups_by_alias(args: Namespace, samples: list[Group]) -> None:
    groups_annotated(args, samples)


def groups_unannotated(args, samples):  # type: ignore[no-untyped-def]
    groups_annotated(args, samples)


@pytest.mark.parametrize(
    ("fn", "form", "removed"),
    [
        (flat_list, "samples", [False, True, True, True]),
        (flat_old_style, "samples", [False, True, True, True]),
        (flat_sequence, "samples", [False, True, True, True]),
        (groups_annotated, "groups", [True, False, True, False]),
        (groups_by_alias, "groups", [True, False, True, False]),
        (groups_unannotated, "groups", [True, False, True, False]),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_the_annotation_decides_between_the_guides_flat_list_and_groups(
    fn: Callable[..., None], form: str, removed: list[bool], stage: MakeStage
) -> None:
    s = stage(rollout_sample_filter=fn)
    batch = s.rollout().shards[0]
    assert s.hooks.rollout_sample_filter.form == form
    rows = np.split(batch.loss_masks, np.cumsum(batch.response_lengths)[:-1])
    assert [not row.any() for row in rows] == removed


def test_a_flat_list_holds_several_samples_of_one_prompt(stage: MakeStage) -> None:
    seen: list[Any] = []

    def look(args: Namespace, samples: list[Sample]) -> None:
        seen.append([s.index for s in samples])

    async def twice(args: Namespace, sample: Sample, sampling_params: Any) -> list[Sample]:
        return [answered(sample.index or 0, reward=0.0), answered(10 + (sample.index or 0), reward=1.0)]

    stage(rollout_sample_filter=look, custom_generate_function=twice).rollout()
    assert seen == [[0, 10, 1, 11, 2, 12, 3, 13]]


def test_it_may_be_read_from_another_file() -> None:
    hook = bound("rollout_sample_filter", "groups:mark_flat")
    members = group()
    hook(Namespace(), [members])
    assert [s.remove_sample for s in members] == [False, True, True]
