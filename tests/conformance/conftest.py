"""The engines of the conformance tests: the embedded one always, real SGLang where MILES_CONFORMANCE_SGLANG names it.

`make conformance` sets it (run.py): JSON, the folder with the models and the URL of the server of each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance_models import write_all
from conformance_server import Server, embedded

SGLANG = json.loads(os.environ.get("MILES_CONFORMANCE_SGLANG", "null"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if SGLANG is not None:
        return Path(SGLANG["models"])
    return write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


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
