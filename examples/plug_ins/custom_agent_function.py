"""An agent that checks its own answer: it asks, and then asks the model to correct itself.

    miles train --config examples/agentic/agentic.yaml \
        --custom-agent-function-path examples/plug_ins/custom_agent_function.py:ask_twice

It speaks to `base_url` as to any OpenAI server, and could be an agent framework that knows nothing of training. What
was said is recorded on the other side and becomes the sample.
"""

from __future__ import annotations

from typing import Any

import httpx

MOST_SECONDS = 600.0


async def ask_twice(*, base_url: str, prompt: str | list[dict[str, Any]], request_kwargs: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    async with httpx.AsyncClient(base_url=base_url, timeout=MOST_SECONDS) as client:
        for request in (None, "Check your answer step by step, and correct it if it is wrong."):
            if request is not None:
                messages.append({"role": "user", "content": request})
            body = {"model": "default", "messages": messages, **request_kwargs}
            response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            messages.append(response.json()["choices"][0]["message"])
