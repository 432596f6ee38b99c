"""The published flags, frozen in published_flags.json: names, types and defaults are a promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.config.draft import Draft
from miles.config.flags import Flag, flags_of
from miles.config.sections import FLAGS, SECTIONS

PUBLISHED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "published_flags.json").read_text())
OURS = {flag.option: flag for flag in FLAGS.values()}

WITH_FIXED_CHOICES = {"--lr-decay-style", "--lr-wsd-decay-style"}  # published as free text, of which these are read


def type_text(flag: Flag) -> str:
    """A flag in the words of the table."""
    if flag.kind == "either":
        return "BooleanOptionalAction"
    if flag.kind == "true":
        return "store_true"
    if flag.kind == "false":
        return f"store_false dest={flag.name}"
    if flag.kind == "json":
        return "json.loads"
    if flag.kind == "pattern":
        return "int or list of int"
    text = flag.kind + (" nargs=+" if flag.many else "")
    return f"{text} [{', '.join(flag.choices)}]" if flag.choices else text


def test_the_table_is_whole() -> None:
    assert len(PUBLISHED) == 218 + 32 + 4  # the table, the arguments of the fsdp backend, Megatron's that both read
    assert len({row["flag"] for row in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["flag"])
def test_type(row: dict[str, Any]) -> None:
    flag = OURS[row["flag"]]
    if flag.option in WITH_FIXED_CHOICES:
        assert row["type"] == "str" and flag.kind == "str"
    elif flag.option == "--loss-mask-type":
        assert row["type"] == "str [qwen, qwen3, distill_qwen]" and flag.choices[:3] == (
            "qwen",
            "qwen3",
            "distill_qwen",
        )
    elif flag.option == "--advantage-estimator":
        published = row["type"].removeprefix("str [").removesuffix("]").split(", ")
        assert list(flag.choices) == [*published, "rloo", "cispo", "dr_grpo"]
    else:
        assert type_text(flag) == row["type"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["flag"])
def test_default(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flag = OURS[row["flag"]]
    if row["default"] == "(required)":
        assert flag.required
    elif row["default"] == "(env-dependent)":
        assert flag.name == "rollout_function_path"
        paths = ["sglang_rollout.generate_rollout", "inference_rollout.inference_rollout_common.InferenceRolloutFn"]
        for switch, path in enumerate(paths):
            monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", str(switch))
            assert Draft()["rollout_function_path"] == f"miles.rollout.{path}"
    else:
        assert flag.default == row["default"]


def test_attribute_is_the_flag_except_for_flags_that_turn_something_off() -> None:
    for row in PUBLISHED:
        flag = OURS[row["flag"]]
        if flag.kind != "false":
            assert flag.name == flag.option.removeprefix("--").replace("-", "_")


def test_megatrons_flags_are_frozen_too() -> None:
    """Names and attributes are those of Megatron's launch scripts; a changed row is a changed promise."""
    frozen = json.loads((Path(__file__).parent / "megatron_flags.json").read_text())
    ours = {flag.option: flag for section in SECTIONS.values() for flag in flags_of(section)}
    assert {flag.option for flag in flags_of(SECTIONS["megatron"])} <= {row["flag"] for row in frozen}
    for row in frozen:
        flag = ours[row["flag"]]
        assert row == {"flag": flag.option, "type": type_text(flag), "default": flag.default, "sets": list(flag.sets)}


def test_no_flag_is_declared_twice() -> None:
    declared = [flag for section in SECTIONS.values() for flag in flags_of(section)]
    spellings = [spelling for flag in declared for spelling in (flag.option, *flag.aliases)]
    assert len({flag.name for flag in declared}) == len(declared) and len(set(spellings)) == len(spellings)


def test_every_flag_has_a_help_sentence() -> None:
    for flag in FLAGS.values():
        assert flag.help.strip() and len(flag.help) < 140, flag.option
