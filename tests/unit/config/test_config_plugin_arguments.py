"""`add_arguments` of rollout and generate functions: their options are flags like all others."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from config_helpers import REQUIRED, write

from miles.config import parse
from miles.config.dump import as_yaml
from miles.errors import UsageError
from miles.hooks import function_registry

RUN = [*REQUIRED, "--rollout-function-path", "test:rollout"]
FLAGS = [*RUN, "--custom-generate-function-path", "test:generate"]


@pytest.fixture(autouse=True)
def rollout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "1")
    with function_registry.temporary("test:rollout", lambda args, rollout_id, data_source, evaluation=False: []):
        yield


def generate_with(add: Callable[[ArgumentParser], None]) -> Any:
    async def generate(input: Any) -> Any: ...

    generate.add_arguments = add  # type: ignore[attr-defined]
    return generate


def add_some(parser: ArgumentParser) -> None:
    parser.add_argument("--generate-max-turns", type=int, default=16)
    parser.add_argument("--generate-multi-samples", action="store_true")
    parser.add_argument("--no-tools", dest="tools", action="store_false")
    parser.add_argument("--tool-names", nargs="+", default=["search"])
    parser.add_argument("--mode", choices=["a", "b"], default="a")
    parser.add_argument("--cost", type=float, default="0.5")


@pytest.fixture
def plug_in() -> Iterator[list[str]]:
    with function_registry.temporary("test:generate", generate_with(add_some)):
        yield FLAGS


def test_defaults_and_command_line(plug_in: list[str]) -> None:
    _, args = parse(plug_in)
    assert (args.generate_max_turns, args.generate_multi_samples, args.tools) == (16, False, True)
    assert (args.tool_names, args.mode, args.cost) == (["search"], "a", 0.5)
    config, args = parse([*plug_in, "--generate-max-turns", "3", "--no-tools", "--tool-names", "x", "y"])
    assert (args.generate_max_turns, args.tools, args.tool_names) == (3, False, ["x", "y"])
    assert config.extras["generate_max_turns"] == 3 and config.origins["generate_max_turns"] == "command line"
    assert not any("generate-max-turns" in notice for notice in config.notices)


def test_file(plug_in: list[str], tmp_path: Path) -> None:
    text = """\
rollout-function-path: test:rollout
custom-generate-function-path: test:generate
generate_max_turns: 5
no-tools: true
tool-names: [x]
cost: 1e-3
"""
    _, args = parse([*REQUIRED, "--generate-max-turns", "6", "--config", write(tmp_path, text)])
    assert (args.generate_max_turns, args.tools, args.tool_names, args.cost) == (6, False, ["x"], 1e-3)


def test_round_trip(plug_in: list[str], tmp_path: Path) -> None:
    config, args = parse([*plug_in, "--generate-max-turns", "5", "--generate-multi-samples", "--tool-names", "x", "y"])
    again, args_again = parse(["--config", write(tmp_path, as_yaml(config))])
    assert again == config and args_again.tool_names == args.tool_names == ["x", "y"]


MISTAKES = [
    ("generate-max-turns: many", "run.yaml:1: --generate-max-turns: expected another value, got 'many'."),
    ("generate-multi-samples: 3", "run.yaml:1: --generate-multi-samples: expected true or false, got 3."),
    ("mode: c", "run.yaml:1: --mode: expected one of a, b, got 'c'."),
    ("generate-max-turn: 3", "run.yaml:1: --generate-max-turn: no such flag. Did you mean --generate-max-turns"),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_in_the_file(plug_in: list[str], tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*plug_in, "--config", write(tmp_path, text)])
    assert sentence in str(caught.value)


def test_mistake_on_the_command_line(plug_in: list[str]) -> None:
    with pytest.raises(UsageError, match="--generate-max-turns: invalid int value: 'x'"):
        parse([*plug_in, "--generate-max-turns", "x"])


def test_the_option_is_unknown_without_the_plug_in() -> None:
    with pytest.raises(UsageError, match="--generate-max-turns: no such flag"):
        parse([*RUN, "--generate-max-turns", "3"])


def test_a_required_option() -> None:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--endpoint", required=True)

    with function_registry.temporary("test:generate", generate_with(add)):
        with pytest.raises(UsageError, match="--endpoint: required by a plug-in, but not given"):
            parse(FLAGS)
        assert parse([*FLAGS, "--endpoint", "http://x"])[1].endpoint == "http://x"


def test_a_plug_in_may_declare_a_plug_point_but_no_other_flag_of_miles() -> None:
    def again(parser: ArgumentParser) -> None:
        parser.add_argument("--custom-agent-function-path", type=str)

    def taken(parser: ArgumentParser) -> None:
        parser.add_argument_group("mine").add_argument("--lr", type=str)

    with function_registry.temporary("test:generate", generate_with(again)):
        assert parse(FLAGS)[1].custom_agent_function_path is None
        assert parse([*FLAGS, "--custom-agent-function-path", "a.b"])[0].hooks.custom_agent_function_path == "a.b"
    with (
        function_registry.temporary("test:generate", generate_with(taken)),
        pytest.raises(UsageError, match="--lr: a plug-in adds this flag, but it is one of miles"),
    ):
        parse(FLAGS)


def test_positional_arguments_are_refused() -> None:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument("file", nargs=argparse.OPTIONAL)

    with (
        function_registry.temporary("test:generate", generate_with(add)),
        pytest.raises(UsageError, match="not positional arguments"),
    ):
        parse(FLAGS)
