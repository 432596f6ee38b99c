"""An engine without a model, for tests: a function of the prompt's text says what it answers.

It has /generate, /v1/chat/completions, /health and /abort_request. Tokens are those of a real tokenizer; the log-prob
of the i-th output token is -i/128.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from miles.rollout.generate_utils.chat_template import render
from miles.rollout.generate_utils.tool_call_parsers import create_tool_call_parser
from miles.rollout.tokenizer import load_tokenizer
from miles.utils.test_utils.uvicorn_thread_server import UvicornThreadServer

LOGPROB_STEP = 1 / 128
TOOL_CALL_PARSER = "qwen25"


@dataclass(frozen=True)
class ProcessResultMetaInfo:
    """What an answer's `meta_info` says beside the obvious; None is left out."""

    weight_version: str | None = None
    routed_experts: str | None = None
    spec_accept_token_num: int | None = None
    spec_draft_token_num: int | None = None
    spec_verify_ct: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ProcessResult:
    """One answer. Example: `ProcessResult(text="56", finish_reason="length")`"""

    text: str
    finish_reason: str = "stop"
    cached_tokens: int = 0
    meta_info: ProcessResultMetaInfo = field(default_factory=ProcessResultMetaInfo)


ProcessFn = Callable[[str], ProcessResult]
"""The rendered prompt -> the answer."""


class Counter:
    """How many requests are inside, and how many were at most."""

    def __init__(self) -> None:
        self._inside = self._most = 0

    @property
    def max_value(self) -> int:
        return self._most

    def reset(self) -> None:
        self._inside = self._most = 0

    @contextmanager
    def track(self) -> Iterator[None]:
        self._inside += 1
        self._most = max(self._most, self._inside)
        try:
            yield
        finally:
            self._inside -= 1


class MockSGLangServer:
    """The server. `request_log` holds the JSON of every generation request, in order.

    `latency` seconds pass before an answer; port 0 takes a free one.
    """

    def __init__(self, model_name: str, process_fn: ProcessFn, host: str, port: int, latency: float = 0.0) -> None:
        self.tokenizer: Any = load_tokenizer(model_name, trust_remote_code=True)
        self.process_fn, self.latency = process_fn, latency
        self.request_log: list[dict[str, Any]] = []
        self._concurrency = Counter()
        self.app = FastAPI()
        self._add_routes()
        self._server = UvicornThreadServer(self.app, host, port)

    @property
    def host(self) -> str:
        return self._server.host

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def max_concurrent(self) -> int:
        return self._concurrency.max_value

    def reset_stats(self) -> None:
        self.request_log.clear()
        self._concurrency.reset()

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def _add_routes(self) -> None:
        async def answered(request: Request, compute: Callable[[dict[str, Any]], dict[str, Any]]) -> JSONResponse:
            payload = await request.json()
            self.request_log.append(payload)
            with self._concurrency.track():
                await asyncio.sleep(self.latency)
                return JSONResponse(compute(payload))

        @self.app.post("/generate")
        async def generate(request: Request) -> JSONResponse:
            return await answered(request, self._compute_generate_response)

        @self.app.post("/v1/chat/completions")
        async def chat_completions(request: Request) -> JSONResponse:
            return await answered(request, self._compute_chat_completions_response)

        @self.app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @self.app.post("/abort_request")
        async def abort_request() -> dict[str, str]:
            return {"status": "ok"}

    def _output_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _compute_generate_response(self, payload: dict[str, Any]) -> dict[str, Any]:
        prompt_ids = payload.get("input_ids")
        if prompt_ids is None:
            prompt_ids = self._output_ids(payload["text"])
        result = self.process_fn(self.tokenizer.decode(prompt_ids))
        return {"text": result.text, "meta_info": self._meta_info(result, prompt_ids, self._output_ids(result.text))}

    def _meta_info(self, result: ProcessResult, prompt_ids: list[int], output_ids: list[int]) -> dict[str, Any]:
        finish: dict[str, Any] = {"type": result.finish_reason}
        if result.finish_reason == "length":
            finish["length"] = len(output_ids)
        return {
            "finish_reason": finish,
            "prompt_tokens": len(prompt_ids),
            "cached_tokens": result.cached_tokens,
            "completion_tokens": len(output_ids),
            "output_token_logprobs": [[-LOGPROB_STEP * i, token] for i, token in enumerate(output_ids)],
            **result.meta_info.to_dict(),
        }

    def _compute_chat_completions_response(self, payload: dict[str, Any]) -> dict[str, Any]:
        tools = payload.get("tools")
        prompt_ids = payload.get("input_ids")
        if prompt_ids is None:
            prompt_ids = render(self.tokenizer, payload["messages"], tools=tools)
        result = self.process_fn(self.tokenizer.decode(prompt_ids))
        output_ids = self._output_ids(result.text)
        message, finish_reason = self._message(result, tools)
        content = [
            {"token": self.tokenizer.decode([token]), "token_id": token, "logprob": -LOGPROB_STEP * i}
            for i, token in enumerate(output_ids)
        ]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": content},
            "finish_reason": finish_reason,
            "input_token_ids": prompt_ids,
        }
        if payload.get("return_meta_info"):
            choice["meta_info"] = self._meta_info(result, prompt_ids, output_ids)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": payload.get("model", "mock-model"),
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt_ids),
                "completion_tokens": len(output_ids),
                "total_tokens": len(prompt_ids) + len(output_ids),
            },
        }

    def _message(self, result: ProcessResult, tools: Any) -> tuple[dict[str, Any], str]:
        """The assistant's message and the finish reason, with the tool calls in the text where tools were offered."""
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "tool_calls": None}
        if not tools or result.finish_reason != "stop":
            return message, result.finish_reason
        text, calls = create_tool_call_parser(tools, TOOL_CALL_PARSER).parse_non_stream(result.text)
        if not calls:
            return message, result.finish_reason
        message["content"] = text
        message["tool_calls"] = [
            {"id": f"call{i:05d}", "type": "function", "function": {"name": call.name, "arguments": call.parameters}}
            for i, call in enumerate(calls)
        ]
        return message, "tool_calls"


def default_process_fn(prompt: str) -> ProcessResult:
    """Answers "What is 1+n?" with the boxed sum, and nothing else."""
    match = re.search(r"What is 1\+(\d+)\?", prompt)
    if match:
        return ProcessResult(text=f"\\boxed{{{1 + int(match.group(1))}}}")
    return ProcessResult(text="I don't understand.")


@contextmanager
def with_mock_server(
    model_name: str = "Qwen/Qwen3-0.6B",
    process_fn: ProcessFn = default_process_fn,
    host: str = "127.0.0.1",
    port: int | None = None,
    latency: float = 0.0,
) -> Iterator[MockSGLangServer]:
    """A running server for the duration of the block; `port` None takes a free one."""
    server = MockSGLangServer(model_name, process_fn, host, port or 0, latency)
    server.start()
    try:
        yield server
    finally:
        server.stop()
