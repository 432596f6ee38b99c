"""A response cache: an answer that cannot be another one is given without asking an engine again.

    miles hooks --miles-router-middleware-paths examples/router_middleware/cache.py:ResponseCache

Kept are answers to `/generate` that are decided by the request: temperature 0, or a `sampling_seed`. Samples of a group
differ because nothing else decides them, so caching those would be a mistake. A weight update forgets everything.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

MAX_BYTES = 64 * 1024 * 1024


class ResponseCache(BaseHTTPMiddleware):
    def __init__(self, app: ASGIApp, *, router: Any) -> None:
        super().__init__(app)
        self.router = router
        self.version: str | None = None
        self.answers: OrderedDict[bytes, bytes] = OrderedDict()
        self.size = 0

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if request.url.path != "/generate" or not is_decided(body := await request.body()):
            return await call_next(request)
        self.forget_old_weights(self.router.weight_version)
        key = hashlib.sha256(body).digest()
        if key in self.answers:
            self.answers.move_to_end(key)
            return Response(self.answers[key], media_type="application/json", headers={"x-cache": "hit"})
        response = await call_next(request)
        content = b"".join([part async for part in response.body_iterator])  # type: ignore[attr-defined]
        if response.status_code == 200:
            self.keep(key, content)
        kept = {name: value for name, value in response.headers.items() if name != "content-length"}
        return Response(content, response.status_code, {**kept, "x-cache": "miss"})

    def keep(self, key: bytes, content: bytes) -> None:
        reported = json.loads(content).get("meta_info", {})
        if reported.get("finish_reason", {}).get("type") == "abort":
            return
        self.forget_old_weights(reported.get("weight_version", self.version))
        self.answers[key] = content
        self.size += len(content)
        while self.size > MAX_BYTES:
            _, oldest = self.answers.popitem(last=False)
            self.size -= len(oldest)

    def forget_old_weights(self, version: str | None) -> None:
        if version is not None and version != self.version:
            self.version, self.size = version, 0
            self.answers.clear()


def is_decided(body: bytes) -> bool:
    """Whether the same request would be answered in the same way."""
    try:
        payload = json.loads(body)
        sampling = payload.get("sampling_params") or {}
        return not payload.get("stream") and (sampling.get("temperature") == 0 or "sampling_seed" in sampling)
    except (ValueError, AttributeError):
        return False
