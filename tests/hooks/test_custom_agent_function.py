"""--custom-agent-function-path: everything by keyword, awaited; `metadata=` for those who name it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hooks_helpers import bound, bound_hooks

from miles.errors import UsageError
from miles.hooks import function_registry

GIVEN = {"base_url": "http://x", "prompt": "p", "request_kwargs": {"temperature": 0.5}, "metadata": {"a": 1}}


@pytest.mark.parametrize(("name", "value"), [("agent", "http://x"), ("agent_with_metadata", {"a": 1})])
def test_called_as_the_catalogue_says(name: str, value: Any) -> None:
    hook = bound("custom_agent_function", f"training:{name}")
    assert asyncio.run(hook.call_async(**GIVEN)) == value and hook.form == "published"


def test_keywords_alone_and_a_synchronous_one() -> None:
    def agent(*, request_kwargs: Any, prompt: Any, base_url: str) -> Any:
        return request_kwargs

    with function_registry.temporary("test:agent", agent):
        hook = bound_hooks("custom_agent_function", "x:y", args={"custom_agent_function_path": "test:agent"})
    assert hook.custom_agent_function is not None and hook.custom_agent_function.in_thread
    assert asyncio.run(hook.custom_agent_function.call_async(**GIVEN)) == {"temperature": 0.5}


def test_found_wrong_before_the_start() -> None:
    with pytest.raises(UsageError, match="base_url"):
        bound("custom_agent_function", "training:execute")


def test_base_url_may_be_a_session_that_each_attempt_opens() -> None:
    opened: list[str] = []

    async def open_session() -> str:
        opened.append(f"http://x/{len(opened)}")
        return opened[-1]

    def agent(*, request_kwargs: Any, prompt: Any, base_url: str) -> str:
        if len(opened) < 3:
            raise ConnectionError("the sandbox is gone")
        return base_url

    with function_registry.temporary("test:agent", agent):
        args = {"custom_agent_function_path": "test:agent"}
        hooks = bound_hooks("custom_agent_function", "x:y", args=args, policies={"custom-agent-function": "retry:2"})
    hook = hooks.custom_agent_function
    assert hook is not None
    assert asyncio.run(hook.call_async(**{**GIVEN, "base_url": open_session})) == "http://x/2"
    assert opened == ["http://x/0", "http://x/1", "http://x/2"] and hook.stats.rollout.failures == 0
