"""SGLang's tool-call parsers, for the formats that `tool_call_parsers` does not read itself.

Imported where SGLang is installed and such a format is asked for.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser


def sglang_formats() -> list[str]:
    """The names that SGLang's `--tool-call-parser` takes."""
    return list(FunctionCallParser.ToolCallParserEnum)


def parser_of_sglang(tool_specs: list[dict[str, Any]], name: str) -> Any:
    """A parser with `parse_non_stream(text) -> (text, calls)`."""
    return FunctionCallParser(TypeAdapter(list[Tool]).validate_python(tool_specs), name)
