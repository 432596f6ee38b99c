"""`/generate`, whole or as a stream of server-sent events, and `/health_generate`.

A request that is over the server's limit is refused with 503 before it costs anything; one whose client hangs up is
aborted at once and leaves its place in the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import FastAPI, Request, Response

from miles.engine.embedded.engine import EmbeddedEngine
from miles.engine.embedded.http import CLIENT_GONE, EventStream, Limits, json_response, read_object, while_connected
from miles.engine.protocol import (
    BadRequestError,
    GenerateRequest,
    GenerateResult,
    Json,
    SamplingParams,
    generate_schema,
    is_batch,
)
from miles.errors import EngineError
from miles.tasks import gather_or_cancel

HEALTH_TIMEOUT_S = 20.0
"""Within this a healthy engine ends a step."""

HEALTH_POLL_S = 0.05

LONG_TEXT = 20_000
"""Characters from which a text is tokenized beside the engine's thread, which would stand still meanwhile."""

MAX_TOKEN_CHARACTERS = 256
"""No text has tokens longer than this on average."""


class Load:
    """How many requests are inside the server."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0

    @contextlib.contextmanager
    def of(self, count: int) -> Iterator[None]:
        """Counts them for the duration of the block; EngineError (503) where there is no room for them."""
        if self.inside + count > self.limit:
            raise EngineError(
                f"the server is full: {self.inside} requests are inside and at most {self.limit} may be. Try again "
                "later, or start it with a larger --max-queued-requests.",
                status=503,
            )
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count


def add_generate_routes(app: FastAPI, engine: EmbeddedEngine, limits: Limits, load: Load) -> None:
    described: Json = {"requestBody": {"content": {"application/json": {"schema": generate_schema()}}}}

    @app.post("/generate", summary="Generate, or score a prompt", openapi_extra=described)
    @app.put("/generate", include_in_schema=False)
    async def generate(request: Request) -> Response:
        payload = await read_object(request, limits)
        requests = GenerateRequest.from_payload(payload)
        batch = is_batch(payload)
        if payload.get("stream"):
            return EventStream(_events(engine, requests, load, batch=batch))
        with load.of(len(requests)):
            results = await while_connected(request, generate_all(engine, requests))
        if results is None:
            return Response(status_code=CLIENT_GONE)
        answers = [result.to_json() for result in results]
        return json_response(answers if batch else answers[0])

    @app.get("/health_generate", summary="Alive and able to generate a token")
    async def health_generate(request: Request) -> Response:
        await while_connected(request, _prove_health(engine))
        return Response()


async def _prepared(engine: EmbeddedEngine, request: GenerateRequest) -> GenerateRequest:
    """Long texts as token ids, and those refused that are too long whatever their tokens are."""
    text = request.text
    if text is None or engine.tokenizer is None or len(text) < LONG_TEXT:
        return request
    if len(text) > engine.context_length * MAX_TOKEN_CHARACTERS:
        raise BadRequestError(
            f"text: {len(text)} characters do not fit the context length of {engine.context_length} tokens."
        )
    request.input_ids = list(await asyncio.to_thread(engine.tokenizer.encode, text))
    return request


async def generate_all(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> list[GenerateResult]:
    """The results of all; if one fails, or whoever waits goes away, the others are aborted."""
    ready = [await _prepared(engine, request) for request in requests]
    if len(ready) == 1:
        return [await engine.generate(ready[0])]
    return await gather_or_cancel(engine.generate(request) for request in ready)


async def _events(
    engine: EmbeddedEngine, requests: list[GenerateRequest], load: Load, *, batch: bool
) -> AsyncGenerator[Json, None]:
    """SGLang's chunks: everything so far, in a batch with the `index` of its prompt."""
    with load.of(len(requests)):
        streams = [engine.stream(await _prepared(engine, request)) for request in requests]
        if not batch:
            async with contextlib.aclosing(streams[0]) as results:
                async for result in results:
                    yield result.to_json()
            return
        async for index, result in _merged(streams):
            yield {**result.to_json(), "index": index}


async def _merged(
    streams: list[AsyncGenerator[GenerateResult, None]],
) -> AsyncGenerator[tuple[int, GenerateResult], None]:
    """What any of them yields, as it comes; all are closed at the end."""
    waiting: dict[asyncio.Future[Any], int] = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    result = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, result
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _prove_health(engine: EmbeddedEngine) -> None:
    """Returns once a step ends: of the requests that run, or of one of its own. EngineError (503) where none does."""
    if engine.paused or engine.released or engine.weights_missing:
        return  # it waits for whoever has asked it to
    before = engine.num_steps
    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    own = asyncio.ensure_future(engine.generate(GenerateRequest(input_ids=[0], sampling_params=params)))
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            while not (await asyncio.wait([own], timeout=HEALTH_POLL_S))[0]:
                if engine.num_steps > before:
                    return
        own.result()
    except TimeoutError as error:
        raise EngineError(
            f"no step ended within {HEALTH_TIMEOUT_S:g} s. Last error: {engine.last_error or 'none'}.", status=503
        ) from error
    finally:
        own.cancel()
