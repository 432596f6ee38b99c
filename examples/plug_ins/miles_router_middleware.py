"""Latency of every path of the router, kept in the headers of the answers.

    miles train --config examples/quickstart/carry.yaml --use-miles-router \
        --miles-router-middleware-paths examples/plug_ins/miles_router_middleware.py:Timed

A Starlette middleware like any other: it sees each request before the router sends it to an engine, and the answer
after that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp


class Timed(BaseHTTPMiddleware):
    def __init__(self, app: ASGIApp, *, router: Any) -> None:
        super().__init__(app)
        self.router = router

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        response.headers["x-seconds"] = f"{time.perf_counter() - start:.6f}"
        return response
