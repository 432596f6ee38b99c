"""The caller's end of a request: the future of its result, and what a stream has seen of it so far.

The engine's thread only appends to a running request's tokens and says that there are more (`Progress.tell`); partial
results are put together, and their text decoded, in the event loop of whoever reads the stream. A reader that is slow
skips chunks: each says all that there is, so nothing piles up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.engine.embedded.scheduler import Running
from miles.engine.protocol import GenerateRequest, GenerateResult, WeightVersionSpan

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the first bytes of a character to."""

MAX_HELD_TOKENS = 8
"""Tokens that may wait for the rest of a character; after them the bytes are taken for what they are."""


@dataclass(eq=False)
class Reply:
    """Where a result goes: a future of the caller's loop, and for streams what comes before it."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[GenerateResult]
    progress: Progress | None = None
    cancelled: bool = False

    def resolve(self, result: GenerateResult | Exception) -> None:
        """In the caller's loop."""
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)
        if self.progress is not None:
            self.progress.news.set()


Delivery = tuple[Reply, GenerateResult | Exception]


class Progress:
    """The partial results of one running request."""

    def __init__(self, request: GenerateRequest, tokenizer: Any, version: Callable[[], str]) -> None:
        self.running: Running | None = None  # set by the engine's thread
        self.news = asyncio.Event()
        self.first_shown = threading.Event()
        self._version, self._shown = version, 0
        self._told = False
        self._text = None if tokenizer is None else TextSoFar(request, tokenizer)

    def tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the engine's thread, after a step: there is another token. At most one call of the loop is under way."""
        if not self._told:
            self._told = True
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._told = False
        self.news.set()

    def partial(self) -> GenerateResult | None:
        """What there is, if it is more than last time."""
        r = self.running
        if r is None or len(r.logprobs) <= self._shown:
            return None
        while True:  # a weight update between two reads would give tokens to the wrong version
            version = self._version()
            num, spans = len(r.logprobs), list(r.spans)
            if version == self._version():
                break
        self.first_shown.set()
        self._shown, ids = num, r.ids[r.prompt_len : r.prompt_len + num]
        start = spans[-1].end if spans else 0
        if num > start:
            spans.append(WeightVersionSpan(version, start, num))
        result = GenerateResult(
            rid=r.request.rid,
            text=self._text.of(ids) if self._text is not None else "",
            output_ids=ids,
            finish_reason=None,
            prompt_tokens=r.prompt_len,
            cached_tokens=min(r.cached_tokens, r.prompt_len),
            weight_versions=spans,
            e2e_latency_s=time.perf_counter() - r.started_s,
        )
        if r.request.return_logprob:
            result.output_logprobs, result.input_logprobs = r.logprobs[:num], r.input_logprobs
        return result


class TextSoFar:
    """Decodes a growing list of tokens without decoding all of it again.

    What it has said it never takes back: the first bytes of a character wait for the others, and what may become a
    stop string waits until it cannot any more (the final result, which `scheduler.py` makes, has the rest).
    """

    def __init__(self, request: GenerateRequest, tokenizer: Any) -> None:
        params = request.sampling_params
        self._tokenizer, self._stops = tokenizer, params.stop
        self._options = {
            "skip_special_tokens": params.skip_special_tokens,
            "spaces_between_special_tokens": params.spaces_between_special_tokens,
        }
        self._text, self._context, self._read = "", 0, 0

    def of(self, ids: list[int]) -> str:
        """Text of all tokens; `ids` begins with those of the call before."""
        # Tokens are decoded behind the ones before them: some decoders drop the space of a first word.
        before = self._decode(ids[self._context : self._read])
        now = self._decode(ids[self._context :])
        if not now.endswith(REPLACEMENT) or len(ids) - self._read > MAX_HELD_TOKENS:
            self._text += now[len(before) :]
            self._context, self._read = self._read, len(ids)
        return self._text[: len(self._text) - self._held_for_stops()] if self._stops else self._text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, **self._options) if ids else ""
        return text

    def _held_for_stops(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0
