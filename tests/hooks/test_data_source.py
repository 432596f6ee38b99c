"""--data-source-path: made once, before the first rollout; then asked, given back to, saved and loaded."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
from hooks_helpers import bound
from hooks_stage import PER_PROMPT, Stage

from miles.errors import HookError, UsageError
from miles.rollout.loop_thread import get_async_loop
from miles.types import Sample

MakeStage = Callable[..., Stage]


class Prompts:
    """A source of its own: no base class, no file."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.calls, self.next = args, [], 0

    def note(self, *what: Any) -> None:
        self.calls.append((*what, threading.current_thread()))

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        self.note("get", num_samples)
        groups = []
        for _ in range(num_samples):
            first, self.next = self.next, self.next + PER_PROMPT
            members = [Sample(group_index=first, index=first + i, prompt="1+1=?", label="2") for i in range(PER_PROMPT)]
            groups.append(members)
        return groups

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.note("add", samples)

    def save(self, rollout_id: int) -> None:
        self.note("save", rollout_id)

    def load(self, rollout_id: int | None = None) -> None:
        self.note("load", rollout_id)


def test_the_published_calls(stage: MakeStage) -> None:
    """`cls(args)`; `load(-1)` before the first rollout; per rollout `get_samples(n)` and `add_samples([])`."""
    s = stage("--over-sampling-batch-size", 3, data_source=Prompts)
    source = s.manager.data_source
    assert isinstance(source, Prompts) and source.args is s.args and s.hooks.data_source.form == "class"
    here, loop = threading.current_thread(), get_async_loop().thread
    assert source.calls == [("load", -1, here)]
    s.rollout(0)
    assert source.calls[1:] == [("get", 3, loop), ("add", [], here)], "also where there is nothing to give back"
    s.rollout(1)
    s.manager.save(1)
    assert source.calls[3:] == [("get", 3, loop), ("add", [], here), ("save", 1, here)]
    assert s.hooks.data_source.stats.calls == 7, "each of them through the door"


def test_a_factory_will_do(stage: MakeStage) -> None:
    def make(args: Namespace) -> Prompts:
        return Prompts(args)

    s = stage(data_source=make)
    assert s.hooks.data_source.form == "factory" and s.rollout().samples == 2 * PER_PROMPT


def test_what_was_cut_short_comes_back(stage: MakeStage) -> None:
    s = stage("--partial-rollout", "--over-sampling-batch-size", 3, data_source=Prompts)
    s.engine.delay_s = {0: 5.0}
    s.rollout()
    ((_, returned, _),) = [call for call in s.manager.data_source.calls if call[0] == "add"]
    assert [[m.index for m in g] for g in returned] == [[0, 1]]
    assert all(m.status == Sample.Status.ABORTED for m in returned[0])


def test_without_a_global_data_set_nothing_is_saved_or_loaded(stage: MakeStage) -> None:
    def rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        raise AssertionError("not called here")

    s = stage("--disable-rollout-global-dataset", data_source=Prompts, rollout_function=rollout)
    s.manager.save(0)
    assert s.manager.data_source.calls == []


def test_an_epoch_is_as_long_as_its_dataset(stage: MakeStage) -> None:
    class Counted(Prompts):
        dataset = range(7)

    assert stage(data_source=Counted).manager.num_rollout_per_epoch() == 3
    with pytest.raises(UsageError, match=r"--num-epoch(.|\n)*Give --num-rollout"):
        stage(data_source=Prompts).manager.num_rollout_per_epoch()


def test_a_source_may_keep_its_state_itself() -> None:
    hooks = bound("data_source", "groups:Source", whole_run=True)
    source = hooks.data_source(Namespace())
    assert hooks.data_source.state_holder is source and hooks.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "says"), [("SourceWithoutSave", "without save, load"), ("SourceWithoutArgs", "SourceWithoutArgs")]
)
def test_found_wrong_before_it_is_made(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bound("data_source", f"groups:{name}")


def test_found_wrong_when_it_is_made() -> None:
    with pytest.raises(HookError, match="without get_samples, add_samples, save, load"):
        bound("data_source", "groups:make_nothing")(Namespace())


def source_of(**methods: Any) -> type[Prompts]:
    return type("Broken", (Prompts,), methods)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"get_samples": lambda self, n: []}, "get_samples(2) returned no groups while rollout 0 still needs 2"),
        ({"get_samples": lambda self, n: None}, "get_samples(2) returned no groups while rollout 0 still needs 2"),
        ({"get_samples": lambda self, n: [Sample()] * n}, "get_samples(2) returned a list of Sample, expected groups"),
        ({"get_samples": lambda self, n: [[Sample()]] * n}, "get_samples(2) returned a group of 1 samples"),
        ({"add_samples": lambda self, groups: {}["no"]}, "KeyError: 'no'"),
    ],
)
def test_what_it_must_not_return(broken: dict[str, Any], says: str, stage: MakeStage) -> None:
    with pytest.raises(HookError) as caught:
        stage(data_source=source_of(**broken)).rollout()
    assert str(caught.value).startswith("--data-source-path test:data_source failed at ") and says in str(caught.value)
