"""Token-in, token-out behind the router: remembers the tokens of every text that engines have generated.

    POST /generate              passes; prompt and response are inserted into the tree when it has come back
    POST /retrieve_from_text    {"text"} -> the tokens, log-probs and loss mask of a text (`radix_tree`)

A response that was aborted, as engines do around a weight update, is asked for again a few times. Batches and streams
pass untouched.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miles.rollout.generate_utils.radix_tree import postprocess_sample_with_radix_tree
from miles.rollout.tokenizer import load_tokenizer
from miles.router.middleware_hub.radix_tree import StringRadixTrie

__all__ = ["HOP_BY_HOP", "RadixTreeMiddleware", "postprocess_sample_with_radix_tree"]

logger = logging.getLogger("miles.router")

HOP_BY_HOP = frozenset(
    (
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "upgrade",
    )
)
"""Names of headers that a response which is sent anew must not repeat."""

MAX_TOKENS = 8_000_000
"""Tokens that are remembered, with log-prob and mask about 20 bytes each."""

ATTEMPTS = 5
"""How often an aborted request is sent."""

FIRST_PAUSE_S, DEADLINE_S = 0.25, 30.0
"""The pause before the second attempt, doubled before each further one; none begins after the deadline."""


class RadixTreeMiddleware(BaseHTTPMiddleware):
    """Needs `args.hf_checkpoint`, whose tokenizer reads what is not known. The tree is `router.radix_tree`, too."""

    def __init__(self, app: Any, *, router: Any) -> None:
        super().__init__(app)
        self.router, self.args = router, router.args
        self.tokenizer = load_tokenizer(router.args.hf_checkpoint, trust_remote_code=True)
        self.radix_tree = StringRadixTrie(MAX_TOKENS, tokenizer=self.tokenizer, verbose=router.verbose)
        router.radix_tree = self.radix_tree

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        path = request.url.path
        if request.method != "POST" or path not in ("/generate", "/retrieve_from_text"):
            return await call_next(request)
        payload = await _object(request)
        if path == "/retrieve_from_text":
            return self._retrieve(payload)
        prompt = self._prompt(payload)
        if prompt is None:
            return await call_next(request)
        return await self._generate(request, *prompt)

    def _retrieve(self, payload: dict[str, Any] | None) -> Response:
        text = (payload or {}).get("text")
        if not isinstance(text, str) or not text:
            return JSONResponse({"error": {"message": 'expected {"text": "..."}, a text', "code": 400}}, 400)
        tokens, logp, loss_mask = self.radix_tree.retrieve_from_text(text)
        return JSONResponse(
            {
                "response": text,
                "tokens": tokens,
                "loss_mask": loss_mask,
                "rollout_logp": logp,
                "token_length": len(tokens),
                "loss_mask_length": len(loss_mask),
            }
        )

    def _prompt(self, payload: dict[str, Any] | None) -> tuple[str, list[int] | None] | None:
        """Text and tokens of one prompt; None for what passes: batches, streams, what the engine will refuse."""
        if payload is None or payload.get("stream"):
            return None
        text, ids = payload.get("text"), payload.get("input_ids")
        if isinstance(text, str) and text:
            return text, None
        if isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids):
            return str(self.tokenizer.decode(ids)), ids
        return None

    async def _generate(self, request: Request, text: str, ids: list[int] | None) -> Response:
        body = await request.body()
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + DEADLINE_S, FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            response = await self._ask(request, body)
            answer = _answer(response)
            if answer is None:
                return response
            if _finished(answer):
                self._insert(text, ids, answer)
                return response
            if attempt == ATTEMPTS or loop.time() + pause > deadline:
                break
            await asyncio.sleep(pause)
            pause *= 2
        logger.warning("/generate: still aborted after %d attempts", attempt)
        return response

    async def _ask(self, request: Request, body: bytes) -> Response:
        """One run of what lies below this middleware, with the request's own body; the whole answer."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        start: dict[str, Any] = {}
        parts: list[bytes] = []

        async def receive() -> Any:
            return unread.pop() if unread else await request.receive()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await self.app(dict(request.scope), receive, send)
        response = Response(b"".join(parts), start["status"])
        kept = [(n, v) for n, v in start["headers"] if n.decode("latin-1").lower() not in HOP_BY_HOP]
        response.raw_headers = [*kept, (b"content-length", str(len(response.body)).encode())]
        return response

    def _insert(self, text: str, ids: list[int] | None, answer: dict[str, Any]) -> None:
        """Prompt and response as one text; nothing where the engine does not say which tokens it generated."""
        meta = answer["meta_info"]
        generated, response = meta.get("output_token_logprobs"), answer.get("text")
        if not isinstance(response, str) or not response:
            return
        if generated:
            new_ids, new_logp = [int(item[1]) for item in generated], [float(item[0] or 0.0) for item in generated]
        else:
            new_ids = list(answer.get("output_ids") or ())
            new_logp = [0.0] * len(new_ids)
        known_ids, logp, loss_mask = self._known(text, ids)
        self.radix_tree.insert(
            text + response,
            known_ids + new_ids,
            logp + new_logp,
            loss_mask + [1] * len(new_ids),
            weight_version=meta.get("weight_version"),
        )

    def _known(self, text: str, ids: list[int] | None) -> tuple[list[int], list[float], list[int]]:
        """Tokens, log-probs and loss mask of a prompt. `ids`, where the request gave them, are its tokens."""
        if ids is None:
            return self.radix_tree.retrieve_from_text(text)
        found = self.radix_tree.find_longest_prefix(text)
        same = found.token_ids == ids[: len(found.token_ids)]  # else it was made of other tokens
        rest = len(ids) - len(found.token_ids) if same else len(ids)
        logp, mask = (found.logp, found.loss_mask) if same else ([], [])
        known = ids, logp + [0.0] * rest, mask + [0] * rest
        self.radix_tree.insert(text, *known)  # what the answers of a group have in common
        return known


async def _object(request: Request) -> dict[str, Any] | None:
    """The body's JSON object; None where it is anything else."""
    try:
        payload = json.loads(await request.body())
    except (ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) else None


def _answer(response: Response) -> dict[str, Any] | None:
    """The engine's answer to one prompt; None for errors and whatever else is only passed on."""
    if response.status_code != 200:
        return None
    try:
        answer = json.loads(bytes(response.body))
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("meta_info"), dict) else None


def _finished(answer: dict[str, Any]) -> bool:
    reason = answer["meta_info"].get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else reason
    return kind is not None and kind != "abort"
