"""A fleet over small fake servers: who serves, who is left out, who comes back, and what is said about it."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.engine.fleet import MAX_FAILED_STARTS, Fleet, Watching
from miles.engine.fleet_client import FleetClient
from miles.engine.member import Member, State
from miles.engine.process import ServerProcess, child_environment, free_port
from miles.errors import EngineError
from miles.weights.delivery import Delivery, SharedMemoryDelivery

WEIGHTS = {"w": torch.ones(2)}


class Fake:
    """A server that answers from a table; a value that is an int is an error status. `asked` is what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.version, self.answers = "default", answers
        self.asked: list[tuple[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.keys: list[str | None] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(json.loads(raw) if raw else None)

            def _answer(self, body: Any) -> None:
                path = self.path.partition("?")[0].strip("/")
                fake.asked.append((path, body))
                fake.tokens.add(self.headers.get("Authorization"))
                if path == "generate":
                    fake.keys.append(self.headers.get("x-miles-routing-key"))
                answer = fake.answers.get(path, {})
                status = answer if isinstance(answer, int) else 200
                if status == 200 and path == "update_weights_from_shared_memory":
                    fake.version = body["weight_version"]
                content = {"weight_version": fake.version} if path == "get_model_info" else {"said": "so"}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked if not path.startswith("health")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fleet_of(*engines: Fake, tolerant: bool = False, **options: Any) -> Iterator[tuple[Fleet, Fake]]:
    """A fleet of servers that someone else started, behind a router that someone else started."""
    router = Fake()
    given: dict[str, Any] = {"delivery": SharedMemoryDelivery(), **options}
    fleet = Fleet([Member(i, e.url) for i, e in enumerate(engines)], watching(tolerant), router_url=router.url, **given)
    try:
        yield fleet, router
    finally:
        fleet.close()
        for fake in (*engines, router):
            fake.close()


def watching(tolerant: bool, start_timeout_s: float = 20.0) -> Watching:
    return Watching(tolerant, interval_s=0.05, timeout_s=5.0, first_wait_s=0.0, start_timeout_s=start_timeout_s)


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_and_lose(fleet: Fleet, late: Fake) -> None:
    """Of two engines that serve, `late` is unwell until its `answers` are others."""
    fleet.start()
    late.answers = {"health": 503, "health_generate": 503}
    eventually(lambda: len(fleet.serving) == 1)


def test_an_update_pauses_delivers_confirms_and_continues() -> None:
    engine = Fake()
    with fleet_of(engine) as (fleet, router):
        fleet.start()
        assert router.paths() == ["workers"] and fleet.is_ready
        fleet.suspend()
        fleet.update_weights(WEIGHTS, "1")
        assert engine.paths() == [
            "pause_generation", "update_weights_from_shared_memory", "continue_generation", "get_model_info"
        ]  # fmt: skip
        assert fleet.members[0].version == fleet.version == "1"


def test_servers_of_others_get_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_API_TOKEN", "of the cluster")
    engine = Fake()
    with fleet_of(engine, tolerant=True) as (fleet, router):
        fleet.start()
        fleet.suspend()
        fleet.update_weights(WEIGHTS, "1")
        client = FleetClient(fleet, timeout_s=20)
        asyncio.run(client.generate({"text": "?"}))
        asyncio.run(client.abort_all())
        eventually(lambda: "health_generate" in [path for path, _ in engine.asked])
    assert engine.tokens == router.tokens == {"Bearer of the cluster"}
    assert "generate" in router.paths() and "abort_request" in engine.paths()


def test_answers_to_one_prompt_share_a_routing_key() -> None:
    prompts: list[dict[str, Any]] = [{"input_ids": [5, 6]}, {"input_ids": [5, 6]}, {"input_ids": [5, 7]}]
    prompts += [{"text": "a"}, {"text": "a"}, {"input_ids": [[5], [6]]}]
    with fleet_of(Fake()) as (fleet, router):
        fleet.start()
        client = FleetClient(fleet, timeout_s=20)
        for prompt in prompts:
            asyncio.run(client.generate(prompt))
        a, b, c, d, e, batch = router.keys
    assert a == b and d == e and len({a, c, d}) == 3 and None not in (a, c, d) and batch is None


def test_memory_is_away_until_the_next_update() -> None:
    """The published order: weights back, update, the rest back."""
    engine = Fake()
    with fleet_of(engine) as (fleet, _):
        fleet.start()
        fleet.release_memory()
        assert engine.paths() == ["pause_generation", "flush_cache", "release_memory_occupation"]
        engine.asked.clear()
        fleet.suspend()
        fleet.update_weights(WEIGHTS, "1")
        fleet.update_weights(WEIGHTS, "2")
        resumed = [(path, body) for path, body in engine.asked if path == "resume_memory_occupation"]
        assert [body["tags"] for _, body in resumed] == [["weights"], ["kv_cache", "cuda_graph"]]
        assert engine.paths() == [
            "pause_generation", "resume_memory_occupation", "update_weights_from_shared_memory", "continue_generation",
            "get_model_info", "resume_memory_occupation", "update_weights_from_shared_memory", "continue_generation",
            "get_model_info",
        ]  # fmt: skip


def test_who_starts_while_memory_is_away_gives_its_own_back_too() -> None:
    good, late = Fake(), Fake()
    with fleet_of(good, late, tolerant=True) as (fleet, _):
        start_and_lose(fleet, late)
        fleet.release_memory()
        late.answers = {}
        eventually(lambda: "release_memory_occupation" in late.paths())
        time.sleep(0.3)  # several looks of the supervisor
        assert late.paths().count("release_memory_occupation") == 1 and len(fleet.serving) == 1
        fleet.update_weights(WEIGHTS, "1")
        eventually(lambda: len(fleet.serving) == 2)
        assert late.version == "1" and late.paths().count("resume_memory_occupation") == 2


def test_who_misses_an_update_serves_no_more_and_comes_back_with_the_next_version() -> None:
    good, bad = Fake(), Fake(update_weights_from_shared_memory=500)
    with fleet_of(good, bad, tolerant=True) as (fleet, router):
        fleet.start()
        fleet.suspend()
        fleet.update_weights(WEIGHTS, "1")
        assert [m.rank for m in fleet.serving] == [0]
        assert "remove_worker" in router.paths()
        assert "refused /update_weights_from_shared_memory" in fleet.state_of_all()
        bad.answers = {}
        eventually(lambda: len(fleet.serving) == 2)
        assert bad.version == "1" and router.asked[-1][1]["url"] == bad.url


def test_who_serves_another_version_than_it_says_is_left_out() -> None:
    class Deaf(SharedMemoryDelivery):
        def deliver(self, *given: Any) -> dict[Member, EngineError]:
            return {}

    with fleet_of(Fake(), delivery=Deaf()) as (fleet, _):
        fleet.start()
        fleet.suspend()
        with pytest.raises(EngineError, match="serves version default, expected 1"):
            fleet.update_weights(WEIGHTS, "1")


def test_nobody_is_admitted_while_weights_are_written() -> None:
    good, late = Fake(), Fake()
    with fleet_of(good, late, tolerant=True) as (fleet, _):
        start_and_lose(fleet, late)
        fleet.suspend()
        late.answers = {}
        eventually(lambda: [p for p, _ in late.asked].count("health") >= 3 and fleet.members[1].state is State.STARTING)
        time.sleep(0.3)  # several looks of the supervisor
        assert [m.rank for m in fleet.serving] == [0]
        fleet.update_weights(WEIGHTS, "1")
        eventually(lambda: len(fleet.serving) == 2)
        assert late.version == "1"


def test_without_tolerance_the_first_loss_is_the_end() -> None:
    engine = Fake(pause_generation=400)
    with fleet_of(engine) as (fleet, _):
        fleet.start()
        fleet.suspend()
        with pytest.raises(EngineError, match=r"engine 0 was lost: .* refused /pause_generation: HTTP 400"):
            fleet.update_weights(WEIGHTS, "1")


def test_a_failed_comparison_is_the_end_with_tolerance_too() -> None:
    engine = Fake()
    with fleet_of(engine, tolerant=True, check_first_update=True) as (fleet, _):
        fleet.start()
        actions = [body["action"] for path, body in engine.asked if path == "weights_checker"]
        assert actions == ["snapshot", "reset_tensors"]
        engine.answers = {"weights_checker": 400}
        fleet.suspend()
        with pytest.raises(EngineError, match="refused /weights_checker"):
            fleet.update_weights(WEIGHTS, "1")


# A server of a process of its own: answers everything, or ends at once.
SERVER = """
import sys, http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"weight_version": "default"}')
    do_POST = do_GET
if sys.argv[2] == "ends":
    print("no memory left"); sys.exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def launching(folder: Path, behaviours: list[str], started: list[ServerProcess]) -> Callable[[int, str], ServerProcess]:
    def launch(rank: int, version: str) -> ServerProcess:
        port = free_port()
        argv = [sys.executable, "-S", "-c", SERVER, str(port), behaviours[min(len(started), len(behaviours) - 1)]]
        log = folder / f"{rank}.log"
        started.append(ServerProcess(f"engine {rank}", argv, f"http://127.0.0.1:{port}", log, child_environment(1)))
        return started[-1]

    return launch


@contextmanager
def own_engine(folder: Path, *behaviours: str, tolerant: bool, delivery: Delivery | None = None) -> Iterator[Any]:
    router, started = Fake(), list[ServerProcess]()
    launch = launching(folder, list(behaviours), started)
    fleet = Fleet([Member(0, "")], watching(tolerant), launch=launch, delivery=delivery, router_url=router.url)
    try:
        yield fleet, started
    finally:
        fleet.close()
        router.close()


def test_an_engine_that_dies_is_started_anew(tmp_path: Path) -> None:
    with own_engine(tmp_path, "serves", "ends", "serves", tolerant=True) as (fleet, started):
        fleet.start()
        started[0].stop()
        eventually(lambda: len(started) == 3 and fleet.is_ready)
        assert fleet.members[0].url == started[2].url and fleet.members[0].failed_starts == 0
    assert all(server.has_ended for server in started)


def test_an_engine_that_never_starts_is_given_up(tmp_path: Path) -> None:
    with own_engine(tmp_path, "ends", tolerant=True) as (fleet, started):
        with pytest.raises(EngineError, match=rf"failed {MAX_FAILED_STARTS + 1} times in a row.*\n  no memory left"):
            fleet.start()
        assert len(started) == MAX_FAILED_STARTS + 1


def test_without_tolerance_an_engine_that_does_not_start_is_the_end(tmp_path: Path) -> None:
    says = r"could not be started: .* ended with exit status 3"
    with own_engine(tmp_path, "ends", tolerant=False) as (fleet, _), pytest.raises(EngineError, match=says):
        fleet.start()
