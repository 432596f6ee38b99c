"""Fixtures of the engine tests; the checkpoints are made in engine_tiny.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_tiny import ARCHITECTURES, make_checkpoint

from miles.engine.embedded import EmbeddedEngine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture name -> folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(root / kind, kind) for kind in ARCHITECTURES}


@pytest.fixture
def engine(checkpoints: dict[str, Path]) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine.from_folder(checkpoints["qwen3"], max_running_requests=16, seed=3)
    yield engine
    engine.close()
