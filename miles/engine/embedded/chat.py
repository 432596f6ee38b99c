"""`POST /v1/chat/completions` and `GET /v1/models` in front of an embedded engine: OpenAI's API for plain clients.

    messages --chat template--> prompt ids --engine--> output ids --tool-call parser--> message
        or `input_ids` of the caller: token-in, no template is asked

`server.py` mounts the two routes with one line. Fields and answers are in `miles/engine/chat_protocol.py`, templates in
`miles/rollout/generate_utils/chat_template.py`, the formats of tool calls in `tool_call_parsers.py` beside it. A client
that hangs up aborts its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
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
    in_chat_words,
    logprobs_json,
    usage_json,
)
from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.generate_routes import Load, generate_all
from miles.engine.embedded.http import CLIENT_GONE, Limits, read_object, while_connected
from miles.engine.protocol import BadRequestError, GenerateRequest, GenerateResult, Json
from miles.errors import EngineError
from miles.rollout.generate_utils.chat_template import ChatTemplateError, render
from miles.rollout.generate_utils.tool_call_parsers import create_tool_call_parser

T = TypeVar("T")

# What a chat template contains that writes tool calls in a format -> the name of its parser.
_SIGNS = {"<tool_call>": "qwen25", "<|python_tag|>": "llama3"}


def mount_chat(
    app: FastAPI, engine: EmbeddedEngine, limits: Limits, load: Load, *, tool_call_parser: str | None = None
) -> None:
    """Add the two routes. `tool_call_parser` None guesses the format from the chat template."""
    chat = _Chat(engine, limits, load, tool_call_parser or guess_tool_call_parser(engine.tokenizer))
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

    def __init__(self, engine: EmbeddedEngine, limits: Limits, load: Load, tool_call_parser: str | None) -> None:
        self.engine, self.limits, self.load, self.tool_call_parser = engine, limits, load, tool_call_parser

    async def answer(self, http: Request) -> Response:
        request = ChatRequest.from_payload(await read_object(http, self.limits, half_characters=True))
        try:
            return await self._answered(request, http)
        except BadRequestError as error:
            raise in_chat_words(error) from error

    async def _answered(self, request: ChatRequest, http: Request) -> Response:
        prompt = self._prompt_ids(request)
        rid, created = request.rid or f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if request.stream:
            return await self._streamed(request, prompt, rid, created, http)
        results = await while_connected(http, self._generate(request, prompt, rid))
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
        singles = request.generate_requests(prompt, rid)
        with self.load.of(len(singles)):
            return await generate_all(self.engine, singles)

    # ---- whole answers -------------------------------------------------------------------------------------------

    def _choice(self, request: ChatRequest, prompt: list[int], index: int, result: GenerateResult) -> Json:
        spoken, logprobs = self._spoken(request, result.text), self._logprobs(result)
        return choice_json(request, prompt, index, result, spoken=spoken, logprobs=logprobs)

    def _parses(self, request: ChatRequest) -> bool:
        return bool(request.tools) and request.tool_choice != "none" and self.tool_call_parser is not None

    def _spoken(self, request: ChatRequest, text: str) -> Spoken:
        """The text and the tool calls in it."""
        if not self._parses(request):
            return Spoken(text)
        assert request.tools is not None
        rest, calls = create_tool_call_parser(request.tools, self.tool_call_parser).parse_non_stream(text)
        if not calls:
            return Spoken(text)
        return Spoken(rest, [_call_json(place, call) for place, call in enumerate(calls)])

    def _logprobs(self, result: GenerateResult, start: int = 0) -> Json | None:
        texts = [token_text(self.engine.tokenizer, token) for token in result.output_ids[start:]]
        return logprobs_json(result, texts, start)

    # ---- streams -------------------------------------------------------------------------------------------------

    async def _streamed(
        self, request: ChatRequest, prompt: list[int], rid: str, created: int, http: Request
    ) -> Response:
        """The stream, once there is something to say: a refused request is answered with its status."""
        results = self._partial_results(request, prompt, rid)
        first = await while_connected(http, anext(results))
        if first is None:
            return Response(status_code=CLIENT_GONE)
        return StreamingResponse(self._events(request, rid, created, first, results), media_type="text/event-stream")

    async def _partial_results(
        self, request: ChatRequest, prompt: list[int], rid: str
    ) -> AsyncGenerator[tuple[int, GenerateResult], None]:
        """(choice, what it has so far) as it comes, until all have ended. Closing it aborts what runs."""
        arrived: asyncio.Queue[tuple[int, GenerateResult] | Exception] = asyncio.Queue()

        async def read(index: int, single: GenerateRequest) -> None:
            try:
                async with contextlib.aclosing(self.engine.stream(single)) as results:
                    async for result in results:
                        arrived.put_nowait((index, result))
            except Exception as error:
                arrived.put_nowait(error)

        singles = request.generate_requests(prompt, rid)
        running = len(singles)
        with self.load.of(running):
            readers = [asyncio.create_task(read(i, one), name=f"chat {one.rid}") for i, one in enumerate(singles)]
            try:
                while running:
                    item = await arrived.get()
                    if isinstance(item, Exception):
                        raise item
                    running -= item[1].finish_reason is not None
                    yield item
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)

    async def _events(
        self, request: ChatRequest, rid: str, created: int, first: tuple[int, GenerateResult],
        rest: AsyncGenerator[tuple[int, GenerateResult], None],
    ) -> AsyncIterator[str]:  # fmt: skip
        """Server-sent events: role, text, tool calls, finish reason, usage where asked for, [DONE].

        Where tools were offered the text comes at once at the end: before, it may be the beginning of a call.
        """
        told: dict[int, tuple[int, int]] = {}  # choice -> characters and tokens that were sent
        ended: dict[int, GenerateResult] = {}
        async with contextlib.aclosing(rest):
            try:
                async for index, result in _after(first, rest):
                    for delta, more in self._deltas(request, result, told.get(index)):
                        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
                        yield _event(chunk_json(request, rid, created, [choice]))
                    held = self._parses(request)
                    told[index] = (0, 0) if held else (len(result.text), len(result.output_ids))
                    if result.finish_reason is not None:
                        ended[index] = result
            except EngineError as error:  # the head of the answer is long gone
                yield _event({"error": {"message": str(error), "code": error.status or 500}})
                return
        if request.include_usage:
            yield _event(chunk_json(request, rid, created, [], usage_json(list(ended.values()))))
        yield "data: [DONE]\n\n"

    def _deltas(
        self, request: ChatRequest, result: GenerateResult, told: tuple[int, int] | None
    ) -> Iterator[tuple[Json, Json]]:
        """(delta, further fields) of what is new in `result`."""
        if told is None:
            yield {"role": "assistant", "content": ""}, {}
        characters, tokens = told or (0, 0)
        done = result.finish_reason is not None
        if self._parses(request) and not done:
            return
        spoken = self._spoken(request, result.text)
        text = spoken.content[characters:]
        if text or (request.logprobs and len(result.output_ids) > tokens):
            yield {"content": text}, {"logprobs": self._logprobs(result, tokens)}
        if done:
            if spoken.tool_calls:
                yield {"tool_calls": spoken.tool_calls}, {}
            yield {}, spoken.end(result)


async def _after(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


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
    """Which byte a printable character stands for in byte-level vocabularies (GPT-2's): itself, or from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
