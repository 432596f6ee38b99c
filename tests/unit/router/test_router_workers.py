"""The table of workers: who is next, affinity, adding and removing, the router's own endpoints, published names."""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from null_workers import Request, Worker, Writer, response, worker
from router_runs import routing

from miles.router import balance
from miles.router.balance import WorkerTable, WorkerUrlError, worker_url
from miles.router.router import MilesRouter
from miles.router.settings import RouterSettings

A, B, C = (f"http://w{n}:8000" for n in "abc")


def router(**args: Any) -> MilesRouter:
    """Made as published plug-ins' tests make it: from a Namespace with a few attributes."""
    given = {
        "miles_router_max_connections": 10,
        "miles_router_timeout": None,
        "miles_router_middleware_paths": [],
        "rollout_health_check_interval": 60,
        "miles_router_health_check_failure_threshold": 3,
    }
    return MilesRouter(Namespace(**{**given, **args}), verbose=False)


def test_the_least_loaded_worker_is_next_and_ties_go_to_the_first() -> None:
    ours = router()
    ours.worker_request_counts = {A: 5, B: 2, C: 2}
    assert [ours._use_url() for _ in range(3)] == [B, C, B]
    assert ours.worker_request_counts == {A: 5, B: 4, C: 3}
    ours._finish_url(B)
    assert ours.worker_request_counts[B] == 3


def test_held_workers_are_left_out() -> None:
    ours = router()
    ours.worker_request_counts = {A: 5, B: 0, C: 9}
    ours.dead_workers = {B}
    assert ours._use_url() == A
    ours.dead_workers = {A, B, C}
    with pytest.raises(RuntimeError, match="No healthy workers available in the pool"):
        ours._use_url()
    ours.worker_request_counts = {}
    with pytest.raises(ValueError, match="No worker is registered"):
        ours._use_url()


def test_published_attributes() -> None:
    ours = router()
    assert (ours.worker_request_counts, ours.worker_failure_counts, ours.dead_workers) == ({}, {}, set())
    assert ours.max_weight_version is None and ours.verbose is False and ours.args.miles_router_timeout is None
    assert ours.client is ours.client

    async def close() -> None:
        client = ours.client
        await ours.stop()
        assert client.is_closed

    asyncio.run(close())


def test_published_health_check() -> None:
    async def main() -> None:
        ours = router()
        async with worker() as one:
            assert await ours._check_worker_health(one.url) == (one.url, True)
            one.healthy = False
            assert await ours._check_worker_health(one.url) == (one.url, False)
        assert await ours._check_worker_health(one.url) == (one.url, False)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("args", "connections"),
    [
        ({"miles_router_max_connections": 7}, 7),
        ({"sglang_server_concurrency": 512, "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 2}, 2048),
        ({"miles_router_max_connections": None, "sglang_server_concurrency": 4, "rollout_num_gpus": 0}, 4),
    ],
)
def test_connections(args: dict[str, Any], connections: int) -> None:
    assert RouterSettings.of(Namespace(**args)).max_connections == connections
    assert RouterSettings.of(Namespace()).max_connections >= 64


# ---- affinity ----------------------------------------------------------------------------------------------------


def test_the_same_key_goes_to_the_same_worker_unless_it_has_much_more_to_do() -> None:
    table = WorkerTable()
    for url in (A, B):
        table.add(url)
    table.counts[A] = 3
    assert [table.pick(b"k") for _ in range(5)] == [B] * 5
    table.counts = {A: 0, B: 2 * balance.MUCH_MORE}
    assert table.pick(b"k") == A
    table.counts = {A: 1, B: 0}
    assert table.pick(b"k") == A  # from now on the other one


def test_a_key_moves_on_from_a_worker_that_is_held_or_was_tried() -> None:
    table = WorkerTable()
    for url in (A, B):
        table.add(url)
    assert table.pick(b"k") == A
    assert table.pick(b"k", tried={A}) == B
    assert table.pick(b"k") == B
    table.dead.add(B)
    assert table.pick(b"k") == A


def test_keys_are_forgotten_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "AFFINITY_KEYS", 10)
    table = WorkerTable()
    table.add(A)
    for n in range(100):
        table.pick(b"%d" % n)
    assert len(table._affinity) == 10


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/sessions/s1/v1/models", {}),
        ("/generate", {"x-miles-session": "s1"}),
        ("/generate", {"x-session-id": "s1"}),
        ("/generate", {"x-miles-routing-key": "s1"}),
    ],
)
def test_what_makes_a_key(path: str, headers: dict[str, str]) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def answer(request: Request, writer: Writer) -> None:
            await gate.wait()
            writer.write(response())

        async with worker(answer) as one, worker(answer) as two, routing(one, two) as (_, client):
            tasks = [asyncio.create_task(client.post(path, headers=headers, json={})) for _ in range(4)]
            while len(one.requests) + len(two.requests) < 4:
                await asyncio.sleep(0.01)
            gate.set()
            await asyncio.gather(*tasks)
            assert (len(one.requests), len(two.requests)) == (4, 0)
            assert all(one.requests[0].headers[name] == value for name, value in headers.items())

    asyncio.run(main())


# ---- adding and removing -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "pick", "finish", "fail"]), st.sampled_from([A, B, C]))))
def test_counts_never_go_wrong(steps: list[tuple[str, str]]) -> None:
    table = WorkerTable()
    flying: list[str] = []
    for what, url in steps:
        if what == "add":
            table.add(url)
        elif what == "remove":
            table.remove(url)
        elif what == "pick" and (picked := table.pick()) is not None:
            assert table.may_serve(picked)
            flying.append(picked)
        elif what == "finish" and flying:
            table.finish(flying.pop())
        elif what == "fail":
            table.failed(url, "gone", 2)
        assert all(count >= 0 for count in table.counts.values())
        assert table.dead <= set(table.counts) and set(table.failures) == set(table.counts)


@pytest.mark.parametrize("how", ["query url", "query worker_url", "json url", "json worker_url"])
def test_add_and_remove_in_every_published_form(how: str) -> None:
    where, name = how.split()
    form = {"params" if where == "query" else "json": {name: f"{A}/"}}

    async def main() -> None:
        async with routing() as (ours, client):
            for _ in range(2):  # idempotent
                got = await client.post("/add_worker", **form)
                assert got.json() == {"status": "success", "worker_urls": {A: 0}}
            assert (await client.get("/list_workers")).json() == {"urls": [A]}
            for _ in range(2):
                assert (await client.post("/remove_worker", **form)).json()["worker_urls"] == {}
            assert ours.worker_request_counts == {}

    asyncio.run(main())


BAD_URLS = [
    "w:8000", "ftp://w:1", "https://w:1", "http://", "http://:80", "http://w:0", "http://w:99999", "http://w:x",
    "http://[::1", "http://w:1?a=b", "http://w:1#f", "http://u:p@w:1", "http://w w:1", "http://w\n:1", "/x",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_an_address_that_cannot_be_is_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(WorkerUrlError, match="expected http://HOST:PORT, got"):
        worker_url(url)

    async def main() -> None:
        async with routing() as (ours, client):
            for path in ("/add_worker", "/remove_worker"):
                got = await client.post(path, json={"url": url})
                assert got.status_code == 400 and "http://HOST:PORT" in got.json()["error"]["message"]
            assert ours.worker_request_counts == {}

    asyncio.run(main())


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"url": ""}', b'{"url": 7}', b'{"url": ["a"]}', b"\xff", b"[" * 99_999]
)
def test_no_address_at_all(body: bytes) -> None:
    async def main() -> None:
        async with routing() as (_, client):
            got = await client.post("/add_worker", content=body)
            assert got.status_code == 400 and "error" in got.json()

    asyncio.run(main())


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(WorkerUrlError):
        assert worker_url(text).startswith("http://")


def test_removing_lets_requests_end() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def answer(request: Request, writer: Writer) -> None:
            await gate.wait()
            writer.write(response())

        async with worker(answer) as one, routing(one) as (ours, client):
            going = asyncio.create_task(client.post("/generate", json={}))
            while not one.requests:
                await asyncio.sleep(0.01)
            await client.post("/remove_worker", params={"url": one.url})
            assert (await client.post("/generate", json={})).status_code == 503
            await client.post("/add_worker", params={"url": one.url})
            gate.set()
            assert (await going).status_code == 200
            assert ours.worker_request_counts == {one.url: 0}

    asyncio.run(main())


def test_own_endpoints() -> None:
    async def main() -> None:
        async with worker() as one, routing(one, Worker(url=A)) as (ours, client):
            ours.dead_workers.add(A)
            await client.post("/generate", json={})
            assert (await client.get("/health")).json() == {"status": "ok", "workers": 2, "serving": 1}
            listed = (await client.get("/workers")).json()["workers"]
            assert [(w["url"], w["state"], w["requests"]) for w in listed] == [
                (one.url, "serving", 1),
                (A, "quarantined", 0),
            ]
            text = (await client.get("/metrics")).text
            assert 'miles_router_requests_total{status="200"} 1\n' in text
            assert f'miles_router_worker_serving{{worker="{A}"}} 0\n' in text
            assert (await client.get("/add_worker")).status_code == 405
            assert [r.target for r in one.requests] == ["/generate"]  # none of these reached a worker

    asyncio.run(main())
