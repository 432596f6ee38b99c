"""A token bucket per client: so many requests a second on average, some more at once, 429 beyond that.

    miles hooks --miles-router-middleware-paths examples/router_middleware/limit.py:TokenBucket

The rate and the size of the bucket are flags of its own, `--requests-per-s` and `--burst`.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

MAX_CLIENTS = 10_000


class TokenBucket(BaseHTTPMiddleware):
    def __init__(self, app: ASGIApp, *, router: Any) -> None:
        super().__init__(app)
        self.rate = float(getattr(router.args, "requests_per_s", 100.0))  # `miles route` has no such flag
        self.burst = float(getattr(router.args, "burst", 2 * self.rate))
        self.now = time.monotonic
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, and when that was

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--requests-per-s", type=float, default=100.0, help="Requests of one client per second.")
        parser.add_argument("--burst", type=float, default=200.0, help="Requests of one client at once.")

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        client = request.client.host if request.client is not None else ""
        wait_s = self.take(client)
        if wait_s == 0:
            return await call_next(request)
        message = f"more than {self.rate:g} requests per second from {client}"
        headers = {"retry-after": str(math.ceil(wait_s))}
        return JSONResponse({"error": {"message": message, "code": 429}}, 429, headers)

    def take(self, client: str) -> float:
        """Take one token of the client's bucket; seconds until there is one where it is empty."""
        now = self.now()
        tokens, then = self.buckets.get(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        wait_s = 0.0 if tokens >= 1 else (1 - tokens) / self.rate
        self.buckets[client] = (tokens - 1 if wait_s == 0 else tokens, now)
        self.buckets.move_to_end(client)
        if len(self.buckets) > MAX_CLIENTS:
            self.buckets.popitem(last=False)
        return wait_s
