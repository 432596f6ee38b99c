"""A pocket calculator: nothing that a model writes is executed, it is read as an expression.

    miles train --config examples/retool/multi_turn.yaml \
        --generate-tool-specs-path examples/plug_ins/generate_tool_specs.py:CALCULATOR \
        --generate-execute-tool-function-path examples/plug_ins/generate_execute_tool_function.py:calculate

Mistakes of the model are answered in words, so that it can try again; an exception would end the run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


async def calculate(name: str, params: dict[str, Any]) -> str:
    code = params.get("code")
    if not isinstance(code, str):
        return 'error: expected {"code": "print(...)"}'
    expression = code.strip().removeprefix("print(").removesuffix(")")
    try:
        return str(value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"error: {error}"


def value(node: ast.expr) -> int:
    """The value of sums, differences and products of whole numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError(f"{ast.unparse(node)} is no sum, difference or product of whole numbers")
