"""Clients: the short-cut to an engine of this process, retries that end, and the published helpers."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from argparse import Namespace

import pytest

from miles.engine import calls
from miles.engine.calls import local_engine_at, post, register_local_engine, unregister_local_engine
from miles.engine.client import HttpEngineClient, LocalEngineClient
from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.server import create_app, serve_in_loop
from miles.engine.protocol import BadRequestError
from miles.errors import EngineError
from miles.utils import http_utils

BODY = {"input_ids": [5, 6], "sampling_params": {"temperature": 0, "max_new_tokens": 4}, "return_logprob": True}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "RETRY_PAUSE_S", 0.01)


def without_times(answer: dict) -> dict:
    meta = {name: value for name, value in answer["meta_info"].items() if name not in ("id", "e2e_latency")}
    return answer | {"meta_info": meta}


def test_local_and_http_clients_give_the_same_answers(engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        local = LocalEngineClient(engine)
        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as url:
            over_http = HttpEngineClient(url)
            for body in (BODY, BODY | {"input_ids": [[5, 6], [7]]}, BODY | {"logprob_start_len": 0}):
                answers = [await c.generate(body) for c in (local, over_http)]
                for a, b in zip(*(x if isinstance(x, list) else [x] for x in answers)):
                    assert without_times(a) == without_times(b)
            for c in (local, over_http):
                await c.pause("retract")
                await c.resume()
                await c.abort("nobody")
                await c.flush_cache()
                assert await c.healthy() and await c.weight_version() == "default"
                await c.update_weights_from_disk(engine.model_path)
                with pytest.raises(EngineError, match="unknown field 'inputs'") as caught:
                    await c.generate({"inputs": 1})
                assert caught.value.status == 400

    asyncio.run(scenario())


def test_post_to_a_registered_address_skips_the_socket(engine: EmbeddedEngine) -> None:
    url = "http://127.0.0.1:9"  # nothing listens there
    register_local_engine(url, engine)
    try:
        assert local_engine_at("http://localhost:9/generate") is engine
        assert local_engine_at("http://127.0.0.1:10/generate") is None
        answer = asyncio.run(post(f"{url}/generate", BODY))
        assert len(answer["output_ids"]) >= 1
        asyncio.run(post(f"{url}/abort_request", {"abort_all": True}))
        with pytest.raises(BadRequestError, match="unknown field"):
            asyncio.run(post(f"{url}/generate", {"inputs": 1}))
    finally:
        unregister_local_engine(url)
    assert local_engine_at(url) is None


def test_a_dead_server_is_an_error_that_names_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = HttpEngineClient(url)
    with pytest.raises(EngineError, match=rf"{url}/generate: no answer after 4 attempts") as caught:
        asyncio.run(client.generate(BODY))
    assert caught.value.__cause__ is not None and caught.value.status is None
    with pytest.raises(EngineError, match="no answer after one attempt"):
        asyncio.run(post(f"{url}/generate", BODY, max_retries=3))
    assert not asyncio.run(client.healthy())


async def scripted_server(answers: list[tuple[int, bytes]]):
    """A server that gives these answers in turn and counts its requests."""
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(li.split(b":")[1]) for li in head.lower().split(b"\r\n") if b"content-length" in li), 0)
        seen.append(head.split(b"\r\n")[0] + b" " + await reader.readexactly(length))
        status, body = answers[min(len(seen), len(answers)) - 1]
        writer.write(b"HTTP/1.1 %d x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


@pytest.mark.parametrize(
    ("answers", "max_retries", "expected", "requests"),
    [
        ([(500, b"no"), (502, b"no"), (200, b'{"a": 1}')], 5, {"a": 1}, 3),
        ([(200, b"plain text")], 5, "plain text", 1),
        ([(503, b"busy")], 3, "HTTP 503: busy", 3),
        ([(400, b'{"error": {"message": "wrong"}}')], 5, "HTTP 400: wrong", 1),
    ],
)
def test_post_tries_again_as_published(answers, max_retries: int, expected: object, requests: int) -> None:
    async def scenario() -> None:
        server, url, seen = await scripted_server(answers)
        async with server:
            if isinstance(expected, str) and expected.startswith("HTTP"):
                with pytest.raises(EngineError, match=expected):
                    await post(f"{url}/x", {"b": 2}, max_retries=max_retries)
            else:
                assert await post(f"{url}/x", {"b": 2}, max_retries=max_retries) == expected
        assert len(seen) == requests
        assert seen[0].replace(b" ", b"").endswith(b'{"b":2}')

    asyncio.run(scenario())


def test_post_knows_other_methods() -> None:
    async def scenario() -> None:
        server, url, seen = await scripted_server([(200, b"{}")])
        async with server:
            await post(f"{url}/x", None, action="get")
            await post(f"{url}/x", None, action="put")
            with pytest.raises(ValueError, match="carries no payload"):
                await post(f"{url}/x", {"a": 1}, action="get")
        assert [line.split()[0] for line in seen] == [b"GET", b"PUT"]

    asyncio.run(scenario())


def test_each_event_loop_has_its_own_connections() -> None:
    """Two loops in a row: the second must not reuse sockets of the first, which is closed."""

    async def scenario() -> object:
        server, url, _ = await scripted_server([(200, b"1")])
        async with server:
            return await post(f"{url}/x", {})

    assert [asyncio.run(scenario()) for _ in range(2)] == [1, 1]


# ---- miles.utils.http_utils ------------------------------------------------------------------------------------------


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        assert not http_utils.is_port_available(taken.getsockname()[1])
    found = http_utils.find_available_port(20000)
    assert 20100 <= found < 65536 and http_utils.is_port_available(found)
    with pytest.raises(OSError, match="no free port"):
        http_utils.find_available_port(65500)


def test_host_info(monkeypatch: pytest.MonkeyPatch) -> None:
    name, address = http_utils.get_host_info()
    assert name == socket.gethostname() and socket.getaddrinfo(address, 0)
    monkeypatch.setenv(http_utils.MILES_HOST_IP_ENV, "10.1.2.3")
    assert http_utils.get_host_info() == (name, "10.1.2.3")


def test_init_http_client_bounds_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_max_connections", 5)
    http_utils.init_http_client(Namespace(rollout_num_gpus=None))
    assert calls._max_connections == 5
    args = Namespace(rollout_num_gpus=4, rollout_num_gpus_per_engine=2, sglang_server_concurrency=512)
    http_utils.init_http_client(args)
    assert calls._max_connections == 1024


def ignore_sigterm() -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_terminate_process_ends_even_a_stubborn_one() -> None:
    process = multiprocessing.get_context("fork").Process(target=ignore_sigterm, daemon=True)
    process.start()
    time.sleep(0.2)
    http_utils.terminate_process(process, timeout=0.2)
    assert not process.is_alive()
    http_utils.terminate_process(process)
