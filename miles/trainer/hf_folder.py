"""Trained weights as a Hugging Face model folder, which `transformers` loads without miles."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

# Whole tensors that an export gathers at a time.
EXPORT_BUCKET_BYTES = 512 * 1024**2


def write_hf(folder: Path, source: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """`tensors` under the names that files have; config, settings of generation and tokenizer are those of `source`."""
    from transformers import GenerationConfig

    from miles.rollout.tokenizer import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # a folder without any
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    load_tokenizer(source, trust_remote_code=True).save_pretrained(folder)
