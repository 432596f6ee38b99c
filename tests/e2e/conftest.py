"""Fixtures of the end-to-end tests: given files, models with something wrong, a disk that is soon full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_runs import BASE


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(content: str | bytes, name: str = "file.jsonl") -> Path:
        path = tmp_path / "given" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base model, with some files changed, dropped (None), or entries of config.json changed."""

    def make(config: dict[str, object] | None = None, **files: bytes | None) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(BASE, folder)
        if config is not None:
            kept = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(kept | config))
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.unlink() if content is None else path.write_bytes(content)
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("1m")` mounts a file system of that size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size: str) -> Path:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        return folder

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)
