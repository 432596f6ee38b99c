"""Plug points on groups and flat samples: filters, buffer, all samples, post-processing, conversion, logging, data."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from hooks_helpers import bound, group, sample

from miles.errors import HookError, UsageError
from miles.hooks import Hook
from miles.types import DynamicFilterOutput

ARGS = Namespace(reward_key=None)


def seen(hook: Hook) -> list[Any]:
    entries: list[Any] = hook.target.__globals__["SEEN"]
    return entries


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("keep_output", 2, DynamicFilterOutput(True, "small")),
        ("keep_output", 1, DynamicFilterOutput(False, "small")),
        ("keep_bool", 2, DynamicFilterOutput(True)),
        ("keep_bool", 1, DynamicFilterOutput(False)),
        ("keep_nothing", 2, DynamicFilterOutput(False, "returned_none")),
    ],
)
def test_dynamic_filter(name: str, size: int, expected: DynamicFilterOutput) -> None:
    assert bound("dynamic_sampling_filter", f"groups:{name}")(ARGS, group(size)) == expected


def test_dynamic_filter_that_fails() -> None:
    with pytest.raises(HookError, match="std of one"):
        bound("dynamic_sampling_filter", "groups:filter_fails")(ARGS, group())
    tolerant = bound("dynamic_sampling_filter", "groups:filter_fails", policies={"dynamic-sampling-filter": "drop"})
    assert tolerant(ARGS, group()) == DynamicFilterOutput(False, "filter_failed")
    assert tolerant.stats.failures == 1


def test_an_async_filter_is_refused() -> None:
    with pytest.raises(UsageError, match=r"called synchronously(.|\n)*write `def`"):
        bound("dynamic_sampling_filter", "groups:async_filter")


def test_buffer_filter_with_four_arguments_takes_from_the_live_buffer() -> None:
    hook = bound("buffer_filter", "groups:pop_two")
    buffer = [[sample(i)] for i in range(5)]
    assert [g[0].index for g in hook(ARGS, None, buffer, 4)] == [0, 1]
    assert [g[0].index for g in buffer] == [2, 3, 4] and hook.form == "live-buffer"


def test_buffer_filter_of_the_guide_keeps_the_rest() -> None:
    hook = bound("buffer_filter", "groups:even_groups")
    buffer = [[sample(i)] for i in range(6)]
    assert [g[0].index for g in hook(ARGS, None, buffer, 2)] == [0, 2]
    assert [g[0].index for g in buffer] == [4] and hook.form == "groups"


def test_buffer_filter_may_not_return_more_than_asked_for() -> None:
    with pytest.raises(HookError, match="returned 3 groups, at most 2"):
        bound("buffer_filter", "groups:takes_too_many")(ARGS, None, [group()] * 3, 2)


def test_an_ambiguous_buffer_filter_names_the_flag() -> None:
    with pytest.raises(UsageError, match="--hook-form buffer-filter="):
        bound("buffer_filter", "groups:anything")
    assert bound("buffer_filter", "groups:anything", forms={"buffer-filter": "groups"}).form == "groups"


@pytest.mark.parametrize(
    ("name", "form", "removed"),
    [
        ("mark_groups", "groups", [True, False, False]),
        ("mark_unannotated", "groups", [True, False, False]),
        ("mark_flat", "samples", [False, True, True]),
        ("mark_flat_old_style", "samples", [False, True, True]),
    ],
)
def test_sample_filter(name: str, form: str, removed: list[bool]) -> None:
    hook = bound("rollout_sample_filter", f"groups:{name}")
    members = group()
    hook(ARGS, [members])
    assert hook.form == form and [s.remove_sample for s in members] == removed


def test_flat_sample_filter_sees_through_lists_of_several_samples() -> None:
    hook = bound("rollout_sample_filter", "groups:mark_flat")
    members = group()
    hook(ARGS, [[members]])
    assert [s.remove_sample for s in members] == [False, True, True]


def test_all_samples() -> None:
    three = bound("rollout_all_samples_process", "groups:process_three")
    two = bound("rollout_all_samples_process", "groups:process_two")
    seen(three).clear()
    three(ARGS, [group()], lambda n: ["prompt"] * n)
    two(ARGS, [group()], lambda n: ["prompt"] * n)
    assert seen(three) == [(1, ["prompt", "prompt"]), 1]
    assert (three.form, two.form) == ("get-samples", "groups")


def test_a_dropped_side_effect_is_skipped() -> None:
    key = "rollout-all-samples-process"
    hook = bound("rollout_all_samples_process", "groups:process_fails", policies={key: "drop"})
    assert hook(ARGS, [group()], lambda n: []) is None
    assert hook.stats.failures == 1


def test_reward_post_process() -> None:
    samples = group(2, reward=3.0)
    assert bound("custom_reward_post_process", "groups:post_process")(ARGS, samples) == ([3.0, 3.0], [2.0, 2.0])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("post_process_short", "raw_rewards has 1 entries for 3 samples"),
        ("post_process_nan", r"rewards\[0\] \(sample 0\): float nan, expected a finite number"),
        ("post_process_single", r"returned 3 values, expected \(raw_rewards, rewards\)"),
    ],
)
def test_reward_post_process_gone_wrong(name: str, says: str) -> None:
    with pytest.raises(HookError, match=says):
        bound("custom_reward_post_process", f"groups:{name}")(ARGS, group(3, reward=1.0))


def test_convert() -> None:
    hook = bound("custom_convert_samples_to_train_data", "groups:convert")
    assert hook(ARGS, group(2)) == {"tokens": [[1, 2, 3], [1, 2, 3]]}
    for name, says in (("convert_nothing", "returned None"), ("convert_wrong", "without 'tokens'")):
        with pytest.raises(HookError, match=says):
            bound("custom_convert_samples_to_train_data", f"groups:{name}")(ARGS, group())


def test_log_functions() -> None:
    hook = bound("custom_rollout_log_function", "groups:log_rollout")
    seen(hook).clear()
    assert hook(4, ARGS, group(), {"a": 1}, 2.5) is True
    assert seen(hook) == [(4, 3, {"a": 1}, 2.5)]
    assert bound("custom_rollout_log_function", "groups:log_returns_none")(0, ARGS, [], None, 0.0) is False
    assert bound("custom_eval_rollout_log_function", "groups:log_eval")(0, ARGS, {}, None) is True
    policies = {"custom-eval-rollout-log-function": "drop"}
    assert bound("custom_eval_rollout_log_function", "groups:log_fails", policies=policies)(0, ARGS, {}, None) is False


@pytest.mark.parametrize(("name", "form"), [("Source", "class"), ("make_source", "factory")])
def test_data_source(name: str, form: str) -> None:
    hook = bound("data_source", f"groups:{name}")
    source = hook(ARGS)
    assert hook.form == form and source.args is ARGS and hook.state_holder is source


@pytest.mark.parametrize(
    ("name", "says"), [("SourceWithoutSave", "without save, load"), ("SourceWithoutArgs", "SourceWithoutArgs")]
)
def test_data_source_found_wrong_before_it_is_made(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bound("data_source", f"groups:{name}")


def test_data_source_found_wrong_when_it_is_made() -> None:
    with pytest.raises(HookError, match="without get_samples, add_samples, save, load"):
        bound("data_source", "groups:make_nothing")(ARGS)
