"""I/O errors in each of their guises, and places that are tried before they are needed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miles.errors import RunDirError
from miles.observe.files import disk_errors, prepare_folder


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: save_file({"a": torch.zeros(100_000)}, path),
        lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_file_that_does_not_fit(write: object, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(RunDirError) as caught, disk_errors(tmp_path, "--save"):
            write(tmp_path / "file")  # type: ignore[operator]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    says = str(caught.value)
    assert says.startswith(f"{tmp_path}: cannot be written: ")
    assert "Free some space or give another place with --save; files written before are intact." in says


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("expected a scalar"), ValueError("os"), RunDirError("mine")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error


def test_a_place_is_tried(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b", "--save")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="A file is in the way; give another directory with --save-hf"):
        prepare_folder(tmp_path / "file", "--save-hf")
    with pytest.raises(RunDirError, match=r"/proc/miles: cannot be written: .* give another one with --save"):
        prepare_folder("/proc/miles", "--save")
