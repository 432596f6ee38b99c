"""A random mixture of experts in numbers, a batch of two groups, and an actor that trains it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles.batch import TrainBatch, from_published_dict
from miles.config import parse
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.actor import TrainActor
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.schedule import schedule_of

LAYERS, TOP_K, EXPERTS, VOCABULARY = 3, 2, 8, 41
NUMBERS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
SAMPLES = 8


def make_batch(experts: bool = False, seed: int = 7) -> TrainBatch:
    """Two groups of four with one prompt each; experts at random."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=g).tolist()

    prompts = [p for _ in range(SAMPLES // 4) for p in [ids(6)] * 4]
    responses = [ids(3 + 5 * i % 13) for i in range(SAMPLES)]
    data: dict[str, Any] = {
        "tokens": [p + r for p, r in zip(prompts, responses)],
        "response_lengths": [len(r) for r in responses],
        "rewards": torch.randn(SAMPLES, generator=g).tolist(),
        "loss_masks": [[1] * len(r) for r in responses],
        "rollout_log_probs": [[-3.0] * len(r) for r in responses],
        "sample_indices": [*range(SAMPLES)],
    }
    data["raw_reward"] = data["rewards"]
    if experts:
        data["rollout_routed_experts"] = [random_experts(len(t) - 1, g) for t in data["tokens"]]
    return from_published_dict(data)


def random_experts(tokens: int, g: torch.Generator) -> np.ndarray:
    """int32 [tokens, layers, top_k], distinct ones for each token."""
    return torch.rand(tokens, LAYERS, EXPERTS, generator=g).argsort(-1)[..., :TOP_K].int().numpy()


class Lines:
    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None:
        if step_key == "train/step":
            self.steps.append(metrics)

    def close(self) -> None: ...


def make_actor(folder: Path, *flags: str) -> tuple[TrainActor, Lines]:
    argv = shlex.split(
        f"--hf-checkpoint {folder} --train-backend fsdp --num-rollout 1 --rollout-batch-size 2 --n-samples-per-prompt 4"
        " --global-batch-size 4 --lr 5e-3 --clip-grad 0.5 --adam-eps 1e-4 --prompt-data none"
    )
    config, args = parse([*argv, *flags])
    backend = FsdpBackend(str(folder), config.train, config.optimizer)
    backend.use_schedule(schedule_of(config.optimizer, 2))
    lines = Lines()
    actor = TrainActor(
        backend, config, args, bind(args), Tracker(sinks=[lines]), transport=None, on_step=lambda: None
    )
    return actor, lines
