"""Tool calls in what models write: what counts as a call, and that everything else is text."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from typing import Any, ClassVar

import pytest
from chat_tools import SPECS
from hypothesis import example, given
from hypothesis import strategies as st

from miles.errors import FlagError
from miles.rollout.generate_utils.tool_call_parsers import FORMATS, ToolCall
from miles.rollout.generate_utils.tool_call_utils import create_tool_call_parser

ADD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
YEAR = '{"name": "year", "arguments": {}}'
DEEP = "[" * 100_000


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def parsed(form: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    rest, calls = create_tool_call_parser(SPECS, form).parse_non_stream(text)
    assert [call.tool_index for call in calls] == list(range(len(calls)))
    return rest, [(call.name, json.loads(call.parameters)) for call in calls]


ADDS, YEARS = ("add", {"a": 1, "b": 2}), ("year", {})

CALLS = [
    ("qwen25", f"I add.\n{tagged(ADD)}<|im_end|>", "I add.\n", [ADDS]),
    ("qwen", tagged(ADD), "", [ADDS]),
    ("hermes", f"<tool_call>{ADD}</tool_call>", "", [ADDS]),
    ("hermes", f"a {tagged(ADD)} b {tagged(YEAR)} c", "a ", [ADDS, YEARS]),
    ("hermes", tagged(f"[{ADD}, {YEAR}]"), "", [ADDS, YEARS]),
    ("hermes", tagged('{"name": "year"}'), "", [YEARS]),
    ("hermes", tagged('{"name": "year", "parameters": {}}'), "", [YEARS]),
    ("hermes", tagged('{"name": "year", "arguments": "{}"}'), "", [YEARS]),
    ("hermes", tagged('{"name": "add", "arguments": {"a": "</tool_call>"}}'), "", [("add", {"a": "</tool_call>"})]),
    ("hermes", tagged('{"name": "add", "arguments": {"a": "<tool_call>"}}'), "", [("add", {"a": "<tool_call>"})]),
    ("hermes", tagged('{"name": "add", "arguments": {"a": "é\\n"}}'), "", [("add", {"a": "é\n"})]),
    ("hermes", f"<tool_call>oops</tool_call>{tagged(YEAR)}", "<tool_call>oops</tool_call>", [YEARS]),
    ("llama3", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>', "", [ADDS]),
    ("llama3", '{"name": "year", "parameters": {}}', "", [YEARS]),
    ("llama3", f"Well. <|python_tag|>{ADD}; {YEAR}", "Well. ", [ADDS, YEARS]),
    ("llama3", f" {ADD};nonsense", "", [ADDS]),
]


@pytest.mark.parametrize(("form", "text", "rest", "calls"), CALLS)
def test_calls(form: str, text: str, rest: str, calls: list[Any]) -> None:
    assert parsed(form, text) == (rest, calls)


TEXT = [
    "",
    "no call at all",
    "<tool_call></tool_call>",
    tagged('{"name": "add", "arguments": {"a": 1'),
    tagged("{'name': 'add', 'arguments': {}}"),
    tagged('{"name": "add", "arguments": [1, 2]}'),
    tagged('{"name": "add", "arguments": "1, 2"}'),
    tagged('{"name": "add", "arguments": null}'),
    tagged('{"name": "subtract", "arguments": {}}'),
    tagged('{"name": ["add"], "arguments": {}}'),
    tagged('{"arguments": {"a": 1}}'),
    tagged(f"[{ADD}, 3]"),
    tagged(f"{ADD} {YEAR}"),
    tagged("17"),
    tagged(DEEP),
    tagged(f'{{"name": "add", "arguments": {DEEP}}}'),
    tagged(f'{{"name": "add", "arguments": "{DEEP}"}}'),
    f"<tool_call>{ADD}",
    "<tool_call>" * 5000,
]


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("form", ["hermes", "qwen25"])
def test_what_is_no_call_is_text(form: str, text: str) -> None:
    assert parsed(form, text) == (text, [])


@pytest.mark.parametrize(
    "text", ["", f"first {ADD}", "<|python_tag|>print(1)", "<|python_tag|>", '{"name": "add"', f"<|python_tag|>{DEEP}"]
)
def test_what_is_no_call_for_llama3_is_text(text: str) -> None:
    assert parsed("llama3", text) == (text, [])


PIECES = st.sampled_from(["<tool_call>", "</tool_call>", "<|python_tag|>", ADD, YEAR, ";", "{", '"', "\\", " ", "x"])


@given(st.sampled_from(list(FORMATS)), st.lists(PIECES, max_size=12).map("".join) | st.text())
@example("hermes", f"<tool_call><tool_call>{ADD}</tool_call></tool_call>")
def test_no_text_is_an_error(form: str, text: str) -> None:
    rest, calls = parsed(form, text)
    assert text.startswith(rest)
    assert all(name in ("add", "year") and isinstance(params, dict) for name, params in calls)
    assert calls or rest == text


def test_names_that_there_are_not() -> None:
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang reads further formats")
    with pytest.raises(FlagError, match=r"--generate-tool-call-parser: expected one of qwen25, .*, got 'pythonic'"):
        create_tool_call_parser(SPECS, "pythonic")
    with pytest.raises(FlagError, match=r"--generate-tool-call-parser: expected one of .*, got None"):
        create_tool_call_parser(SPECS, None)


def test_other_formats_are_read_by_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the two names that SGLang's package gives."""

    class FunctionCallParser:
        ToolCallParserEnum: ClassVar[dict[str, Any]] = {"pythonic": object, "hermes": object}

        def __init__(self, tools: list[Any], tool_call_parser: str) -> None:
            self.given = tools, tool_call_parser

    entrypoints = "sglang.srt.entrypoints.openai.protocol"
    function_call = "sglang.srt.function_call.function_call_parser"
    for name in (entrypoints, function_call):
        for end in [i for i, c in enumerate(name) if c == "."] + [len(name)]:
            module = types.ModuleType(name[:end])
            module.__spec__ = importlib.util.spec_from_loader(name[:end], loader=None)
            monkeypatch.setitem(sys.modules, name[:end], module)
    sys.modules[entrypoints].Tool = dict  # type: ignore[attr-defined]
    sys.modules[function_call].FunctionCallParser = FunctionCallParser  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "miles.rollout.generate_utils.sglang_parsers", raising=False)
    assert create_tool_call_parser(SPECS, "pythonic").given == (SPECS, "pythonic")  # type: ignore[attr-defined]
    with pytest.raises(FlagError, match="expected one of hermes, llama3, pythonic, qwen, qwen25, got 'nonsense'"):
        create_tool_call_parser(SPECS, "nonsense")
    monkeypatch.delitem(sys.modules, "miles.rollout.generate_utils.sglang_parsers")


def test_has_tool_call() -> None:
    parser = create_tool_call_parser(SPECS, "hermes")
    assert parser.has_tool_call(tagged(ADD)) and not parser.has_tool_call("<tool_call>")  # type: ignore[attr-defined]
    assert parser.parse_non_stream(tagged(YEAR))[1] == [ToolCall(0, "year", "{}")]
