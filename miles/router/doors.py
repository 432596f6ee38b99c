"""The door around each middleware: what it raises is told with its file and line, answered with 500, and over.

Middlewares are plug-ins (`--miles-router-middleware-paths`), loaded and bound by `miles.hooks`. The router itself never
raises through them, except for ResponseCut, which passes.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from miles.hooks import Hook, bind
from miles.hooks.card import card
from miles.router.forward import Message, Receive, ResponseCut, Scope, Send, send_error

logger = logging.getLogger("miles.router")


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
            cut = next((e for e in _all_of(error) if isinstance(e, ResponseCut)), None)
            if cut is not None:
                raise cut from None
            message = self._tell(error)
            if started:
                raise ResponseCut(message) from error
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


def _all_of(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it holds or was caused by."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            todo.extend(one.exceptions)
