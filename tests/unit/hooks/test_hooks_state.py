"""What plug-ins remember: every kind of object, saved under a key of its own and given back."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from typing import Any

import pytest

from miles.errors import HookReport
from miles.hooks import Hooks, bind, function_registry
from miles.types import RolloutFnConstructorInput


class Counter:
    """Callable like any plug-in; counts what it is told to."""

    def __init__(self, given: Any = None) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> Any: ...

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Reward(Counter):
    def __call__(self, args: Namespace, sample: Any) -> float:  # type: ignore[override]
        return 1.0


class Generate(Counter):
    def __call__(self, args: Namespace, sample: Any, sampling_params: Any) -> Any:  # type: ignore[override]
        return sample


class Filter(Counter):
    def __call__(self, args: Namespace, samples: Any) -> bool:  # type: ignore[override]
        return True


class Loss(Counter):
    def __call__(self, args: Namespace, batch: Any, logits: Any, reduce: Any) -> Any:  # type: ignore[override]
        return logits.sum(), {}

    def reducer(self, total_lengths: Any, response_lengths: Any, loss_masks: Any, per_token: bool = False) -> Any:
        """A method: its object holds the state."""


class Source(Counter):
    def get_samples(self, num_samples: int) -> list[Any]:
        return []

    def add_samples(self, samples: list[Any]) -> None: ...
    def save(self, rollout_id: int) -> None: ...
    def load(self, rollout_id: int | None = None) -> None: ...


class Rollout(Counter):
    def __call__(self, input: Any) -> Any: ...  # type: ignore[override]


POINTS = {
    "custom_rm": Reward,
    "custom_generate_function": Generate,
    "dynamic_sampling_filter": Filter(),
    "custom_loss_function": Loss(),
    "custom_pg_loss_reducer_function": Loss().reducer,
    "data_source": Source,
    "rollout_function": Rollout,
}


def bound() -> Hooks:
    """All of them, as a run has them after its start."""
    args = Namespace(**{f"{name}_path": f"state:{name}" for name in POINTS})
    with ExitStack() as stack:
        for name, target in POINTS.items():
            stack.enter_context(function_registry.temporary(f"state:{name}", target))
        hooks = bind(args)
    assert hooks.data_source is not None and hooks.rollout_function is not None
    source = hooks.data_source(args)
    hooks.rollout_function.build(RolloutFnConstructorInput(args=args, data_source=source))
    return hooks


def holders(hooks: Hooks) -> dict[str, Any]:
    return {hook.point.name: hook.state_holder for hook in hooks if hook.has_state}


def test_every_kind_of_plug_in_is_saved_and_restored() -> None:
    hooks = bound()
    found = holders(hooks)
    # Without a path of its own, evaluation is the rollout function, which this run does not build for it.
    assert set(found) == set(POINTS)
    for number, holder in enumerate(found.values()):
        holder.count = number
    saved = hooks.state_dict()
    assert {name: state["count"] for name, state in saved.items()} == dict(zip(found, range(len(found))))

    later = bound()
    for holder in holders(later).values():
        holder.count = -1
    later.load_state_dict(saved)
    assert {name: holder.count for name, holder in holders(later).items()} == dict(zip(found, range(len(found))))


def test_two_plug_ins_of_one_plug_point_do_not_share_a_state() -> None:
    def both() -> tuple[Hooks, Any]:
        with function_registry.temporary("state:one", Reward), function_registry.temporary("state:two", Reward):
            hooks = bind(Namespace(custom_rm_path="state:one"))
            return hooks, hooks.bind_path("custom_rm", "state:two")

    hooks, second = both()
    assert hooks.custom_rm is not None
    hooks.custom_rm.state_holder.count, second.state_holder.count = 1, 2
    saved = hooks.state_dict()
    assert saved == {"custom_rm": {"count": 1}, "custom_rm state:two": {"count": 2}}

    hooks, second = both()
    hooks.load_state_dict(saved)
    assert hooks.custom_rm is not None
    assert (hooks.custom_rm.state_holder.count, second.state_holder.count) == (1, 2)


def test_a_plug_in_that_is_bound_after_the_start_gets_its_state_then() -> None:
    saved = {"custom_rm state:two": {"count": 2}}
    hooks = bind(Namespace())
    hooks.load_state_dict(saved)
    assert hooks.state_dict() == saved, "a run that saves before it has called the plug-in again loses nothing"
    with function_registry.temporary("state:two", Reward):
        assert hooks.bind_path("custom_rm", "state:two").state_holder.count == 2
    assert hooks.state_dict() == saved


def test_state_without_a_plug_in_is_refused() -> None:
    with pytest.raises(HookReport, match="--custom-rm-path\n  found     saved state in the checkpoint, but no plug-in"):
        bind(Namespace()).load_state_dict({"custom_rm": {"count": 1}})


def test_a_state_that_cannot_be_given_back_is_refused_before_the_run() -> None:
    class Half:
        def __call__(self, args: Namespace, batch: Any, logits: Any, reduce: Any) -> Any: ...
        def state_dict(self) -> dict[str, int]:
            return {}

    with (
        function_registry.temporary("state:half", Half()),
        pytest.raises(HookReport, match="with state_dict but without load_state_dict"),
    ):
        bind(Namespace(custom_loss_function_path="state:half"))
