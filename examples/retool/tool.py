"""The one tool of the retool example, as the built-in multi_turn takes tools: a specification and a function.

    --generate-tool-specs-path examples.retool.tool.SPECS
    --generate-execute-tool-function-path examples.retool.tool.execute
"""

from __future__ import annotations

from typing import Any

from examples.retool.sandbox import Sandbox

SPECS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Run a Python program and return what it prints.",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        },
    }
]

SANDBOX = Sandbox()


async def execute(name: str, params: dict[str, Any]) -> str:
    """What the program printed, or a line that begins with "error:": mistakes of the model are answered, not raised.

    Example: `await execute("python", {"code": "print(37*48)"})` is `"1776"`.
    """
    code = params.get("code")
    if name != "python" or not isinstance(code, str):
        return 'error: the only tool is python, with {"code": "..."}'
    result = await SANDBOX.run(code)
    printed = result.output.strip()
    if result.error is not None:
        return "\n".join(filter(None, [printed, f"error: {result.error}"]))
    return printed
