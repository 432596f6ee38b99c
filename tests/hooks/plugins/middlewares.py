"""Middlewares of the router that leave traces, or raise."""

from __future__ import annotations

from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware


class First:
    """Plain ASGI: notes in the scope that it was here; sends the notes along as a header of the request."""

    def __init__(self, app: Any, *, router: Any) -> None:
        self.app, self.router = app, router
        router.made = [*getattr(router, "made", []), type(self).__name__]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [*scope["headers"], (b"x-passed", type(self).__name__.encode())]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)


class Second(First):
    pass


class Counting(BaseHTTPMiddleware):
    """As most are written: with `dispatch`."""

    def __init__(self, app: Any, *, router: Any) -> None:
        super().__init__(app)
        self.router = router

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["x-workers"] = str(len(self.router.worker_request_counts))
        return response


class Answering(Counting):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        from starlette.responses import JSONResponse

        if request.url.path == "/mine":
            return JSONResponse({"args": self.router.args.mine, "verbose": self.router.verbose})
        return await call_next(request)


class Raising(Counting):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        if "bad" in request.url.path:
            raise KeyError("no such prompt")
        return await call_next(request)


class RaisingAfterwards(Counting):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        return response if "bad" not in request.url.path else response.headers["not-there"]


class RaisingInTheStream(First):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def failing_send(message: Any) -> None:
            if message["type"] == "http.response.body" and "bad" in scope["path"]:
                raise ValueError("in the stream")
            await send(message)

        await self.app(scope, receive, failing_send)


class RaisingWhenMade(First):
    def __init__(self, app: Any, *, router: Any) -> None:
        raise RuntimeError("no database")
