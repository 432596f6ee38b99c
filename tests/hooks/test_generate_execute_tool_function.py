"""--generate-execute-tool-function-path: `(name, params)` by position, awaited; its text goes into the conversation."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hooks_helpers import bound, bound_hooks

from miles.errors import HookError
from miles.hooks import function_registry


@pytest.mark.parametrize(("name", "answer"), [("execute", "add{'a': 1}"), ("execute_in_thread", "1")])
def test_called_as_the_catalogue_says(name: str, answer: str) -> None:
    hook = bound("generate_execute_tool_function", f"training:{name}")
    assert asyncio.run(hook.call_async("add", {"a": 1})) == answer and hook.form == "published"
    assert hook.in_thread == (name == "execute_in_thread")


def test_a_synchronous_one_leaves_the_event_loop_free() -> None:
    threads: list[Any] = []

    def execute(name: str, params: dict[str, Any]) -> str:
        threads.append(threading.current_thread())
        return "done"

    with function_registry.temporary("test:it", execute):
        args = {"generate_execute_tool_function_path": "test:it"}
        hook = bound_hooks("generate_execute_tool_function", "x:y", args=args).generate_execute_tool_function
    assert hook is not None
    assert asyncio.run(hook.call_async("add", {})) == "done" and threads != [threading.current_thread()]


def test_what_is_no_text() -> None:
    with pytest.raises(HookError, match="returned int 3, expected text"):
        asyncio.run(bound("generate_execute_tool_function", "training:execute_number").call_async("add", {}))
