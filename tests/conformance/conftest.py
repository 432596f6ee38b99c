"""The engines of the conformance tests: the embedded one always, real SGLang where MILES_CONFORMANCE_SGLANG names it.

`make conformance` sets it (run.py): JSON, the folder with the models and the URL of the server of each.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conformance_models import write_all

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.server import create_app, serve_in_loop

SGLANG = json.loads(os.environ.get("MILES_CONFORMANCE_SGLANG", "null"))
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Server:
    """One engine under test. `kind` is embedded or sglang; `folders` are models of its shape, it serves the first."""

    kind: str
    url: str
    folders: tuple[Path, Path]

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, trust_env=False)

    def ask(self, path: str, body: Any) -> Any:
        """The decoded answer of a request that succeeds."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.content else None

    def generate(self, **body: Any) -> Any:
        return self.ask("/generate", body)

    def in_background(self, **body: Any) -> Future[Any]:
        """A request whose answer is read later."""
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(self.generate(**body))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return done

    @property
    def version(self) -> str:
        return str(self.get("/get_model_info").json()["weight_version"])


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if SGLANG is not None:
        return Path(SGLANG["models"])
    return write_all(tmp_path_factory.mktemp("models"))


@contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """The engine in this process, behind a real port."""
    engine = EmbeddedEngine.from_folder(folder, max_running_requests=32, seed=3)
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), []
    over = asyncio.Event()

    async def serve() -> None:
        async with serve_in_loop(create_app(engine), "127.0.0.1", 0) as own:
            url.append(own)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE_S)
    yield url[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(PATIENCE_S)
    loop.close()
    engine.close()


def _server(kind: str, model: str, models: Path) -> Iterator[Server]:
    folders = models / f"{model}0", models / f"{model}1"
    if kind == "sglang":
        yield Server(kind, SGLANG[model], folders)
        return
    with embedded(folders[0]) as url:
        yield Server(kind, url, folders)


KINDS = ["embedded", *(["sglang"] if SGLANG is not None else [])]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, models: Path) -> Iterator[Server]:
    """An engine with the dense model."""
    yield from _server(request.param, "dense", models)


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, models: Path) -> Iterator[Server]:
    """An engine with the model that has experts."""
    yield from _server(request.param, "moe", models)


@pytest.fixture
def restored(server: Server) -> Iterator[Server]:
    """An engine whose weights a test may change: it gets its own back, under the version `default`."""
    yield server
    body = {"model_path": str(server.folders[0]), "weight_version": "default"}
    server.ask("/update_weights_from_disk", body)
