"""The engines of the conformance tests: the embedded one always, real SGLang where MILES_CONFORMANCE_SGLANG names it.

`make conformance` sets it (run.py): JSON, the folder with the models and the URL of the server of each.
"""

from __future__ import annotations

import json
import os
import sys
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

from miles.engine.process import ServerProcess, child_environment, free_port, wait_until_it_answers

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


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@contextmanager
def embedded(folder: Path, logs: Path) -> Iterator[str]:
    """The engine as the fleet starts it: a process of its own."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    argv = [sys.executable, "-P", "-m", "miles", "serve", "--model", str(folder), "--port", str(port)]
    server = ServerProcess("the engine", argv, url, logs / "embedded.log", child_environment(1))
    try:
        wait_until_it_answers(server, PATIENCE_S)
        yield url
    finally:
        server.stop()


def _server(kind: str, model: str, models: Path, logs: Path) -> Iterator[Server]:
    folders = models / f"{model}0", models / f"{model}1"
    if kind == "sglang":
        yield Server(kind, SGLANG[model], folders)
        return
    with embedded(folders[0], logs) as url:
        yield Server(kind, url, folders)


KINDS = ["embedded", *(["sglang"] if SGLANG is not None else [])]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, models: Path, logs: Path) -> Iterator[Server]:
    """An engine with the dense model."""
    yield from _server(request.param, "dense", models, logs)


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, models: Path, logs: Path) -> Iterator[Server]:
    """An engine with the model that has experts."""
    yield from _server(request.param, "moe", models, logs)


@pytest.fixture
def restored(server: Server) -> Iterator[Server]:
    """An engine whose weights a test may change: it gets its own back, under the version `default`."""
    yield server
    server.ask("/continue_generation", {})
    body = {"model_path": str(server.folders[0]), "weight_version": "default"}
    server.ask("/update_weights_from_disk", body)
