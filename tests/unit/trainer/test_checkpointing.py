"""Activation checkpointing under packed attention and chunked log-probs: the same gradients from less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.batch import TrainBatch, from_published_dict
from miles.config import parse
from miles.hooks import bind
from miles.observe.tracking import Tracker
from miles.trainer.actor import TrainActor
from miles.trainer.fsdp.backend import FsdpBackend
from miles.trainer.schedule import Schedule

VOCABULARY, LAYERS = 97, 6
CHECKPOINTED = ["--gradient-checkpointing"]
REPLAYED = [*CHECKPOINTED, "--recompute-loss-function"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpointing") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=96, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def batch(longest: int) -> TrainBatch:
    """Eight rows in two groups with one prompt each, so that prompts are shared, of many lengths."""
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (9,), generator=rng).tolist() for _ in range(2)]
    responses = [torch.randint(2, VOCABULARY, (1 + longest * i // 8,), generator=rng).tolist() for i in range(8)]
    rewards = torch.randn(8, generator=rng).tolist()
    return from_published_dict(
        {
            "tokens": [prompts[i % 2] + r for i, r in enumerate(responses)],
            "response_lengths": [len(r) for r in responses],
            "loss_masks": [[1] * len(r) for r in responses],
            "rewards": rewards,
            "raw_reward": rewards,
        }
    )


def make_actor(folder: Path, *flags: str) -> TrainActor:
    config, args = parse(
        [
            *("--hf-checkpoint", str(folder), "--prompt-data", "none", "--num-rollout", "1"),
            *("--rollout-batch-size", "2", "--n-samples-per-prompt", "4", "--global-batch-size", "8"),
            *("--train-backend", "fsdp", "--micro-batch-size", "8", "--entropy-coef", "0.01", "--lr", "0"),
            *("--log-probs-chunk-size", "64", *flags),
        ]
    )
    backend = FsdpBackend(str(folder), config.train, config.optimizer)
    backend.use_schedule(Schedule(max_lr=0.0))
    return TrainActor(backend, config, args, bind(args), Tracker(sinks=[]), transport=None, on_step=lambda: None)


def gradients(actor: TrainActor, longest: int = 60) -> dict[str, Tensor]:
    actor.train(0, batch(longest), 8)
    return {name: p.grad.clone() for name, p in actor.backend.model.named_parameters() if p.grad is not None}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that tensors made by `run` held at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("flags", [CHECKPOINTED, REPLAYED], ids=["activations", "activations and loss"])
@pytest.mark.parametrize("longest", [40, 100], ids=["short rows", "fused attention"])
def test_the_same_gradients(folder: Path, flags: list[str], longest: int) -> None:
    plain, checkpointed = (gradients(make_actor(folder, *more), longest) for more in ((), flags))
    assert plain.keys() == checkpointed.keys() and len(plain) > 10 * LAYERS
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain), "the same operations, bit for bit"
    assert all(gradient.any() for gradient in plain.values())


def test_less_memory(folder: Path) -> None:
    peaks = []
    for flags in ((), CHECKPOINTED):
        actor = make_actor(folder, *flags)
        gradients(actor, 200)
        peaks.append(peak_bytes(lambda a=actor: gradients(a, 200)))
    assert peaks[1] < 0.5 * peaks[0], peaks
