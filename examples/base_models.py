"""What the recipes of the examples' base models share: a random Qwen3, a tokenizer's files, the finished folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files under a class name that every version of transformers knows."""
    tokenizer.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n")


def write_random_model(
    folder: Path, *, vocab: Sequence[str], eos: str, pad: str, num_layers: int, max_length: int, seed: int
) -> None:
    """A Qwen3 of width 128 in bfloat16, without tokenizer: 597,696 parameters with 3 layers and 53 tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(vocab),
        hidden_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab.index(eos),
        pad_token_id=vocab.index(pad),
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def put_in_place(model: Path, out: Path) -> None:
    """The exported `model` becomes `out`, readable by everyone."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out)
    for file in out.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone
