"""Agents for the tests of agentic generation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai

seen: list[dict[str, Any]] = []

ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def client_of(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)


def plain(request_kwargs: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own fields by name, SGLang's in `extra_body`."""
    own = {"temperature", "top_p", "max_tokens", "seed", "stop", "logprobs"}
    return {
        **{name: value for name, value in request_kwargs.items() if name in own},
        "extra_body": {name: value for name, value in request_kwargs.items() if name not in own},
    }


async def uses_tools(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: Any = None) -> None:
    """Asks, runs the tools that the model calls, and asks again until it calls none."""
    seen.append({"base_url": base_url, "prompt": prompt, "request_kwargs": request_kwargs, "metadata": metadata})
    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    async with client_of(base_url) as client:
        while True:
            answer = await client.chat.completions.create(
                model="m", messages=messages, tools=[ADD], **plain(request_kwargs)
            )
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls or answer.choices[0].finish_reason != "tool_calls":
                return
            for call in message.tool_calls:
                total = sum(json.loads(call.function.arguments).values())
                messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})


def asks_twice_in_a_thread(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": prompt}]
    with httpx.Client(base_url=base_url, timeout=60) as client:
        for question in (None, "sure?"):
            if question is not None:
                messages.append({"role": "user", "content": question})
            body = {"model": "m", "messages": messages, **request_kwargs}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status()
            messages.append(answer.json()["choices"][0]["message"])


async def says_nothing(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    pass


async def changes_the_subject(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
        for question in (prompt, "something else"):
            body = {"messages": [{"role": "user", "content": question}], **request_kwargs}
            (await client.post("/v1/chat/completions", json=body)).raise_for_status()


async def fails_after_an_answer(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    await _ask(base_url, prompt, request_kwargs)
    raise ConnectionError("the sandbox is gone")


async def fails_once(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    seen.append({"base_url": base_url})
    await _ask(base_url, prompt, request_kwargs)
    if len(seen) == 1:
        raise ConnectionError("the sandbox is gone")


async def never_ends(*, base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    await _ask(base_url, prompt, request_kwargs)
    seen.append({"base_url": base_url})
    await asyncio.Event().wait()


async def _ask(base_url: str, prompt: Any, request_kwargs: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
        body = {"messages": [{"role": "user", "content": prompt}], **request_kwargs}
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
