"""The door around each middleware: what it raises is told with its file and line, answered with 500, and over.

Middlewares are plug-ins (`--miles-router-middleware-paths`), loaded and bound by `miles.hooks`. The router itself never
raises through them, except for ResponseCut, which passes. Starlette's BaseHTTPMiddleware ends an answer properly that
broke off below it; so a cut is noted in the scope, too, and nothing is sent to the client after it (`run_cuttable`).
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from miles.hooks import Hook, bind
from miles.hooks.card import card
from miles.router.message import App, Message, Receive, ResponseCut, Scope, Send, send_error

logger = logging.getLogger("miles.router")

CUT = "miles.router.cut"
"""In the scope of a request that passes middlewares: a list, not empty once its answer has to be cut."""


async def run_cuttable(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Run middlewares and what is below them. After a cut nothing more is sent; raises ResponseCut then."""
    cuts: list[ResponseCut] = []
    scope[CUT] = cuts
    started = False

    async def guarded_send(message: Message) -> None:
        nonlocal started
        if cuts:
            raise cuts[0]
        started = True
        await send(message)

    try:
        await app(scope, receive, guarded_send)
    except ResponseCut as cut:
        if started:
            raise
        await send_error(send, cut.status, str(cut))


def note_cut(scope: Scope, cut: ResponseCut) -> ResponseCut:
    scope.get(CUT, []).append(cut)
    return cut


def bound_middlewares(args: Namespace) -> tuple[Hook, ...]:
    """The middlewares that `args` names, in that order. Raises HookReport with what is wrong with them.

    Only this plug point is bound: rewards and data sources have no business in the router's process.
    """
    paths = getattr(args, "miles_router_middleware_paths", None) or None  # a bare Namespace may lack it
    return bind(Namespace(miles_router_middleware_paths=paths)).miles_router_middleware


class Door:
    """One middleware as an ASGI application. Making it calls the plug-in's constructor; raises HookError."""

    def __init__(self, hook: Hook, app: Any, *args: Any, **kwargs: Any) -> None:
        self.hook = hook
        self.app = hook(app, *args, **kwargs)
        self._told: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        except Exception as error:
            if scope[CUT]:
                raise scope[CUT][0] from None
            message = self._tell(error)
            if started:
                raise note_cut(scope, ResponseCut(message, 500)) from error
            await send_error(send, 500, message)

    def _tell(self, error: Exception) -> str:
        """The sentence of the answer. The whole card is logged once per place."""
        failed = self.hook.failed(error, (), {}, call="method")
        self.hook.stats.rollout.failures += 1
        place = str(failed.place or failed.source)
        message = f"{self.hook.point.flag} {self.hook.path} failed at {place}: {failed.message}"
        if place in self._told:
            logger.warning("%s", message)
        else:
            self._told.add(place)
            logger.error("%s", card(failed, None))
        return message
