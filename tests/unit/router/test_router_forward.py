"""Requests through the router: bytes in both directions, streams, limits, clients that leave."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from argparse import Namespace
from typing import Any

import fastapi
import httpx
import pytest
from null_workers import Request, Writer, response, worker
from router_runs import raw, routing, serving, until

from miles.router import forward
from miles.router.router import MilesRouter
from miles.router.upstream import READ_AHEAD


def test_request_and_answer_pass_byte_for_byte() -> None:
    body = b'{ "a" : 1.0, "\xc3\xa9": [1,2] }\n'
    compressed = gzip.compress(b'{"x": 1}')

    async def answer(request: Request, writer: Writer) -> None:
        writer.write(
            response(
                compressed, 201, "x-of-worker: yes\r\ncontent-encoding: gzip\r\nset-cookie: a\r\nset-cookie: b\r\n"
            )
        )

    async def main() -> None:
        async with worker(answer) as one, routing(one) as (_, client):
            request = client.build_request("PUT", "/v1/a%2Fb/?q=1%202&empty", content=body, headers={"x-mine": "1"})
            got = await client.send(request, stream=True)
            assert b"".join([part async for part in got.aiter_raw()]) == compressed
            assert got.status_code == 201 and got.headers["x-of-worker"] == "yes"
            assert got.headers.get_list("set-cookie") == ["a", "b"]
            (seen,) = one.requests
            assert (seen.method, seen.target, seen.body) == ("PUT", "/v1/a%2Fb/?q=1%202&empty", body)
            assert seen.headers["x-mine"] == "1" and seen.headers["host"] == one.url.removeprefix("http://")

    asyncio.run(main())


def test_headers_of_one_connection_stay_on_it() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        writer.write(
            response(
                b"{}", headers="connection: x-hop, keep-alive\r\nx-hop: 1\r\nkeep-alive: timeout=1\r\nx-end: 1\r\n"
            )
        )

    async def main() -> None:
        async with worker(answer) as one, routing(one) as (_, client):
            given = {"connection": "keep-alive, x-drop", "x-drop": "1", "te": "trailers", "x-keep": "1"}
            got = await client.get("/info", headers=given)
            assert "x-hop" not in got.headers and "keep-alive" not in got.headers and got.headers["x-end"] == "1"
            (seen,) = one.requests
            assert not {"x-drop", "te", "connection"} & set(seen.headers) and seen.headers["x-keep"] == "1"
            assert "content-length" not in seen.headers

    asyncio.run(main())


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_every_method_passes(method: str) -> None:
    async def main() -> None:
        async with worker() as one, routing(one) as (_, client):
            assert (await client.request(method, "/any/path")).json() == {"ok": True}
            assert one.requests[0].method == method

    asyncio.run(main())


def test_head_has_no_body_and_the_next_request_is_not_disturbed() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        full = response(b"hello")
        writer.write(full.removesuffix(b"hello") if request.method == "HEAD" else full)

    async def main() -> None:
        async with worker(answer) as one, routing(one) as (_, client):
            for _ in range(2):
                got = await client.head("/x")
                assert got.status_code == 200 and got.content == b""
                assert (await client.get("/x")).content == b"hello"

    asyncio.run(main())


def test_stream_arrives_piece_by_piece() -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def answer(request: Request, writer: Writer) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for n in range(3):
                event = b"data: %d\n\n" % n
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await go_on.wait()
                go_on.clear()
            writer.write(b"0\r\n\r\n")

        async with worker(answer) as one, routing(one) as (_, client):
            async with client.stream("POST", "/generate", json={"stream": True}) as got:
                assert got.headers["content-type"] == "text/event-stream"
                n = 0
                async for part in got.aiter_raw():  # each part is here before the next one is sent
                    assert part == b"data: %d\n\n" % n
                    n += 1
                    go_on.set()
            assert n == 3

    asyncio.run(main())


def test_answer_that_ends_with_the_connection_is_whole() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await writer.drain()
        writer.write(b"def")
        writer.close()

    async def main() -> None:
        async with worker(answer) as one, routing(one) as (_, client):
            assert (await client.get("/x")).content == b"abcdef"

    asyncio.run(main())


@pytest.mark.parametrize("known_length", [True, False])
def test_large_bodies_pass_both_ways(known_length: bool) -> None:
    body = random.Random(1).randbytes(3 * forward.REPLAY + 17)

    async def echo(request: Request, writer: Writer) -> None:
        writer.write(response(request.body))

    async def parts():  # type: ignore[no-untyped-def]
        for begin in range(0, len(body), 100_003):
            yield body[begin : begin + 100_003]

    async def main() -> None:
        async with worker(echo) as one, routing(one) as (_, client):
            headers = {"content-length": str(len(body))} if known_length else {}
            got = await client.post("/echo", content=parts(), headers=headers)
            assert got.content == body
            assert ("transfer-encoding" in one.requests[0].headers) is not known_length

    asyncio.run(main())


def test_slow_client_holds_the_worker_back() -> None:
    """What a client does not read stays with the worker: the router keeps a bounded part of it."""

    async def main() -> None:
        size, sent = 64 * READ_AHEAD, 0

        async def answer(request: Request, writer: Writer) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            while sent < size:
                writer.write(b"x" * READ_AHEAD)
                sent += READ_AHEAD
                await writer.drain()

        async with worker(answer) as one, routing(one) as (_, client):
            async with client.stream("GET", "/x") as got:
                stream = got.aiter_raw()
                total = len(await anext(stream))
                before = -1
                while before != sent:
                    before = sent
                    await asyncio.sleep(0.1)
                assert sent < size
                async for part in stream:
                    total += len(part)
            assert total == sent == size

    asyncio.run(main())


def test_client_that_leaves_ends_the_request_at_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "WATCH_AFTER_S", 0.0)
    monkeypatch.setattr(forward, "SWEEP_S", 0.02)

    async def never(request: Request, writer: Writer) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with worker(never) as one, routing(one) as (router, client):
            waiting = asyncio.create_task(client.post("/generate", json={"text": "x"}))
            await until(lambda: bool(one.requests), "the request at the worker")
            assert router.worker_request_counts == {one.url: 1}
            waiting.cancel()
            await asyncio.wait_for(one.lost.wait(), 10)
            await until(lambda: router.worker_request_counts[one.url] == 0, "nothing in flight")
            assert router.forwarder.answers[499] == 1 and router.forwarder.gate.inside == 0
            assert router.worker_failure_counts[one.url] == 0

    asyncio.run(main())


def test_client_that_leaves_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "WATCH_AFTER_S", 0.0)
    monkeypatch.setattr(forward, "SWEEP_S", 0.02)

    async def one_piece(request: Request, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        await asyncio.Event().wait()

    async def main() -> None:
        async with worker(one_piece) as one, routing(one) as (router, client):
            async with client.stream("POST", "/generate", json={}) as got:
                assert await anext(got.aiter_raw()) == b"x"
            await asyncio.wait_for(one.lost.wait(), 10)
            await until(lambda: not router.forwarder._flights, "nothing in flight")

    asyncio.run(main())


def test_time_limit() -> None:
    async def never(request: Request, writer: Writer) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with worker(never) as one, routing(one, miles_router_timeout=0.2) as (_, client):
            got = await client.post("/generate", json={})
            assert got.status_code == 504 and "--miles-router-timeout" in got.json()["error"]["message"]
            await asyncio.wait_for(one.lost.wait(), 10)

    asyncio.run(main())


@pytest.mark.parametrize("known_length", [True, False])
def test_too_large_body_is_refused(known_length: bool) -> None:
    limit = 2 * forward.REPLAY

    async def parts():  # type: ignore[no-untyped-def]
        for _ in range(5):
            yield b"x" * (limit // 4)

    async def main() -> None:
        async with worker() as one, routing(one, miles_router_max_body_bytes=limit) as (router, client):
            content = b"x" * (limit + 1) if known_length else parts()
            got = await client.post("/generate", content=content)
            assert got.status_code == 413 and str(limit) in got.json()["error"]["message"]
            assert one.requests == [] and router.worker_request_counts == {one.url: 0}
            assert router.worker_failure_counts[one.url] == 0
            assert (await client.post("/generate", content=b"x" * limit)).status_code == 200

    asyncio.run(main())


def test_more_requests_than_connections_wait_in_line_and_too_many_are_refused() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        together = peak = 0

        async def answer(request: Request, writer: Writer) -> None:
            nonlocal together, peak
            together += 1
            peak = max(peak, together)
            await gate.wait()
            together -= 1
            writer.write(response())

        settings = {"miles_router_max_connections": 2, "miles_router_max_waiting": 3}
        async with worker(answer) as one, routing(one, **settings) as (router, client):
            tasks = [asyncio.create_task(client.post("/generate", json={})) for _ in range(5)]
            await until(lambda: router.forwarder.gate.waiting == 3, "three in line")
            refused = await client.post("/generate", json={})
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert "--max-waiting" in refused.json()["error"]["message"]
            gate.set()
            assert [r.status_code for r in await asyncio.gather(*tasks)] == [200] * 5
            assert peak == 2 and router.forwarder.gate.inside == 0

    asyncio.run(main())


def test_who_leaves_the_line_gives_up_its_place() -> None:
    async def main() -> None:
        gate = forward.Gate(1, 10)
        await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        gate.leave()  # the place goes to the second, whose turn it is even if it is cancelled right now
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert waiting[2].exception() is None and gate.inside == 1 and gate.waiting == 0
        gate.leave()
        assert gate.inside == 0

    asyncio.run(main())


def test_no_worker_is_a_sentence() -> None:
    async def main() -> None:
        async with routing() as (_, client):
            got = await client.post("/generate", json={})
            assert got.status_code == 503 and got.headers["retry-after"] == "1"
            assert "/add_worker" in got.json()["error"]["message"]

    asyncio.run(main())


def test_what_is_no_http_is_answered_and_the_router_goes_on() -> None:
    async def main() -> None:
        async with worker() as one, routing(one) as (_, client):
            url = str(client.base_url)
            bad = [
                b"hello\r\n\r\n",
                b"GET /x HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
                b"GET /x HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
                b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00",
                b"GET  HTTP/1.1\r\n\r\n",
            ]
            for data in bad:
                assert (await raw(url, data)).startswith(b"HTTP/1.1 400"), data
            assert (await client.get("/x")).status_code == 200

    asyncio.run(main())


async def session_like(request: fastapi.Request) -> fastapi.Response:
    """A route as those of sessions are."""
    router = request.app.state.router
    result = await router._do_proxy(request, "v1/chat/completions", body=b'{"n": 2}', headers={"X-A": "1"})
    assert result["request_body"] == b'{"n": 2}' and json.loads(result["response_body"]) == {"ok": True}
    assert result["status_code"] == 200 and result["headers"]["content-type"] == "application/json"
    built: fastapi.Response = router._build_proxy_response(result)
    return built


def test_published_proxy_keeps_the_answer() -> None:
    """What session routes and middlewares call: `_do_proxy` and `_build_proxy_response`."""

    async def main() -> None:
        async with worker() as one, routing(one) as (router, client):
            router.app.state.router = router
            router.app.post("/own/route")(session_like)
            router.app.middleware_stack = None  # made again with the new route
            got = await client.post("/own/route?x=1", json={"n": 1})
            assert got.json() == {"ok": True} and got.headers["content-length"] == "12"
            (seen,) = one.requests
            assert (seen.target, seen.body) == ("/v1/chat/completions?x=1", b'{"n": 2}')
            assert seen.headers["x-a"] == "1" and "accept-encoding" not in seen.headers

    asyncio.run(main())


def test_a_subclass_with_its_own_proxy_is_asked() -> None:
    class Changing(MilesRouter):
        async def _do_proxy(self, request: Any, path: str, body: Any = None, headers: Any = None) -> dict[str, Any]:
            result = await super()._do_proxy(request, path, body, headers)
            return {**result, "response_body": {"path": path, "was": json.loads(result["response_body"])}}

    async def main() -> None:
        router = Changing(Namespace())
        async with worker() as one, serving(router.app) as url, httpx.AsyncClient(base_url=url) as client:
            router.table.add(one.url)
            got = await client.post("/v1/completions", json={})
            assert got.json() == {"path": "v1/completions", "was": {"ok": True}}

    asyncio.run(main())
