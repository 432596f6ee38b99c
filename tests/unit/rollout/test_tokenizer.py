from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import make_tokenizer
from miles.errors import CheckpointError, FlagError, UsageError
from miles.rollout.tokenizer import (
    encode_image_for_rollout_engine,
    load_tokenizer,
    process_vision_info,
)


def test_a_folder_loads(tmp_path: Path) -> None:
    make_tokenizer.save(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=True)
    assert tokenizer.encode("9+7=?") == [14, 15, 12, 19, 20]
    assert tokenizer.eos_token == "<eos>"


def test_a_folder_without_a_class_name_loads_too(tmp_path: Path) -> None:
    make_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    assert load_tokenizer(str(tmp_path)).encode("9") == [14]


def test_a_plain_folder_loads_without_torch(tmp_path: Path) -> None:
    make_tokenizer.save(tmp_path)
    code = (
        "import sys; from miles.rollout.tokenizer import load_tokenizer, load_processor;"
        f"load_tokenizer({str(tmp_path)!r}); assert load_processor({str(tmp_path)!r}) is None;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/at/all", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("{folder}/missing", "there is no such folder"),
        ("{folder}/weights.bin", "this is a file"),
        ("{folder}", "no tokenizer in this folder. Expected one of tokenizer.json, .* it holds torn, weights.bin"),
        ("{folder}/torn", "the tokenizer in this folder cannot be loaded"),
    ],
)
def test_an_unusable_folder_names_the_flag(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "weights.bin").write_text("")
    make_tokenizer.save(tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=said) as caught:
        load_tokenizer(name.format(folder=tmp_path))
    assert str(caught.value).startswith("--hf-checkpoint ")


def test_no_name_at_all() -> None:
    with pytest.raises(FlagError, match="--hf-checkpoint: expected the folder of a model"):
        load_tokenizer(None)


def test_a_name_that_the_hub_cannot_give() -> None:
    with pytest.raises(CheckpointError, match="--hf-checkpoint org/model: neither a folder here nor a model"):
        load_tokenizer("org/model", local_files_only=True)


def test_images_become_png_in_rgb() -> None:
    image = pytest.importorskip("PIL.Image")
    encoded = encode_image_for_rollout_engine(image.new("RGBA", (2, 2), (255, 0, 0, 10)))
    decoded = image.open(io.BytesIO(base64.b64decode(encoded)))
    assert (decoded.format, decoded.mode, decoded.getpixel((0, 0))) == ("PNG", "RGB", (255, 0, 0))


def test_media_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)
    with pytest.raises(UsageError, match="--multimodal-keys: images and videos need the package qwen-vl-utils"):
        process_vision_info([], object())
