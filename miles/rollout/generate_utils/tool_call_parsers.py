"""Tool calls out of the text of a response: our own readers of three formats, and SGLang's for every other.

    qwen25, hermes    <tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>, any number of them
    llama3            <|python_tag|>{"name": "search", "parameters": {"query": "..."}}, more of them after `;`

A call counts when its JSON is whole, its arguments are an object and its name is one of the tools that were offered.
Whatever else a model writes is text: a malformed call is never an error.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from miles.errors import FlagError

FLAG = "--generate-tool-call-parser"

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")
_CLOSING = re.compile(r"\s*</tool_call>")
_MORE = re.compile(r"\s*;")
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """One call that a model wants made, with the attributes of SGLang's `ToolCallItem`.

    Example: `ToolCall(tool_index=0, name="search", parameters='{"query": "tide tables"}')`
    """

    tool_index: int
    name: str
    parameters: str


class Parser(Protocol):
    """What `multi_turn` needs of a parser; SGLang's `FunctionCallParser` has it, too."""

    def parse_non_stream(self, full_text: str) -> tuple[str, list[Any]]:
        """The text without the calls, and the calls in order."""


# ---- the formats ---------------------------------------------------------------------------------------------------

# Where in the text a call stands, and the JSON value in it.
Found = tuple[int, int, Any]


def _json_at(text: str, position: int) -> tuple[Any, int] | None:
    """The JSON value that begins at `position` (after white space) and where it ends; None for anything else."""
    try:
        return _DECODER.raw_decode(text, _SPACE.match(text, position).end())  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None


def _tagged(text: str) -> Iterator[Found]:
    """Calls between `<tool_call>` and `</tool_call>`. An argument may hold the closing tag: JSON decides the end."""
    for opening in re.finditer("<tool_call>", text):
        found = _json_at(text, opening.end())
        closing = _CLOSING.match(text, found[1]) if found is not None else None
        if found is not None and closing is not None:
            yield opening.start(), closing.end(), found[0]


def _python_tag(text: str) -> Iterator[Found]:
    """Calls behind `<|python_tag|>`, or a text that is a call from its first character on; `;` stands between calls."""
    tag = text.find(PYTHON_TAG)
    begin = position = max(tag, 0)
    if tag >= 0:
        position += len(PYTHON_TAG)
    while (found := _json_at(text, position)) is not None:
        yield begin, found[1], found[0]
        more = _MORE.match(text, found[1])
        if more is None:
            return
        begin, position = found[1], more.end()


FORMATS: dict[str, Callable[[str], Iterator[Found]]] = {
    "qwen25": _tagged,
    "qwen": _tagged,
    "hermes": _tagged,
    "llama3": _python_tag,
}
"""Name of the format -> its reader, which yields every JSON value that stands where a call may stand."""


@dataclass(frozen=True)
class ToolCallParser:
    """The reader of one format, for tools of certain names."""

    read: Callable[[str], Iterator[Found]]
    names: frozenset[str]

    def has_tool_call(self, text: str) -> bool:
        return bool(self.parse_non_stream(text)[1])

    def parse_non_stream(self, full_text: str) -> tuple[str, list[ToolCall]]:
        """The text before the first call, and all calls."""
        calls: list[ToolCall] = []
        text, end = full_text, 0
        for begin, stop, value in self.read(full_text):
            if begin < end:  # stands inside an argument of the call before
                continue
            entries = [self._call(entry) for entry in (value if isinstance(value, list) else [value])]
            if any(entry is None for entry in entries):
                continue
            for name, parameters in (entry for entry in entries if entry is not None):
                calls.append(ToolCall(len(calls), name, parameters))
            text, end = (full_text[:begin] if end == 0 else text), stop
        return text, calls

    def _call(self, value: Any) -> tuple[str, str] | None:
        """(name, arguments as JSON) of an object that is a call; None for any other value."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # some models write the object as a text of JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return value["name"], json.dumps(arguments, ensure_ascii=False)


# ---- by name -------------------------------------------------------------------------------------------------------


def known_parser(name: str) -> str:
    """`name` if there is a parser for it here or in an SGLang that is installed. Raises FlagError otherwise."""
    names = list(FORMATS)
    if name in names:
        return name
    if importlib.util.find_spec("sglang") is None:
        raise FlagError(
            FLAG, given=name, expected=f"one of {', '.join(names)}",
            remedy="Other formats are read by SGLang's parsers, which are used where SGLang is installed.",
        )  # fmt: skip
    return name


def create_tool_call_parser(tool_specs: list[dict[str, Any]], tool_call_parser: str | None) -> Parser:
    """The parser for responses to a model that was offered `tool_specs`. Raises FlagError for an unknown name."""
    if tool_call_parser is None:
        raise FlagError(FLAG, given=None, expected=f"one of {', '.join(FORMATS)}: the format of the model's tool calls")
    if known_parser(tool_call_parser) in FORMATS:
        return ToolCallParser(FORMATS[tool_call_parser], frozenset(spec["function"]["name"] for spec in tool_specs))
    from miles.rollout.generate_utils.sglang_parsers import parser_of_sglang, sglang_formats

    known = sglang_formats()
    if tool_call_parser not in known:
        raise FlagError(FLAG, given=tool_call_parser, expected=f"one of {', '.join(sorted({*FORMATS, *known}))}")
    parser: Parser = parser_of_sglang(tool_specs, tool_call_parser)
    return parser
