"""An engine under test and how the conformance tests ask it; the embedded one is started here."""

from __future__ import annotations

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

from miles.engine.process import ServerProcess, child_environment, free_port, wait_until_it_answers

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
