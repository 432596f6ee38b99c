"""`POST /v1/chat/completions` and `GET /v1/models` in front of an embedded engine: OpenAI's API for plain clients.

    messages --chat template--> prompt ids --engine--> output ids --tool-call parser--> message
        or `input_ids` of the caller: token-in, no template is asked

`server.py` mounts the two routes with one line. Fields and answers are in `miles/engine/chat_protocol.py`, templates in
`miles/rollout/generate_utils/chat_template.py`, the formats of tool calls in `tool_call_parsers.py` beside it. A client
that hangs up aborts its requests.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from miles.engine.chat_protocol import (
    ChatRequest,
    Spoken,
    choice_json,
    chunk_json,
    completion_json,
    logprobs_json,
    usage_json,
)
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.protocol import BadRequestError, GenerateResult, Json
from miles.errors import EngineError
from miles.rollout.generate_utils.chat_template import ChatTemplateError, render
from miles.rollout.generate_utils.tool_call_parsers import create_tool_call_parser

T = TypeVar("T")

DISCONNECT_POLL_S = 0.2
"""How often a waiting answer looks whether its client is still there."""

CLIENT_GONE = 499
"""Status that nobody reads: the client hung up."""

# What a chat template contains that writes tool calls in a format -> the name of its parser.
_SIGNS = {"<tool_call>": "qwen25", "<|python_tag|>": "llama3"}


def mount_chat(app: FastAPI, engine: EmbeddedEngine, *, tool_call_parser: str | None = None) -> None:
    """Add the two routes. `tool_call_parser` None guesses the format from the chat template."""
    chat = _Chat(engine, tool_call_parser or guess_tool_call_parser(engine.tokenizer))
    model = {
        "id": engine.model_path or "default",
        "object": "model",
        "created": int(time.time()),
        "owned_by": "miles",
        "root": engine.model_path,
        "max_model_len": engine.context_length,
    }

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat.answer(request)

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        if name != model["id"]:
            raise EngineError(f"there is no model {name!r} here; this server has {model['id']!r}.", status=404)
        return model


def guess_tool_call_parser(tokenizer: Any) -> str | None:
    """The parser of the format that the model's chat template writes tool calls in; None where it is not known."""
    template = json.dumps(getattr(tokenizer, "chat_template", None) or "", ensure_ascii=False)
    return next((name for sign, name in _SIGNS.items() if sign in template), None)


class _Chat:
    """Answers chat completions with one engine."""

    def __init__(self, engine: EmbeddedEngine, tool_call_parser: str | None) -> None:
        self.engine, self.tool_call_parser = engine, tool_call_parser

    async def answer(self, http: Request) -> Response:
        request = ChatRequest.from_payload(await _body(http))
        prompt = self._prompt_ids(request)
        rid, created = request.rid or f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        waiting = asyncio.ensure_future(self._generate(request, prompt, rid))
        if request.stream:
            first = await _first_of(waiting, http)  # a refused request is answered with its status, not in the stream
            if first is None:
                return Response(status_code=CLIENT_GONE)
            return StreamingResponse(self._stream(request, rid, created, first), media_type="text/event-stream")
        results = await _first_of(waiting, http)
        if results is None:
            return Response(status_code=CLIENT_GONE)
        choices = [self._choice(request, prompt, i, result) for i, result in enumerate(results)]
        return JSONResponse(completion_json(request, rid, created, choices, results))

    def _prompt_ids(self, request: ChatRequest) -> list[int]:
        if request.input_ids is not None:
            return request.input_ids
        if self.engine.tokenizer is None:
            raise BadRequestError("this engine has no tokenizer: send 'input_ids' beside the messages.")
        tools = request.tools if request.tool_choice != "none" else None
        try:
            return render(
                self.engine.tokenizer, request.messages, tools=tools, template_kwargs=request.chat_template_kwargs
            )
        except ChatTemplateError as error:
            raise BadRequestError(str(error)) from error

    async def _generate(self, request: ChatRequest, prompt: list[int], rid: str) -> list[GenerateResult]:
        """The results of all choices; if one fails or the caller goes away, the others are aborted."""
        tasks = [asyncio.ensure_future(self.engine.generate(r)) for r in request.generate_requests(prompt, rid)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    # ---- whole answers -------------------------------------------------------------------------------------------

    def _choice(self, request: ChatRequest, prompt: list[int], index: int, result: GenerateResult) -> Json:
        spoken, logprobs = self._spoken(request, result.text), self._logprobs(result)
        return choice_json(request, prompt, index, result, spoken=spoken, logprobs=logprobs)

    def _spoken(self, request: ChatRequest, text: str) -> Spoken:
        """The text and the tool calls in it."""
        if not request.tools or request.tool_choice == "none" or self.tool_call_parser is None:
            return Spoken(text)
        rest, calls = create_tool_call_parser(request.tools, self.tool_call_parser).parse_non_stream(text)
        if not calls:
            return Spoken(text)
        return Spoken(rest, [_call_json(place, call) for place, call in enumerate(calls)])

    def _logprobs(self, result: GenerateResult) -> Json | None:
        return logprobs_json(result, [token_text(self.engine.tokenizer, token) for token in result.output_ids])

    # ---- streams -------------------------------------------------------------------------------------------------

    async def _stream(
        self, request: ChatRequest, rid: str, created: int, results: Sequence[GenerateResult]
    ) -> AsyncIterator[str]:
        """Server-sent events: role, text, tool calls, finish reason, usage where asked for, [DONE]."""

        def event(index: int, delta: Json, **more: Any) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return _event(chunk_json(request, rid, created, [choice]))

        for index, result in enumerate(results):
            spoken = self._spoken(request, result.text)
            yield event(index, {"role": "assistant", "content": ""})
            if spoken.content or result.output_logprobs:
                yield event(index, {"content": spoken.content}, logprobs=self._logprobs(result))
            if spoken.tool_calls:
                yield event(index, {"tool_calls": spoken.tool_calls})
            matched = result.finish_reason.matched
            yield event(index, {}, finish_reason=spoken.finish_reason(result), matched_stop=matched)
        if request.include_usage:
            yield _event(chunk_json(request, rid, created, [], usage_json(results)))
        yield "data: [DONE]\n\n"


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _call_json(place: int, call: Any) -> Json:
    """A parsed call as OpenAI's object."""
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "index": place,
        "type": "function",
        "function": {"name": call.name, "arguments": call.parameters},
    }


async def _body(request: Request) -> Json:
    raw = await request.body()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(body).__name__}.")
    return body


async def _first_of(waiting: asyncio.Future[T], request: Request) -> T | None:
    """The value of `waiting`, or None (and `waiting` cancelled) where the client goes away before it is there."""
    try:
        while not (await asyncio.wait([waiting], timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                return None
    finally:
        waiting.cancel()  # a finished one does not mind
    return waiting.result()


# ---- tokens as text --------------------------------------------------------------------------------------------------


def token_text(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text and its bytes; the bytes of half a character are those that the tokenizer holds for it."""
    if tokenizer is None:
        return "", b""
    return _token_text(tokenizer, token)


@lru_cache(maxsize=65536)
def _token_text(tokenizer: Any, token: int) -> tuple[str, bytes]:
    text: str = tokenizer.decode([token])
    if "\ufffd" in text:
        piece = tokenizer.convert_ids_to_tokens(token)
        table = _bytes_of_characters()
        if piece and all(character in table for character in piece):
            return text, bytes(table[character] for character in piece)
    return text, text.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _bytes_of_characters() -> Mapping[str, int]:
    """Byte-level tokenizers write every byte as a printable character: which is which."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
