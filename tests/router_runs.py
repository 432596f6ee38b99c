"""A router that serves in the event loop of a test, and a client for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import uvicorn

from miles.engine.listen import bind_port, url_of
from miles.router.router import MilesRouter


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """The URL at which `app` is served by uvicorn, as `miles route` does."""
    listener = bind_port("127.0.0.1", 0, flag="--port")
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app, log_config=None, http="httptools", server_header=False, date_header=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        yield url_of(listener)
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def routing(*workers: Any, **settings: Any) -> AsyncIterator[tuple[MilesRouter, httpx.AsyncClient]]:
    """A router in front of `workers`, and a client whose base URL it is. `settings` are attributes of `args`."""
    router = MilesRouter(Namespace(**{"miles_router_worker_wait": 0.05, **settings}))
    for one in workers:
        router.table.add(one.url)
    async with serving(router.app) as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
        yield router, client


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait until something has happened that no event tells."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"after {timeout_s} s still not: {what}") from None


async def raw(url: str, data: bytes) -> bytes:
    """What a server answers to these bytes, until it closes the connection."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()
