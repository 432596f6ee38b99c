"""--miles-router-middleware-paths: classes made with `(app, router=)`; later paths are outer."""

from __future__ import annotations

import asyncio
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hooks_helpers import PLUGINS, bound_hooks, path_of
from null_workers import Request, Writer, answer_ok, response, worker
from router_runs import routing

from miles.errors import HookError, HookReport, UsageError
from miles.router.router import MilesRouter


def paths(*names: str) -> dict[str, Any]:
    return {"miles_router_middleware_paths": [path_of(f"middlewares:{name}") for name in names]}


def line_of(text: str) -> int:
    lines = (PLUGINS / "middlewares.py").read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line)


def test_called_as_the_catalogue_says() -> None:
    hooks = bound_hooks("miles_router_middleware", "training:Middleware", "training:Outer")
    first, second = hooks.miles_router_middleware
    made = second(first("app", router="router"), router="router")
    assert type(made).__name__ == "Outer" and made.router == "router" and made.app.app == "app"
    assert {hook.form for hook in hooks.miles_router_middleware} == {"class"}


def test_each_is_recorded() -> None:
    hooks = bound_hooks("miles_router_middleware", "training:Middleware", "training:Outer")
    assert set(hooks.sources()) == {"--miles-router-middleware-paths[0]", "--miles-router-middleware-paths[1]"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WithoutRouter", "unexpected keyword argument 'router'"),
        ("agent", "name a class"),
    ],
)
def test_found_wrong_before_the_start(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bound_hooks("miles_router_middleware", f"training:{name}")


def test_a_request_passes_the_last_one_first() -> None:
    async def main() -> None:
        async with worker() as one, routing(one, **paths("First", "Second")) as (router, client):
            assert [m.kwargs for m in router.app.user_middleware] == [{"router": router}] * 2
            assert (await client.get("/x")).json() == {"ok": True}
            # The outer one notes first. Making begins inside, with the first path.
            assert re.findall("Second|First", one.requests[-1].head) == ["Second", "First"]
            assert router.made == ["First", "Second"]

    asyncio.run(main())


def test_it_stands_before_the_routers_own_endpoints_and_may_read_the_router() -> None:
    async def main() -> None:
        async with worker() as one, routing(one, mine=7, **paths("Counting", "Answering")) as (_, client):
            assert (await client.get("/list_workers")).headers["x-workers"] == "1"
            assert (await client.get("/anything")).headers["x-workers"] == "1"
            assert (await client.get("/mine")).json() == {"args": 7, "verbose": False}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "line", "error"),
    [
        ("Raising", 'raise KeyError("no such prompt")', "KeyError: 'no such prompt'"),
        ("RaisingAfterwards", 'response.headers["not-there"]', "KeyError: 'not-there'"),
    ],
)
def test_one_that_raises_is_answered_with_its_line_and_the_router_goes_on(
    name: str, line: str, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with worker() as one, routing(one, **paths("First", name, "Counting")) as (router, client):
            for _ in range(2):
                got = await client.post("/bad", json={})
                assert got.status_code == 500 and got.headers["x-workers"] == "1"  # the outer one sees an answer
                message = got.json()["error"]["message"]
                assert message.startswith("--miles-router-middleware-paths ") and error in message
                assert f"middlewares.py:{line_of(line)}" in message
            assert (await client.post("/good", json={})).status_code == 200
            assert router.worker_request_counts == {one.url: 0} and router.worker_failure_counts[one.url] == 0

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    cards = [r.message for r in caplog.records if r.levelno == logging.ERROR and "policy" in r.message]
    assert len(cards) == 1 and f"{line_of(line)} |" in cards[0]  # the whole card once


def test_one_that_raises_in_the_middle_of_an_answer_cuts_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with worker() as one, routing(one, **paths("RaisingInTheStream")) as (_, client):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/bad")
            assert (await client.get("/good")).status_code == 200
        # An outer one still has the head of the answer in hand: then there can be a sentence.
        async with worker() as one, routing(one, **paths("RaisingInTheStream", "Counting")) as (_, client):
            got = await client.get("/bad")
            assert got.status_code == 500 and line in got.json()["error"]["message"]

    line = f"middlewares.py:{line_of('raise ValueError')}"
    asyncio.run(main())
    assert line in caplog.text


def test_an_answer_that_breaks_off_is_no_middlewares_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def half(request: Request, writer: Writer) -> None:
        writer.write(response(b"1234567890").removesuffix(b"67890"))
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with worker(half) as one, routing(one, **paths("First", "Counting")) as (_, client):
            try:
                got = await client.get("/x")
                assert got.status_code == 502 and one.url in got.json()["error"]["message"]
            except httpx.RemoteProtocolError:
                pass  # the head had gone out before the rest failed to come
            one.answer = answer_ok
            assert (await client.get("/x")).status_code == 200

    asyncio.run(main())
    assert "--miles-router-middleware-paths" not in caplog.text


def test_a_constructor_that_raises_ends_the_start() -> None:
    router = MilesRouter(Namespace(**paths("First", "RaisingWhenMade")))
    with pytest.raises(HookError, match=f"middlewares.py:{line_of('no database')}"):
        router.app.build_middleware_stack()


def test_all_that_cannot_be_loaded_is_told_at_once(tmp_path: Path) -> None:
    given = [path_of("middlewares:Nothing"), f"{tmp_path}/none.py:Cache", path_of("training:agent")]
    with pytest.raises(HookReport, match="3 plug-in problems"):
        MilesRouter(Namespace(miles_router_middleware_paths=given))
