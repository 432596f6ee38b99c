"""The middlewares of examples/router_middleware, each in a router that serves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from null_workers import Request, Writer, response, worker
from router_runs import routing

from examples.router_middleware import cache, limit
from miles.hooks import load_function

FOLDER = Path(__file__).resolve().parents[2] / "examples/router_middleware"


def paths(*names: str) -> dict[str, Any]:
    return {"miles_router_middleware_paths": [f"{FOLDER}/{name}" for name in names]}


def generated(version: str = "1", reason: str = "stop") -> bytes:
    return json.dumps(
        {"text": "4", "meta_info": {"weight_version": version, "finish_reason": {"type": reason}}}
    ).encode()


DECIDED = {"text": "2+2=", "sampling_params": {"temperature": 0}}


def test_decided_answers_come_from_memory() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        writer.write(response(generated()))

    async def main() -> None:
        async with worker(answer) as one, routing(one, **paths("cache.py:ResponseCache")) as (_, client):
            first = await client.post("/generate", json=DECIDED)
            again = await client.post("/generate", json=DECIDED)
            assert first.content == again.content == generated() and len(one.requests) == 1
            assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
            sampled = {"text": "2+2=", "sampling_params": {"temperature": 1}}
            for _ in range(2):
                await client.post("/generate", json=sampled)
            assert len(one.requests) == 3

    asyncio.run(main())


def test_new_weights_and_aborted_answers_are_asked_for() -> None:
    async def answer(request: Request, writer: Writer) -> None:
        writer.write(response(generated(one.version or "", "abort" if len(one.requests) == 1 else "stop")))

    async def main() -> None:
        nonlocal one
        async with worker(answer, version="1") as one, routing(one, **paths("cache.py:ResponseCache")) as (_, client):
            for expected in (1, 2, 2):
                await client.post("/generate", json=DECIDED)
                assert len(one.requests) == expected
            one.version = "2"
            await client.post("/weight_version", json={"weight_version": "2"})
            assert (await client.post("/generate", json=DECIDED)).content == generated("2")

    one: Any = None
    asyncio.run(main())


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * len(generated()))

    class Nothing:
        weight_version = None

    ours = cache.ResponseCache(None, router=Nothing())  # type: ignore[arg-type]
    for n in range(10):
        ours.keep(b"%d" % n, generated())
    assert list(ours.answers) == [b"7", b"8", b"9"] and ours.size == 3 * len(generated())


@pytest.mark.parametrize(
    ("body", "decided"),
    [(b'{"sampling_params": {"temperature": 0}}', True), (b'{"sampling_params": {"sampling_seed": 3}}', True),
     (b'{"sampling_params": {"temperature": 0}, "stream": true}', False), (b"{}", False), (b"[]", False)],
)  # fmt: skip
def test_what_is_decided(body: bytes, decided: bool) -> None:
    assert cache.is_decided(body) is decided


def test_more_than_the_bucket_holds_is_refused() -> None:
    async def main() -> None:
        settings = {**paths("limit.py:TokenBucket"), "requests_per_s": 0.01, "burst": 3}
        async with worker() as one, routing(one, **settings) as (_, client):
            got = [await client.get("/x") for _ in range(4)]
            assert [r.status_code for r in got] == [200, 200, 200, 429]
            assert 1 <= int(got[3].headers["retry-after"]) <= 100
            assert got[3].json()["error"]["message"].startswith("more than 0.01 requests per second from 127.0.0.1")
            assert len(one.requests) == 3

    asyncio.run(main())


def test_the_bucket_fills_with_time_and_forgets_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Router:
        args = type("Args", (), {"requests_per_s": 2.0, "burst": 1.0})()

    monkeypatch.setattr(limit, "MAX_CLIENTS", 2)
    bucket, now = limit.TokenBucket(None, router=Router()), 0.0  # type: ignore[arg-type]
    bucket.now = lambda: now
    assert (bucket.take("a"), bucket.take("a"), bucket.take("b")) == (0.0, 0.5, 0.0)
    now = 0.5
    assert (bucket.take("a"), bucket.take("a")) == (0.0, 0.5)
    bucket.take("c")
    assert list(bucket.buckets) == ["a", "c"]


def test_each_request_is_a_line(tmp_path: Path) -> None:
    async def main() -> None:
        settings = {**paths("trace.py:Trace"), "trace_file": str(tmp_path / "new" / "trace.jsonl")}
        async with worker() as one, routing(one, **settings) as (_, client):
            await client.post("/generate", content=b"12345")
            await client.get("/list_workers")

    asyncio.run(main())
    lines = [json.loads(line) for line in (tmp_path / "new" / "trace.jsonl").read_text().splitlines()]
    assert [(x["method"], x["path"], x["status"], x["in"]) for x in lines] == [
        ("POST", "/generate", 200, 5), ("GET", "/list_workers", 200, 0),
    ]  # fmt: skip
    assert lines[0]["out"] == len(b'{"ok": true}') and 0 <= lines[0]["first_byte_s"] <= lines[0]["seconds"]


def test_all_three_together(tmp_path: Path) -> None:
    names = ("cache.py:ResponseCache", "limit.py:TokenBucket", "trace.py:Trace")

    async def main() -> None:
        async with worker() as one, routing(one, trace_file=tmp_path / "t", **paths(*names)) as (_, client):
            assert (await client.post("/generate", json=DECIDED)).status_code == 200
            assert (await client.post("/generate", json=DECIDED)).headers["x-cache"] == "hit"

    asyncio.run(main())
    assert len((tmp_path / "t").read_text().splitlines()) == 2
    assert load_function(f"{FOLDER}/limit.py:TokenBucket").add_arguments
