"""Tools and generate functions for the tests of conversations."""

from __future__ import annotations

import time
from typing import Any

SPECS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "year", "parameters": {"type": "object", "properties": {}}}},
]
NO_SPECS: list[dict[str, Any]] = [{"name": "add"}]

calls: list[tuple[str, dict[str, Any]]] = []


async def use(name: str, params: dict[str, Any]) -> str:
    calls.append((name, params))
    return "2026" if name == "year" else str(params["a"] + params["b"])


def use_in_thread(name: str, params: dict[str, Any]) -> str:
    time.sleep(0.01)
    return f"{name} in a thread"


async def returns_a_number(name: str, params: dict[str, Any]) -> Any:
    return 7


async def returns_half_a_character(name: str, params: dict[str, Any]) -> str:
    return "\ud83d"


async def fails(name: str, params: dict[str, Any]) -> str:
    return str(1 / params["b"])


async def fails_once(name: str, params: dict[str, Any]) -> str:
    calls.append((name, params))
    if len(calls) == 1:
        raise ConnectionError("busy")
    return "4"
