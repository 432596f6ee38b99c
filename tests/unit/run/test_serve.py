"""The address of a run: open from the start, served from the first client on, gone with the run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from miles.engine.calls import post
from miles.engine.embedded.engine import EmbeddedEngine
from miles.errors import FlagError
from miles.rollout.loop_thread import run
from miles.run.serve import on_loopback

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "examples" / "quickstart" / "base"
GREEDY = {"text": "859+467=?", "sampling_params": {"temperature": 0, "max_new_tokens": 40}}


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine.from_folder(BASE)
    yield engine
    engine.close()


def ask(url: str, body: object = None) -> object:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_first_clients_all_get_an_answer(engine: EmbeddedEngine) -> None:
    """They arrive together, and wait while the web framework is imported."""
    with on_loopback(engine, None) as (host, port):
        url = f"http://{host}:{port}"
        with ThreadPoolExecutor(12) as pool:
            answers = [*pool.map(lambda _: ask(f"{url}/generate", GREEDY), range(12))]
        assert ask(f"{url}/list_workers") == {"urls": [url]}
    texts = {answer["text"] for answer in answers}  # type: ignore[index]
    assert len(texts) == 1 and texts.pop().startswith("<think>")


def test_nothing_heavy_is_imported_before_the_first_client() -> None:
    """In a fresh interpreter; `post` of this process reaches the engine without the server."""
    code = f"""
import sys, urllib.request
from miles.engine.calls import post
from miles.engine.embedded.engine import EmbeddedEngine
from miles.rollout.loop_thread import run
from miles.run.serve import on_loopback
engine = EmbeddedEngine.from_folder({str(BASE)!r})
with on_loopback(engine, None) as (host, port):
    url = f"http://{{host}}:{{port}}"
    assert run(post(f"{{url}}/generate", {GREEDY!r}))["text"].startswith("<think>")
    print("fastapi" in sys.modules, "uvicorn" in sys.modules)
    urllib.request.urlopen(f"{{url}}/health", timeout=60).read()
    print("fastapi" in sys.modules, "uvicorn" in sys.modules)
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True", "True"]


def test_the_port_of_the_flag_is_served_and_freed(engine: EmbeddedEngine) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):  # the second time shows that the first left it free
        with on_loopback(engine, port) as (host, got):
            assert (host, got) == ("127.0.0.1", port)
            assert ask(f"http://127.0.0.1:{port}/get_model_info")["model_path"] == str(BASE)  # type: ignore[index]
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(f"http://127.0.0.1:{port}/health")


def test_a_run_that_nobody_asks_leaves_its_port_free(engine: EmbeddedEngine) -> None:
    with on_loopback(engine, None) as (_, port):
        pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_busy_port_is_named(engine: EmbeddedEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(
            FlagError, match=rf"--sglang-router-port: expected a port that is free on 127\.0\.0\.1 .*got {port}"
        ) as caught, on_loopback(engine, port):
            pass
    assert "Choose another port" in str(caught.value)


def test_only_this_machine_is_served(engine: EmbeddedEngine) -> None:
    with on_loopback(engine, None) as (_, port):
        listening = {
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
        }
    assert listening == {f"0100007F:{port:04X}"}


def test_an_engine_that_is_closed_answers_nobody(engine: EmbeddedEngine) -> None:
    """Clients that are still waiting at the end of a run get an error, and do not wait for ever."""
    own = EmbeddedEngine.from_folder(BASE)
    errors: list[BaseException] = []

    def wait_long(url: str) -> None:
        endless = {"text": "1", "sampling_params": {"max_new_tokens": 100_000, "ignore_eos": True}}
        try:
            ask(url, endless)
        except Exception as error:
            errors.append(error)

    with on_loopback(own, None) as (host, port):
        url = f"http://{host}:{port}/generate"
        own.pause("in_place")
        client = threading.Thread(target=wait_long, args=(url,), daemon=True)
        client.start()
        ask(f"http://{host}:{port}/list_workers")
        own.close()
    client.join(20)
    assert not client.is_alive() and len(errors) == 1
    assert run(post_is_gone(url))


async def post_is_gone(url: str) -> bool:
    """The short-cut of this process ends with the run, too."""
    try:
        await post(url, GREEDY, max_retries=1)
    except Exception:
        return True
    return False
