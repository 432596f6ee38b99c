"""--buffer-filter-path: which of the groups that came back are taken next; the buffer is the live list."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
from hooks_helpers import answered, bound, bound_hooks
from hooks_stage import Stage

from miles.errors import HookError, UsageError
from miles.hooks import function_registry
from miles.types import Group, Sample

MakeStage = Callable[..., Stage]


def group(number: int, size: int = 2) -> Group:
    return [answered(100 * number + i, group_index=number, reward=float(i)) for i in range(size)]


def with_buffer(s: Stage, *numbers: int) -> Any:
    s.manager.data_source.add_samples([group(n) for n in numbers])
    return s.manager.data_source


def test_the_published_call(stage: MakeStage) -> None:
    """`(args, None, buffer, n)` by position, once per request, only while the buffer holds groups."""
    seen: list[Any] = []

    def newest(*given: Any, **kwargs: Any) -> list[Group]:
        seen.append((given, kwargs))
        return [given[2].pop()]

    s = stage("--hook-form", "buffer-filter=live-buffer", buffer_filter=newest)
    s.rollout()
    assert seen == [], "nothing in the buffer: not called"
    source = with_buffer(s, 7, 8)
    report = s.rollout(1)
    (((args, rollout_id, buffer, num_samples), kwargs),) = seen
    assert args is s.args and rollout_id is None and buffer is source.buffer and num_samples == 2 and kwargs == {}
    assert [g[0].group_index for g in source.buffer] == [7], "what it has taken is gone"
    assert sorted(set(report.shards[0].group_index or ())) == [2, 8], "the rest comes from the data"
    source.get_samples(0)
    assert len(seen) == 1, "nothing asked for: not called"


def test_without_one_the_oldest_come_first(stage: MakeStage) -> None:
    s = stage()
    source = with_buffer(s, 5, 6, 7)
    assert [g[0].group_index for g in source.get_samples(2)] == [5, 6]


def test_the_guides_form_returns_what_stays(stage: MakeStage) -> None:
    """It gets a copy; what it leaves out leaves the buffer, and what nobody asks for yet stays there."""
    given: list[Any] = []

    def good_ones(samples: list[list[Sample]]) -> list[list[Sample]]:
        given.append(samples)
        return [g for g in samples if (g[0].group_index or 0) % 2]

    s = stage(buffer_filter=good_ones)
    source = with_buffer(s, 1, 2, 3, 4, 5)
    report = s.rollout()
    assert s.hooks.buffer_filter.form == "groups" and given[0] is not source.buffer
    assert set(report.shards[0].group_index or ()) == {1, 3} and [g[0].group_index for g in source.buffer] == [5]


def hook_of(fn: Callable[..., Any]) -> Any:
    with function_registry.temporary("test:it", fn):
        return bound_hooks("buffer_filter", "x:y", args={"buffer_filter_path": "test:it"}).buffer_filter


ARGS = Namespace(n_samples_per_prompt=2)


def live_list(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return buffer


def leaves_them(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return buffer[:num_samples]


def too_many(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return [buffer.pop() for _ in range(len(buffer))]


def one_twice(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return [buffer.pop()] * 2


def flat(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return buffer.pop()


def half_a_group(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    return [buffer.pop()[:1]]


def nothing(args: Namespace, rollout_id: Any, buffer: list[Group], num_samples: int) -> Any:
    buffer.clear()


@pytest.mark.parametrize(
    ("fn", "kind", "says"),
    [
        (live_list, "type", "returned groups that are still in the buffer, which would train them again"),
        (leaves_them, "type", "hint      remove what you take: taken = buffer[:num_samples]; del buffer[:num_samples]"),
        (too_many, "length", "returned 3 groups, at most 2 were asked for"),
        (one_twice, "type", "returned one group several times"),
        (flat, "type", "returned a list of Sample, expected a list of groups"),
        (half_a_group, "length", "returned a group of 1 samples, expected groups of 2"),
        (nothing, "none", "returned None, expected a list of groups"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_would_corrupt_the_next_batch(fn: Callable[..., Any], kind: str, says: str) -> None:
    hook = hook_of(fn)
    with pytest.raises(HookError) as caught:
        hook(ARGS, None, [group(i) for i in range(3)], 2)
    assert caught.value.failure.kind == kind and says in str(caught.value)


def test_a_failed_filter_of_the_guide_leaves_the_buffer_as_it_was() -> None:
    hook = hook_of(lambda samples: [s for g in samples for s in g])
    buffer = [group(i) for i in range(3)]
    with pytest.raises(HookError, match="returned a list of Sample, expected a list of groups"):
        hook(ARGS, None, buffer, 2)
    assert [g[0].group_index for g in buffer] == [0, 1, 2]


def test_an_ambiguous_one_names_the_flag() -> None:
    with pytest.raises(UsageError, match="--hook-form buffer-filter="):
        bound("buffer_filter", "groups:anything")
    assert bound("buffer_filter", "groups:anything", forms={"buffer-filter": "groups"}).form == "groups"
