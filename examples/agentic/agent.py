"""An agent that knows nothing of training: a loop around OpenAI's own client, and a calculator.

    miles train --config examples/agentic/agentic.yaml

`solve` could be any program that speaks to an OpenAI server. What was said is recorded at `base_url`, token by token,
and becomes the sample; the agent returns nothing.
"""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

from examples.plug_ins.generate_execute_tool_function import calculate

MOST_ANSWERS = 3

# Connections are shared; every agent has an address of its own.
CLIENT = AsyncOpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=0)

PYTHON: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Compute sums, differences and products of whole numbers.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


async def solve(*, base_url: str, prompt: list[dict[str, Any]], request_kwargs: dict[str, Any]) -> None:
    """Ask, compute what the model wants computed, and ask again, until it calls no tool."""
    messages: list[Any] = list(prompt)
    client = CLIENT.with_options(base_url=f"{base_url}/v1")
    for _ in range(MOST_ANSWERS):
        # What a request must carry is SGLang's, beside OpenAI's own fields: extra_body takes all of it.
        answer = await client.chat.completions.create(
            model="default", messages=messages, tools=[PYTHON], extra_body=request_kwargs
        )
        message = answer.choices[0].message
        messages.append(message)
        if answer.choices[0].finish_reason != "tool_calls":
            return
        for call in message.tool_calls or []:
            said = await calculate(call.function.name, json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
