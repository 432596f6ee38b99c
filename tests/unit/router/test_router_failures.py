"""Workers that misbehave: retries on another one, quarantine, the way back, weight versions."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from argparse import Namespace

import httpx
import psutil
import pytest
from null_workers import Request, Worker, Writer, answer_ok, response, worker
from router_runs import raw, routing, until

from miles.router import forward, health
from miles.router.router import MilesRouter

QUICK = {"rollout_health_check_interval": 0.05}


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HELD_PROBE_S", 0.02)


async def hang_up(request: Request, writer: Writer) -> None:
    writer.close()


def sends(data: bytes):  # type: ignore[no-untyped-def]
    """A worker that sends these bytes and hangs up."""

    async def answer(request: Request, writer: Writer) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return answer


def unused_url() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


NO_ANSWER = {
    "hangs up": sends(b""),
    "garbage": sends(b"\x00\x01\x02 this is no HTTP\r\n\r\n"),
    "cut in the status line": sends(b"HTTP/1.1 20"),
    "cut in the headers": sends(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "a status that there is not": sends(b"HTTP/1.1 999 Hm\r\ncontent-length: 0\r\n\r\n"),
    "endless headers": sends(b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"y" * 300_000),
    "two lengths": sends(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
    "another protocol": sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
}


@pytest.mark.parametrize("kind", NO_ANSWER)
def test_without_an_answer_another_worker_is_asked(kind: str) -> None:
    async def main() -> None:
        async with worker(NO_ANSWER[kind]) as bad, worker() as good, routing(bad, good) as (router, client):
            got = await client.post("/generate", content=b"payload")
            assert got.json() == {"ok": True}
            assert [r.body for r in bad.requests] == [r.body for r in good.requests] == [b"payload"]
            assert router.worker_failure_counts == {bad.url: 1, good.url: 0}
            assert router.worker_request_counts == {bad.url: 0, good.url: 0}
            assert router.forwarder.retries == 1

    asyncio.run(main())


def test_all_fail_and_each_is_named() -> None:
    async def main() -> None:
        async with worker(hang_up) as cutting, worker(NO_ANSWER["garbage"]) as garbage:
            gone = Worker(url=unused_url())
            async with routing(cutting, garbage, gone) as (router, client):
                got = await client.post("/generate", json={})
                message = got.json()["error"]["message"]
                assert got.status_code == 503
                assert f"{cutting.url} closed the connection without an answer" in message
                assert f"{garbage.url} answered what is not HTTP" in message
                assert f"{gone.url} cannot be reached" in message and "refused" in message
                assert set(router.worker_request_counts.values()) == {0}

    asyncio.run(main())


def test_a_request_that_kills_workers_does_not_kill_them_all() -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(worker(hang_up)) for _ in range(4)]
            _, client = await stack.enter_async_context(routing(*workers))
            got = await client.post("/generate", json={})
            assert got.status_code == 503 and "1 more were not asked" in got.json()["error"]["message"]
            assert [len(w.requests) for w in workers] == [1, 1, 1, 0]

    asyncio.run(main())


def test_an_answer_that_breaks_off_is_cut_and_not_repeated() -> None:
    async def main() -> None:
        half = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345")
        async with worker(half) as bad, worker() as good, routing(bad, good) as (router, client):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/generate", json={})
            assert good.requests == [] and router.worker_failure_counts[bad.url] == 1
            bad.answer = answer_ok
            assert (await client.post("/generate", json={})).status_code == 200
            assert "in the middle of an answer" in router.table.errors[bad.url]

    asyncio.run(main())


def test_error_statuses_are_answers_and_pass() -> None:
    async def busy(request: Request, writer: Writer) -> None:
        writer.write(response(b"busy", 503, "retry-after: 7\r\n"))

    async def main() -> None:
        async with worker(busy) as one, worker() as two, routing(one, two) as (router, client):
            got = await client.post("/generate", json={})
            assert (got.status_code, got.content, got.headers["retry-after"]) == (503, b"busy", "7")
            assert router.worker_failure_counts[one.url] == 0 and two.requests == []

    asyncio.run(main())


def test_a_pooled_connection_that_the_worker_closed_is_no_failure() -> None:
    """Workers close idle connections; the request goes out again on a new one, to the same worker."""

    async def main() -> None:
        async def answer(request: Request, writer: Writer) -> None:
            if len(one.requests) == 2:
                writer.close()  # as if it had closed before the request came
            else:
                writer.write(response())

        async with worker(answer) as one, routing(one) as (router, client):
            assert (await client.get("/a")).status_code == 200
            assert (await client.get("/b")).status_code == 200
            assert router.worker_failure_counts[one.url] == 0 and router.forwarder.retries == 0
            assert one.connections == 2

    asyncio.run(main())


def test_large_body_that_cannot_be_repeated_is_not_sent_to_another_worker() -> None:
    async def main() -> None:
        async with worker(hang_up) as bad, worker() as good, routing(bad, good) as (_, client):
            got = await client.post("/generate", content=b"x" * (2 * forward.REPLAY))
            assert got.status_code == 503 and bad.url in got.json()["error"]["message"]
            assert good.requests == []

    asyncio.run(main())


def test_failed_requests_quarantine_a_worker_and_waiting_ones_are_told() -> None:
    async def main() -> None:
        gone = Worker(url=unused_url())
        async with routing(gone, miles_router_health_check_failure_threshold=2) as (router, client):
            for _ in range(2):
                assert (await client.get("/x")).status_code == 503
            assert router.dead_workers == {gone.url}
            got = await client.get("/x")
            message = got.json()["error"]["message"]
            assert got.status_code == 503 and f"{gone.url} is quarantined (cannot be reached" in message
            listed = (await client.get("/workers")).json()["workers"]
            assert listed[0]["state"] == "quarantined" and not listed[0]["is_healthy"]
            assert (await client.get("/list_workers")).json() == {"urls": [gone.url]}

    asyncio.run(main())


def test_health_checks_quarantine_and_readmit() -> None:
    async def main() -> None:
        async with worker() as one, worker() as two, routing(one, two, **QUICK) as (router, client):
            one.healthy = False
            await until(lambda: router.dead_workers == {one.url}, "quarantine")
            assert router.table.errors[one.url] == "answered /health with status 503"
            for _ in range(3):
                await client.get("/x")
            assert len(one.requests) == 0 and len(two.requests) == 3
            one.healthy = True
            await until(lambda: not router.dead_workers, "readmission")
            await client.get("/x")
            assert len(one.requests) == 1 and router.worker_failure_counts[one.url] == 0

    asyncio.run(main())


def test_requests_wait_for_a_worker_that_comes_back() -> None:
    async def main() -> None:
        async with worker() as one, routing(one, **QUICK, miles_router_worker_wait=20) as (router, client):
            one.healthy = False
            await until(lambda: bool(router.dead_workers), "quarantine")
            waiting = asyncio.create_task(client.get("/x"))
            await until(lambda: router.forwarder.gate.inside == 1, "a request that waits")
            one.healthy = True
            assert (await waiting).status_code == 200

    asyncio.run(main())


def test_a_worker_that_missed_an_update_comes_back_only_with_the_current_weights() -> None:
    """Nobody has named a version: the newest of those that serve counts ("10" is newer than "9")."""

    async def main() -> None:
        async with (
            worker(version="9") as one,
            worker(version="9") as two,
            routing(one, two, **QUICK) as (router, client),
        ):
            one.healthy = False
            await until(lambda: router.dead_workers == {one.url}, "quarantine")
            two.version = "10"
            one.healthy = True
            await until(lambda: router.table.stale == {one.url}, "held as stale")
            assert router.table.errors[one.url] == "reports weight version 9, expected 10"
            assert (await client.get("/x")).status_code == 200 and not one.requests
            one.version = "10"
            await until(lambda: not router.table.held, "readmission")

    asyncio.run(main())


def test_only_workers_with_the_required_version_serve() -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            one, two, none = [await stack.enter_async_context(worker(version=v)) for v in ("1", "2", None)]
            router, client = await stack.enter_async_context(routing(one, two, none))
            answer = (await client.post("/weight_version", json={"weight_version": "2"})).json()
            assert answer["workers"] == {one.url: "stale", two.url: "serving", none.url: "stale"}
            for _ in range(3):
                assert (await client.get("/x")).status_code == 200
            assert (len(one.requests), len(two.requests), len(none.requests)) == (0, 3, 0)
            one.version = "2"
            await until(lambda: router.table.may_serve(one.url), "the first one serves again")
            got = (await client.get("/workers")).json()["workers"]
            assert [w["weight_version"] for w in got] == ["2", "2", None]

    asyncio.run(main())


def test_with_a_required_version_a_new_worker_waits_until_it_reports_it() -> None:
    async def main() -> None:
        async with worker(version="7") as one, routing() as (router, client):
            await client.post("/weight_version", json={"weight_version": "8"})
            await client.post("/add_worker", params={"url": one.url})
            got = await client.get("/x")
            assert got.status_code == 503 and "is stale" in got.json()["error"]["message"] and not one.requests
            one.version = "8"
            await until(lambda: router.table.may_serve(one.url), "it serves")

    asyncio.run(main())


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"{", b'{"weight_version": null}', b'{"weight_version": true}'])
def test_bad_weight_version_is_refused(body: bytes) -> None:
    async def main() -> None:
        async with worker() as one, routing(one) as (router, client):
            got = await client.post("/weight_version", content=body)
            assert got.status_code == 400 and "weight_version" in got.json()["error"]["message"]
            assert router.table.required_version is None

    asyncio.run(main())


def test_adding_a_held_worker_again_has_it_checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a run brings back an engine that it has started again: it need not wait for the next round."""
    monkeypatch.setattr(health, "HELD_PROBE_S", 1000.0)

    async def main() -> None:
        async with worker() as one, routing(one, rollout_health_check_interval=1000.0) as (router, client):
            router.dead_workers.add(one.url)
            router.worker_failure_counts[one.url] = 3
            await client.post("/add_worker", params={"url": one.url})
            await until(lambda: not router.dead_workers, "readmission")

    asyncio.run(main())


def test_health_of_a_subclass_that_raises_does_not_end_the_checks() -> None:
    class Odd(MilesRouter):
        async def _check_worker_health(self, url: str) -> tuple[str, bool]:
            raise KeyError(url)

    async def main() -> None:
        router = Odd(Namespace(miles_router_health_check_failure_threshold=2))
        router.table.add("http://127.0.0.1:1")
        await router.health.check(["http://127.0.0.1:1"])
        await router.health.check(["http://127.0.0.1:1", "http://127.0.0.1:2"])
        assert router.dead_workers == {"http://127.0.0.1:1"}

    asyncio.run(main())


# ---- many of them ----------------------------------------------------------------------------------------------------


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request over a connection that ends with it; `length` is what it says of its body, if not the truth."""
    head = b"POST %b HTTP/1.1\r\nhost: r\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    return head % (path.encode(), len(body) if length is None else length) + body


def bad_request(n: int) -> tuple[bytes, bool]:
    """What the n-th client sends, and whether it waits for the answer."""
    body = b"x" * (n % 7 * 1000)
    return [
        (post("/generate", body), True),
        (post("/generate", body), False),
        (post("/generate", body, 10_000), False),  # hangs up in the middle of its body
        (post("/generate?a=b%00", b"\xff" * 300_000), True),  # larger than allowed
        (post("/add_worker", b'{"url": ["\xc3\x28"]}'), True),
        (post("/remove_worker?url=nowhere", b"["), True),
        (post("/weight_version", b'{"weight_version": null}'), True),
        (b"\x00\xff no HTTP\r\n\r\n", True),
    ][n % 8]


def test_nothing_is_left_of_ten_thousand_bad_requests(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in flight, no task, no connection but pooled ones, no memory; and the router serves."""
    caplog.set_level(logging.CRITICAL)  # records are kept
    silent = [answer for kind, answer in NO_ANSWER.items() if kind != "endless headers"]  # slow to make
    kinds = [*silent, sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345"), answer_ok]
    count = 0

    async def answer(request: Request, writer: Writer) -> None:
        nonlocal count
        count += 1
        if not writer.is_closing():
            await kinds[count % len(kinds)](request, writer)

    async def send(url: str, n: int) -> None:
        data, waits = bad_request(n)
        with contextlib.suppress(ConnectionError):
            if waits:
                await raw(url, data)
            else:
                _, writer = await asyncio.open_connection(httpx.URL(url).host, httpx.URL(url).port)
                writer.write(data)
                writer.close()

    async def main() -> None:
        settings = {"miles_router_health_check_failure_threshold": 10**9, "miles_router_max_body_bytes": 200_000}
        async with worker(answer) as a, worker(answer) as b, routing(a, b, **settings) as (router, client):

            async def send_all(requests: int) -> tuple[int, int]:
                for begin in range(0, requests, 40):
                    await asyncio.gather(*(send(str(client.base_url), n) for n in range(begin, begin + 40)))
                    a.requests.clear()
                    b.requests.clear()
                await until(lambda: not router.forwarder._flights, "nothing in flight")
                assert router.worker_request_counts == {a.url: 0, b.url: 0} and router.forwarder.gate.inside == 0
                idle = sum(len(u._idle) for u in router.forwarder._upstreams.values())
                assert idle <= 100
                # Tasks of connections that are still open: the workers' ends of the idle ones.
                await until(lambda: len(asyncio.all_tasks()) <= before + 2 * idle + 2, "no tasks are left")
                gc.collect()
                return len(gc.get_objects()), psutil.Process().memory_info().rss

            before = len(asyncio.all_tasks())
            objects, memory = await send_all(2_000)
            more_objects, more_memory = await send_all(8_000)
            assert more_objects - objects < 2_000 and more_memory - memory < 20 << 20
            router.forwarder.close()
            kinds[:] = [answer_ok]
            assert (await client.post("/generate", content=b"payload")).json() == {"ok": True}

    asyncio.run(asyncio.wait_for(main(), 300))
