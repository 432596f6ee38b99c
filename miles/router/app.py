"""The router's FastAPI application: its own endpoints, and the lane on which everything else goes to an engine.

    GET  /health                   the router serves
    GET  /metrics                  Prometheus text
    GET  /list_workers             {"urls": [...]}, held ones included
    GET  /workers                  {"workers": [{"url", "state", "in_flight", "weight_version", ...}]}
    POST /add_worker               ?url= or ?worker_url=, or JSON with these keys
    POST /remove_worker            the same
    POST /weight_version           {"weight_version": "7"}: from now on only engines that report it serve
    /sessions...                   recorded chats, where `args` has an `hf_checkpoint` (`session/`)
    any other path                 an engine

Middlewares stand in front of all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from miles import __version__
from miles.router.doors import Door, note_cut, run_cuttable
from miles.router.message import Receive, ResponseCut, Scope, Send

if TYPE_CHECKING:
    from miles.hooks import Hook
    from miles.router.router import MilesRouter

logger = logging.getLogger("miles.router")

PROXIED = "/{path:path}"
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]


class Lane:
    """Paths of the app go to its routes, all others to `forward` without passing FastAPI."""

    def __init__(self, app: RouterApp, routes: Any, forward: Any) -> None:
        self.routes, self.forward = routes, forward
        paths = [str(route.path) for route in app.routes if hasattr(route, "path") and route.path != PROXIED]
        self.exact = frozenset(path for path in paths if "{" not in path)
        self.prefixes = tuple({path.partition("{")[0] for path in paths if "{" in path})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        try:
            if scope["type"] == "http" and path not in self.exact and not path.startswith(self.prefixes):
                await self.forward(scope, receive, send)
            else:
                await self._own(path, scope, receive, send)
        except ResponseCut as cut:
            note_cut(scope, cut)
            raise

    async def _own(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.routes(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or isinstance(error, ResponseCut):
                raise
            logger.exception("%s failed", path)  # answered with 500 already; no middleware's fault


class RouterApp(FastAPI):
    """FastAPI with the lane at the bottom and a door around each middleware.

    `hooks`: by class, the plug-ins among the middlewares. `forward`: None sends every path through FastAPI.
    """

    def __init__(self, forward: Any, **settings: Any) -> None:
        super().__init__(
            title="miles router", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, **settings
        )
        self.forward = forward
        self.hooks: dict[Any, Hook] = {}
        self.add_exception_handler(Exception, _failed)

    def build_middleware_stack(self) -> Any:
        added, self.user_middleware = self.user_middleware, []
        try:
            routes = super().build_middleware_stack()
        finally:
            self.user_middleware = added
        app: Any = Lane(self, routes, self.forward or routes)
        for middleware in reversed(added):
            hook = self.hooks.get(middleware.cls)
            if hook is None:
                app = middleware.cls(app, *middleware.args, **middleware.kwargs)
            else:
                app = Door(hook, app, *middleware.args, **middleware.kwargs)
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        scope["app"] = self
        try:
            if self.user_middleware and scope["type"] == "http":
                await run_cuttable(self.middleware_stack, scope, receive, send)
            else:
                await self.middleware_stack(scope, receive, send)
        except ResponseCut as cut:
            logger.debug("an answer was cut: %s", cut)


async def _failed(request: Request, error: Exception) -> Response:
    message = f"{request.url.path} failed: {type(error).__name__}: {error}"
    return JSONResponse({"error": {"message": message, "code": 500}}, 500)


def create_app(router: MilesRouter, forward: Any) -> RouterApp:
    """The app of `router`, without its middlewares. `forward` None: other paths go to `router.proxy`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        router.start()
        yield
        await router.stop()

    app = RouterApp(forward, lifespan=lifespan)
    _add_own(app, router)
    if getattr(router.args, "hf_checkpoint", None) and importlib.util.find_spec("miles.router.session"):
        sessions = importlib.import_module("miles.router.session.sessions")
        sessions.setup_session_routes(app, router)
    if forward is None:
        app.api_route(PROXIED, methods=METHODS)(router.proxy)
    return app


def _add_own(app: FastAPI, router: MilesRouter) -> None:
    table = router.table

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "workers": len(table.counts), "serving": len(table.serving)}

    @app.get("/workers")
    async def workers() -> dict[str, Any]:
        return {"workers": [table.describe(url) for url in table.counts]}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(router.metrics())

    @app.post("/weight_version")
    async def weight_version(request: Request) -> Response:
        version = (await json_object(request)).get("weight_version")
        if not isinstance(version, (str, int)) or isinstance(version, bool):
            return bad_request(f'expected {{"weight_version": "7"}}, got {version!r:.100} as weight_version.')
        await router.require_weight_version(str(version))
        return JSONResponse({"weight_version": str(version), "workers": {u: table.state(u) for u in table.counts}})

    add: Callable[..., Any] = app.post("/add_worker")
    add(router.add_worker)
    app.post("/remove_worker")(router.remove_worker)
    app.get("/list_workers")(router.list_workers)


async def json_object(request: Request) -> dict[str, Any]:
    """The body's JSON object; `{}` where it is anything else."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def bad_request(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": 400}}, 400)
