"""A failed call, told and kept: the card, the bundle, its replay, the error budget."""

from __future__ import annotations

import asyncio
import json
import logging
import pdb
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooks_helpers import PLUGINS, bound, bound_hooks, group, path_of, sample

from miles.errors import ErrorBudgetExceeded, HookError
from miles.hooks import Hooks, RewardHook, bind
from miles.hooks.guard import MAX_BUNDLES, MIN_FAILURES
from miles.hooks.replay import read_bundle, replay_main
from miles.types import Failure, GenerateFnInput

ARGS = Namespace(reward_key=None, rm_url="http://grader", temperature=0.5, live=object(), limit=float("inf"))


def line_of(text: str, file: str = "rewards.py") -> int:
    lines = (PLUGINS / file).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return number


def reward_hooks(name: str, **settings: Any) -> tuple[Hooks, RewardHook]:
    hooks = bound_hooks("custom_rm", f"rewards:{name}", **settings)
    assert hooks.custom_rm is not None
    return hooks, hooks.custom_rm


def failure_of(hook: RewardHook, given: Any = None) -> HookError:
    with pytest.raises(HookError) as caught:
        asyncio.run(hook.call_async(ARGS, given or sample(24, group_index=3)))
    return caught.value


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("divides", "# the line that the card must name", "ZeroDivisionError: division by zero"),
        ("divides_in_thread", "raise ValueError(f", "ValueError: cannot parse '4'"),
        ("library_call", 'return json.loads("{not json")', "JSONDecodeError: Expecting property name"),
        ("odd_fails", 'raise RuntimeError("odd")', "RuntimeError: odd"),
    ],
)
def test_the_card_names_the_users_line(name: str, line: str, message: str) -> None:
    _, hook = reward_hooks(name)
    error = failure_of(hook, sample(25, group_index=3))
    number = line_of(line)
    assert error.failure.location.endswith(f"rewards.py:{number}")
    card = str(error)
    assert card.startswith(f"--custom-rm-path {path_of(f'rewards:{name}')} failed at ")
    assert f"rewards.py:{number}\n  {number} | " in card and line.split(" #")[0] in card
    assert message in card
    assert "sample    25 (group 3), pending: prompt '2+2=', response '4' (1 tokens), label '4'" in card
    assert "--hook-policy custom-rm=" in card
    assert isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, HookError)


def test_the_card_of_a_bad_value_names_the_definition_and_helps() -> None:
    _, hook = reward_hooks("from_metadata")
    card = str(failure_of(hook, sample(metadata={"value": {"acc": 1}})))
    assert f"rewards.py:{line_of('async def from_metadata')}" in card
    assert "returned a dict, expected a number" in card
    assert "hint      name the score: --reward-key; keys: 'acc'" in card


def test_the_hint_of_a_missing_key_lists_those_that_are_there() -> None:
    _, hook = reward_hooks("reads_verdict")
    assert "hint      metadata of this sample has 'level'" in str(failure_of(hook, sample(metadata={"level": 3})))


def test_a_tolerated_failure_is_told_once_per_place(caplog: pytest.LogCaptureFixture) -> None:
    _, hook = reward_hooks("divides", policies={"custom-rm": "drop"})
    with caplog.at_level(logging.WARNING, logger="miles.hooks"):
        for _ in range(MIN_FAILURES - 1):
            assert isinstance(asyncio.run(hook.call_async(ARGS, sample())), Failure)
    assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text


# ---- bundles and replay --------------------------------------------------------------------------------------------


def bundle_of(name: str, folder: Path, given: Any = None) -> Path:
    hooks, hook = reward_hooks(name)
    hooks.set_bundle_dir(folder / "failures")
    error = failure_of(hook, given)
    assert error.failure.bundle is not None and f"miles replay {error.failure.bundle} --pdb" in str(error)
    return Path(error.failure.bundle)


def test_the_bundle_holds_the_call(tmp_path: Path) -> None:
    given = sample(24, metadata={"tensor": torch.arange(3), "array": np.ones((2, 2)), "live": object()})
    given.tool_calls = 2  # type: ignore[attr-defined]
    folder = bundle_of("divides", tmp_path, given)
    assert folder.name == "000001-custom-rm"
    content = json.loads((folder / "call.json").read_text())
    assert content["flag"] == "--custom-rm-path" and content["path"] == path_of("rewards:divides")
    assert content["args"]["rm_url"] == "http://grader" and content["args"]["limit"] == {"$float": "inf"}
    assert "object object at" in content["args"]["live"]["$unrecorded"]
    assert "ZeroDivisionError" in (folder / "traceback.txt").read_text()
    bundle = read_bundle(folder)
    args, again = bundle.inputs
    assert args.temperature == 0.5 and again.tool_calls == 2 and again.index == 24
    assert torch.equal(again.metadata["tensor"], torch.arange(3))
    assert again.metadata["array"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(AttributeError, match="does not hold this object"):
        args.live.anything  # noqa: B018


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("divides", sample(1), "ZeroDivisionError: division by zero"),
        ("divides_in_thread", sample(1, response="x"), "ValueError: cannot parse 'x'"),
        ("from_metadata", sample(1, metadata={"value": None}), "returned None, expected a number"),
        ("trl_none", None, "returned None, expected a number"),
    ],
)
def test_replay_reproduces(
    name: str, given: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks, hook = reward_hooks(name)
    hooks.set_bundle_dir(tmp_path)
    with pytest.raises(HookError) as caught:
        if given is None:
            asyncio.run(hook.call_batch_async(ARGS, group()))
        else:
            asyncio.run(hook.call_async(ARGS, given))
    assert replay_main([str(caught.value.failure.bundle)]) == 1
    shown = capsys.readouterr().out
    assert shown.count(says) >= 2, "once as recorded, once as it fails again"
    assert "miles/hooks" not in shown


def test_replay_of_a_plug_in_that_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plug_in = tmp_path / "leaves.py"
    plug_in.write_text("def grade(args, sample):\n    raise SystemExit(0)\n")
    hooks = bind(Namespace(custom_rm_path=f"{plug_in}:grade"))
    hooks.set_bundle_dir(tmp_path)
    assert hooks.custom_rm is not None
    with pytest.raises(HookError) as caught:
        asyncio.run(hooks.custom_rm.call_async(ARGS, sample()))
    assert replay_main([str(caught.value.failure.bundle)]) == 1
    assert "raise SystemExit(0)" in capsys.readouterr().out


def test_replay_of_a_mended_plug_in_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mended_reward.py"
    file.write_text("async def grade(args, sample):\n    return len(sample.label) / 0\n")
    hooks = bound_hooks("custom_rm", "x:y", args={"custom_rm_path": f"{file}:grade"})
    hooks.set_bundle_dir(tmp_path)
    assert hooks.custom_rm is not None
    error = failure_of(hooks.custom_rm)
    folder = Path(str(error.failure.bundle))
    content = json.loads((folder / "call.json").read_text())
    mended = tmp_path / "mended_copy.py"
    mended.write_text("async def grade(args, sample):\n    return len(sample.label) / 2\n")
    content["path"] = f"{mended}:grade"
    (folder / "call.json").write_text(json.dumps(content))
    assert replay_main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "result    0.5" in shown and "file has changed since" in shown


def test_replay_under_the_debugger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle_of("divides", tmp_path)
    stopped: list[str] = []
    monkeypatch.setattr(pdb, "post_mortem", lambda tb: stopped.append(str(tb.tb_frame.f_code.co_filename)))
    assert replay_main([str(folder), "--pdb"]) == 1 and len(stopped) == 1


def test_replay_of_a_generate_function_and_of_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks = bound_hooks("custom_generate_function", "generates:nothing")
    hooks.set_bundle_dir(tmp_path)
    assert hooks.custom_generate_function is not None
    given = GenerateFnInput(Namespace(args=ARGS), sample(response="before"), {"temperature": 1.0}, True)
    with pytest.raises(HookError) as caught:
        asyncio.run(hooks.custom_generate_function.call_async(given))
    bundle = Path(str(caught.value.failure.bundle))
    (again,) = read_bundle(bundle).inputs
    assert (again.sample.response, again.sampling_params, again.evaluation) == ("before", {"temperature": 1.0}, True)
    assert again.args.rm_url == "http://grader"
    assert replay_main([str(bundle)]) == 1

    hooks = bound_hooks("dynamic_sampling_filter", "groups:filter_fails")
    hooks.set_bundle_dir(tmp_path)
    assert hooks.dynamic_sampling_filter is not None
    with pytest.raises(HookError) as caught:
        hooks.dynamic_sampling_filter(ARGS, group())
    assert Path(str(caught.value.failure.bundle)).name == "000002-dynamic-sampling-filter"
    assert replay_main([str(caught.value.failure.bundle)]) == 1
    assert "std of one" in capsys.readouterr().out


def test_only_so_many_bundles(tmp_path: Path) -> None:
    hooks, hook = reward_hooks("divides", policies={"custom-rm": "drop"}, error_budget=1.0)
    hooks.set_bundle_dir(tmp_path)
    for _ in range(MAX_BUNDLES + 3):
        asyncio.run(hook.call_async(ARGS, sample()))
    assert len(list(tmp_path.iterdir())) == MAX_BUNDLES and hook.stats.failures == MAX_BUNDLES + 3


def test_a_bundle_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("a file in the way")
    hooks, hook = reward_hooks("divides")
    hooks.set_bundle_dir(tmp_path / "failures")
    error = failure_of(hook)
    assert "ZeroDivisionError" in str(error) and error.failure.bundle is None


# ---- the error budget ----------------------------------------------------------------------------------------------


def call_all(hooks: Hooks, failing: int, good: int) -> list[Any]:
    """One rollout: `good` calls that succeed, then `failing` ones that do not."""
    hook = hooks.custom_rm
    assert hook is not None
    hooks.begin_rollout()
    values = [{"value": 1.0}] * good + [{"value": None}] * failing
    return [asyncio.run(hook.call_async(ARGS, sample(metadata=v))) for v in values]


@pytest.mark.parametrize(
    ("budget", "good", "failing", "ends"),
    [
        (0.05, 0, MIN_FAILURES - 1, False),
        (0.05, 0, MIN_FAILURES, True),
        (0.05, 200, MIN_FAILURES, False),
        (0.05, 90, MIN_FAILURES, True),
        (0.0, 1000, MIN_FAILURES, True),
        (1.0, 0, 50, False),
    ],
)
def test_error_budget(budget: float, good: int, failing: int, ends: bool) -> None:
    hooks, _ = reward_hooks("from_metadata", policies={"custom-rm": "drop"}, error_budget=budget)
    if ends:
        with pytest.raises(ErrorBudgetExceeded, match=f"--hook-error-budget {budget:g} tolerates(.|\n)*rewards.py:"):
            call_all(hooks, failing, good)
    else:
        call_all(hooks, failing, good)


def test_early_failures_weigh_no_more_than_late_ones() -> None:
    hooks, _ = reward_hooks("from_metadata", policies={"custom-rm": "drop"})
    call_all(hooks, failing=0, good=200)
    assert len(call_all(hooks, failing=10, good=0)) == 10
    with pytest.raises(ErrorBudgetExceeded):
        call_all(hooks, failing=11, good=0)


def test_each_rollout_has_its_own_budget() -> None:
    hooks, hook = reward_hooks("from_metadata", policies={"custom-rm": "drop"})
    for _ in range(5):
        call_all(hooks, failing=MIN_FAILURES - 1, good=0)
    assert hook.stats.failures == 5 * (MIN_FAILURES - 1)


# ---- what a run records --------------------------------------------------------------------------------------------


def test_stats_and_sources() -> None:
    hooks, hook = reward_hooks("annotated")
    assert hooks.stats() == {}
    asyncio.run(hook.call_batch_async(ARGS, group()))
    stats = hooks.stats()
    assert stats["hooks/custom_rm/calls"] == 3 and stats["hooks/custom_rm/failures"] == 0
    assert stats["hooks/custom_rm/total_s"] >= stats["hooks/custom_rm/max_s"] > 0
    source = hooks.sources()["--custom-rm-path"]
    assert source["file"] == str(PLUGINS / "rewards.py") and source["line"] == line_of("async def annotated")
    assert len(source["sha256"]) == 64 and source["form"] == "sample"


def test_another_path_under_the_same_settings() -> None:
    hooks, _ = reward_hooks("annotated", policies={"custom-rm": "drop"})
    extra = hooks.bind_path("custom_rm", path_of("rewards:divides"))
    assert isinstance(extra, RewardHook)
    assert isinstance(asyncio.run(extra.call_async(ARGS, sample())), Failure)
    assert hooks.stats()["hooks/custom_rm/failures"] == 1
    assert bound("custom_rm", "rewards:annotated").stats.calls == 0
