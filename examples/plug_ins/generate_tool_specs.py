"""A pocket calculator, as the model is told about it.

    miles train --config examples/retool/multi_turn.yaml \
        --generate-tool-specs-path examples/plug_ins/generate_tool_specs.py:CALCULATOR \
        --generate-execute-tool-function-path examples/plug_ins/generate_execute_tool_function.py:calculate

The built-in conversation gives this list to the chat template, and takes a call only of a tool that stands in it. The
tiny model of this command knows a tool called `python` that takes `code`; this one answers to the same name.
"""

from __future__ import annotations

from typing import Any

CALCULATOR: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Print the value of an expression of whole numbers, as in print(37*48).",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        },
    }
]
