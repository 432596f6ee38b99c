"""The smallest command line that is a run, and what a table of flags says to it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from miles.config import RunConfig, parse
from miles.errors import FlagError

REQUIRED = [
    *("--hf-checkpoint", "models/base", "--prompt-data", "train.jsonl", "--num-rollout", "3"),
    *("--rollout-batch-size", "16", "--n-samples-per-prompt", "8", "--global-batch-size", "64"),
]


def settings(*flags: str) -> RunConfig:
    return parse([*REQUIRED, *flags])[0]


def namespace(*flags: str) -> Namespace:
    return parse([*REQUIRED, *flags])[1]


def refusal(*flags: str) -> str:
    """The sentence with which these flags are refused."""
    with pytest.raises(FlagError) as caught:
        settings(*flags)
    return str(caught.value)


def value_of(config: RunConfig, name: str) -> object:
    """The value of a flag, in whichever section it stands."""
    from miles.config.sections import SECTIONS

    (found,) = [getattr(config.section(s), name) for s in SECTIONS if hasattr(config.section(s), name)]
    return found


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


MODEL = {
    "vocab_size": 53, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def model_folder(path: Path, architecture: str, **changed: object) -> str:
    """A folder with the config.json of a small model, and without weights."""
    experts = EXPERTS if architecture == "Qwen3MoeForCausalLM" else {}
    config = {"architectures": [architecture], **MODEL, **experts, **changed}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return str(path)


def settings_of_model(path: Path, architecture: str, *flags: str, **changed: object) -> RunConfig:
    """A run with --train-backend megatron that trains such a model."""
    return settings(
        "--train-backend", "megatron", "--hf-checkpoint", model_folder(path, architecture, **changed), *flags
    )
