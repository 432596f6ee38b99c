"""`miles check`, `miles hooks`, `miles new`, `miles replay` as functions that print and return an exit status."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miles.errors import HookReport, UsageError
from miles.hooks import CATALOG
from miles.hooks.check import bound_main, list_main
from miles.hooks.replay import replay_main

SETTINGS = {"hook_policy": {}, "hook_form": {}, "hook_timeout_s": None, "hook_error_budget": 0.05}


def config(**changes: Any) -> Any:
    return SimpleNamespace(run=SimpleNamespace(**{**SETTINGS, **changes}), notices=["8 GPUs are not here: 1 CPU"])


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    file = tmp_path / "checked_plugins.py"
    file.write_text(
        "def grade(args, sample):\n    return 1.0\n\n\nclass Judge:\n    async def __call__(self, args, sample):\n"
        "        return 1.0\n\n\ndef provide(pre_process, post_process):\n    pass\n"
    )
    return str(file)


def test_check_prints_what_was_bound(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    provider = f"{plugin}:provide"
    args = Namespace(custom_rm_path=f"{plugin}:grade", custom_model_provider_path=provider, train_backend="fsdp")
    assert bound_main(config(hook_policy={"custom-rm": "drop"}), args) == 0
    shown = capsys.readouterr().out
    assert "note: 8 GPUs are not here: 1 CPU" in shown
    row = next(line for line in shown.splitlines() if line.startswith("--custom-rm-path"))
    assert row.split() == [
        "--custom-rm-path",
        f"{plugin}:grade",
        "sample-or-samples",
        "(in",
        "a",
        "thread)",
        f"{plugin}:1",
        "drop",
    ]
    assert "--custom-model-provider-path is never called with --train-backend fsdp" in shown
    assert "2 plug-ins bound, no problems." in shown


def test_check_shows_an_object_of_a_class(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bound_main(config(), Namespace(custom_rm_path=f"{plugin}:Judge")) == 0
    assert "sample-or-samples (object of the class)" in capsys.readouterr().out


def test_check_of_a_broken_one(plugin: str) -> None:
    with pytest.raises(HookReport, match="did you mean"):
        bound_main(config(), Namespace(custom_rm_path=f"{plugin}:grad"))


def test_hooks_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_main([]) == 0
    listed = capsys.readouterr().out
    for point in CATALOG.values():
        assert point.flag in listed
        for spelling in (point.key, point.flag, point.name):
            assert list_main([spelling]) == 0
            shown = capsys.readouterr().out
            assert point.when in shown and point.contract in shown
            for form in point.forms:
                assert form.name in shown and form.recognised_by in shown
    with pytest.raises(UsageError, match="Did you mean custom-rm"):
        list_main(["custom-rmm"])


def test_replay_of_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"but there is no such folder"):
        replay_main([str(tmp_path / "none")])
    with pytest.raises(UsageError, match=r"but it has no call\.json(.|\n)*RUN_DIR/failures"):
        replay_main([str(tmp_path)])
    for content, says in (
        ("{", "expected a folder with the call.json"),
        ("[]", "expected the JSON object of a failed call, got a list"),
        ("{}", "another version"),
        ('{"version": 1, "plug_point": "custom_rm"}', "damaged or incomplete"),
    ):
        (tmp_path / "call.json").write_text(content)
        with pytest.raises(UsageError, match=says):
            replay_main([str(tmp_path)])
