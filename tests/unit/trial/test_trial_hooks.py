"""`miles hooks`: the catalogue as JSON, and the forms that plug-ins were bound as."""

from __future__ import annotations

import json

import pytest
from trial_helpers import FLAGS, path_of, run

from miles.hooks import CATALOG


def test_json_holds_the_whole_catalogue() -> None:
    records = json.loads(run("hooks", "--json").out)
    assert [r["name"] for r in records] == list(CATALOG)
    for record, point in zip(records, CATALOG.values(), strict=True):
        assert record["flag"] == point.flag and record["signature"] == point.canonical
        assert record["when"] == point.when and record["process"] == point.process
        assert record["backends"] == list(point.backends) and record["pure"] == point.pure
        assert [f["name"] for f in record["forms"]] == [f.name for f in point.forms]
        assert record["replayable"] == (record["why_not_replayable"] is None) == (not point.replay)
        assert record["policies"][0] == "raise"
    (one,) = json.loads(run("hooks", "custom-rm", "--json").out)
    assert one["policies"] == ["raise", "drop", "mask", "retry:N"] and one["default"] is None


def test_forms_of_plug_ins_by_themselves() -> None:
    done = run("hooks", "--custom-rm-path", path_of("whole_group"), "--custom-loss-function-path", path_of("surrogate"))
    assert done.status == 0, done.err
    assert "  samples  " in done.row("--custom-rm-path")
    assert "  parallel-state  " in done.row("--custom-loss-function-path")
    assert done.out.endswith("2 plug-ins bound, no problems.\n")
    one = run("hooks", f"--custom-rm-path={path_of('exact')}", "--hook-form", "custom-rm=sample")
    assert "  sample (in a thread)  " in one.row("--custom-rm-path")
    assert one.out.endswith("1 plug-in bound, no problems.\n")


def test_forms_of_a_run(tmp_path: pytest.TempPathFactory) -> None:
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in zip(FLAGS[::2], FLAGS[1::2], strict=True)]
    file = tmp_path / "run.yaml"  # type: ignore[operator]
    file.write_text("\n".join([*lines, f"custom-rm-path: {path_of('exact')}"]))
    done = run("hooks", "--config", str(file))
    assert done.status == 0 and "  sample-or-samples (in a thread)  " in done.row("--custom-rm-path")
    assert "  class  " in done.row("--data-source-path")


def test_a_flag_alone_shows_the_plug_point() -> None:
    assert run("hooks", "--custom-rm-path").out == run("hooks", "custom-rm").out
    shown = run("hooks", "rollout-function").out
    assert "not called by `miles check`" in shown and CATALOG["rollout_function"].replay in shown


def test_wrong_plug_ins_are_told() -> None:
    done = run("hooks", "--custom-rm-path", path_of("exactly"))
    assert done.status == 2 and "did you mean" in done.err
